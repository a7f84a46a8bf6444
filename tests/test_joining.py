"""Which Ray a run is on: private ones, dead ones, addresses of other kinds, and calls from Python."""

import json
import os
import platform
import re
import socket
import subprocess
import sys

from machinery.cluster import joining, nodes
from machinery.errors import ClusterError
from tests.support import ROOT, assert_clean, free_port, train_elsewhere

import psutil
import pytest
import ray
from ray._raylet import GcsClient

DRIVER = [sys.executable, ROOT / "driver.py"]


def drive(address=None, **environment):
    """driver.py as a process: its exit status and its lines on standard output and error."""
    here = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    here |= ({"RAY_ADDRESS": address} if address else {}) | environment
    ended = subprocess.run(DRIVER, env=here, capture_output=True, text=True, timeout=90)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "head", "a:b"])
def test_addresses_of_other_kinds(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError) as caught:
        joining.find_address()
    hint = "name the cluster's own address, HOST:6379 (http:// is for `ray job submit` alone)"
    assert str(caught.value) == f"RAY_ADDRESS={address}: {hint}"


def test_address_at_which_nothing_listens_or_no_cluster(monkeypatch):
    """Told within a minute; Ray itself tries for a quarter of an hour."""
    assert nodes.ANSWER + nodes.CONNECT < 60
    monkeypatch.setattr(nodes, "ANSWER", 3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (free_port(), silent.getsockname()[1]):
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            with pytest.raises(ClusterError) as caught:
                joining.find_address()
            hint = f"check it, and that Ray {ray.__version__} runs there"
            assert str(caught.value) == (
                f"no Ray cluster answers at RAY_ADDRESS=127.0.0.1:{port}: {hint}"
            )


@pytest.mark.parametrize("what", ["ray_version", "python_version"])
def test_cluster_of_another_ray_or_python(one_ray, what):
    """The session's says for a while that it is one."""
    head, key = GcsClient(address=one_ray), (b"CLUSTER_METADATA", b"cluster")
    metadata = head.internal_kv_get(key[0], namespace=key[1])
    here = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    there = here | {what: "2.9.0"}
    another = json.dumps(json.loads(metadata) | there).encode()
    try:
        head.internal_kv_put(key[0], another, True, namespace=key[1])
        status, out, error = drive(one_ray)
    finally:
        head.internal_kv_put(key[0], metadata, True, namespace=key[1])
    named = "Ray {ray_version} and Python {python_version}"
    both = f"it has {named.format(**there)}, and this program {named.format(**here)}"
    hint = "run driver.py with those of the cluster, or as a job there (`ray job submit`)"
    assert (status, out) == (2, "")
    assert error == f"error: the Ray cluster at {one_ray} cannot be joined: {both}: {hint}\n"


def test_cluster_of_ray_start_that_is_gone(monkeypatch, tmp_path, caplog):
    """Ray keeps its address in a file; the run has a Ray of its own then."""
    gone = f"127.0.0.1:{free_port()}"
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(gone)
    with caplog.at_level("INFO", "driver"):
        assert joining.find_address() == "local"
    assert caplog.messages == [
        f"The Ray cluster at {gone}, which `ray start` has started here, does not answer: "
        "this run has a Ray of its own (`ray stop` forgets the other one)"
    ]


def test_sockets_whose_path_is_too_long(tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    status, _, error = drive("local", RAY_TMPDIR=str(long), TMPDIR=str(long))
    assert status == 2 and error.count("\n") == 1
    assert error.startswith("error: Ray does not start here: ") and "path" in error


# ---- runs side by side, each on a Ray of its own

TAR = "ILSVRC2012_img_train/n01500000.tar"

FROM_A_NOTEBOOK = """
import sys, threading
import ray
ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=2 * 10**8)
sys.path.append({root!r})  # what lies beside the notebook comes first
import driver
from tests import support
driver.LAYERS, driver.NUM_CLASSES, driver.PRECISION = support.THIN, 10, "float32"
driver.MINI_BATCH, driver.NUM_WORKERS = support.MINI_BATCH, 1
flags = ["--s3-bucket", "photos", "--key-prefix", {tar!r}, "--iterations", "1"]
thread = threading.Thread(target=lambda: print("returned", driver.main(flags)))
thread.start()
thread.join()
print("returned", driver.main(flags), ray.is_initialized())
"""

MEMORY_IS_SHORT = """
import sys
import driver
from machinery import ending
driver.PRECISION = "float32"
sys.exit(ending.status(lambda: driver.main(["--s3-bucket", "photos", "--key-prefix", {tar!r}])))
"""


def start(code, **options):
    """Start a program with these lines, and with pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, **options)


@pytest.mark.timeout(400)
def test_runs_side_by_side_do_not_disturb_each_other(photos, tmp_path):
    """One is in a thread, from a folder whose own modules have names of machinery's. Two cannot go on:
    Ray's memory monitor ends every load task of one, and the head of the other is killed; Ray says
    nothing of either."""
    for name in "constants", "results", "errors", "nodes", "cluster", "places", "s3":
        (tmp_path / f"{name}.py").write_text("raise ImportError('this is another module')")
    monitor = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    monitor |= {"RAY_task_oom_retries": "2"}
    environment = os.environ | monitor | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    flags, saved = ["--export-dir", tmp_path / "network", "--key-prefix", TAR], tmp_path / "saved"
    settings = ["PAUSES=[(3, 'compute')]", f"NOTES='{tmp_path}'"]
    for_ever = {"flags": flags, "iterations": 10**6}
    with train_elsewhere(photos, saved, "local", *settings, **for_ever) as run:
        with run.paused(3, "compute"):
            notebook = start(FROM_A_NOTEBOOK.format(root=str(ROOT), tar=TAR), cwd=tmp_path)
            short = start(MEMORY_IS_SHORT.format(tar=TAR), env=environment)
            [head] = [p for p in psutil.Process(run.pid).children(True) if p.name() == "gcs_server"]
            head.kill()
        out, error = notebook.communicate(timeout=200)
        assert "returned None\n" in out and "returned None True\n" in out, out + error
        assert len(re.findall("^Iteration 0: loss", out, re.M)) == 2

        out, error = short.communicate(timeout=200)
        why = "Ray ends every task because memory is short: free memory on the nodes, or add nodes"
        assert (short.returncode, error) == (2, f"error: {why}\n"), out + error
        assert_clean(out + error)

        assert run.wait(90) == 2, run.output()
    out = run.output()
    assert re.search(f"^Stopped at iteration \\d+: checkpoints in {saved}, network in ", out, re.M)
    assert len(re.findall("^error: the head of the Ray cluster has not answered for", out, re.M)) == 1
    assert_clean(out)
