"""Which Ray a run is on: private ones, dead ones, addresses of other kinds, and calls from Python."""

import json
import os
import socket
import subprocess
import sys

import pytest
import ray
from ray._raylet import GcsClient

import joining
import watching
from tests.support import ROOT, free_port

DRIVER = [sys.executable, ROOT / "driver.py"]


def drive(address=None, **environment):
    """driver.py as a process: its exit status and its lines on standard output and error."""
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    here |= ({"RAY_ADDRESS": address} if address else {}) | environment
    ended = subprocess.run(DRIVER, env=here, capture_output=True, text=True, timeout=90)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def alone(monkeypatch):
    """As before `ray.init`, whatever this session has started; a head has 3 seconds to answer."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(joining, "ANSWER", 3)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "head", "a:b"])
def test_addresses_of_other_kinds(alone, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(joining.ClusterError) as caught:
        joining.find_address(print)
    hint = "name the cluster's own address, HOST:6379 (http:// is for `ray job submit` alone)"
    assert str(caught.value) == f"RAY_ADDRESS={address}: {hint}"


def test_address_at_which_nothing_listens_or_no_cluster(alone, monkeypatch):
    """Told within a minute; Ray itself tries for a quarter of an hour."""
    assert watching.ANSWER + joining.CONNECT < 60
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (free_port(), silent.getsockname()[1]):
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            with pytest.raises(joining.ClusterError) as caught:
                joining.find_address(print)
            assert str(caught.value) == (
                f"no Ray cluster answers at RAY_ADDRESS=127.0.0.1:{port}: check it"
            )


def test_cluster_of_another_ray(one_ray):
    """The session's says for a while that it is one."""
    head, key = GcsClient(address=one_ray), (b"CLUSTER_METADATA", b"cluster")
    metadata = head.internal_kv_get(key[0], namespace=key[1])
    another = json.dumps(json.loads(metadata) | {"ray_version": "2.9.0"}).encode()
    try:
        head.internal_kv_put(key[0], another, True, namespace=key[1])
        status, out, error = drive(one_ray)
    finally:
        head.internal_kv_put(key[0], metadata, True, namespace=key[1])
    assert (status, out) == (2, "") and error.count("\n") == 1
    assert error.startswith(f"error: the Ray cluster at {one_ray} cannot be joined: Version mismatch")
    assert "2.9.0" in error


def test_cluster_of_ray_start_that_is_gone(alone, monkeypatch, tmp_path):
    """Ray keeps its address in a file; the run has a Ray of its own then."""
    gone, said = f"127.0.0.1:{free_port()}", []
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(gone)
    assert joining.find_address(said.append) == "local"
    assert said == [
        f"The Ray cluster at {gone}, which `ray start` has started here, does not answer: "
        "this run has a Ray of its own (`ray stop` forgets the other one)"
    ]


def test_sockets_whose_path_is_too_long(tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    status, _, error = drive("local", RAY_TMPDIR=str(long), TMPDIR=str(long))
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("error: Ray does not start here: ") and "path" in error


FROM_A_NOTEBOOK = """
import sys, threading
import ray
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=2 * 10**8)
sys.path.insert(0, {root!r})
import driver
from tests import support
driver.LAYERS, driver.NUM_CLASSES, driver.PRECISION = support.THIN, 10, "float32"
driver.MINI_BATCH, driver.NUM_WORKERS = support.MINI_BATCH, 1
flags = ["--s3-bucket", "photos", "--key-prefix", "ILSVRC2012_img_train/n0150000", "--iterations", "1"]
print("status", driver.main(flags))
thread = threading.Thread(target=lambda: print("status", driver.main(flags)))
thread.start()
thread.join()
assert ray.is_initialized()
"""


def test_from_python_after_ray_init_from_another_folder_and_in_a_thread(photos, tmp_path):
    """The Ray was started before anybody knew of the project's modules."""
    code = FROM_A_NOTEBOOK.format(root=str(ROOT))
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    lines = ended.stdout.splitlines()
    assert lines.count("status 0") == 2, ended.stdout + ended.stderr
    assert sum(line.startswith("Iteration 0: loss") for line in lines) == 2
