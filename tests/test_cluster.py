"""On a Ray cluster of more than this process: jobs, tokens, and the file for `ray up`."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import ROOT, free_port, wait_for_port

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config


def test_cluster_yaml_is_of_rays_schema_and_of_the_same_ray():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    pinned = re.search(r"^ray\[default\]==(.+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert config["docker"]["image"] == f"rayproject/ray:{pinned}-py311-cpu"
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists()


@pytest.fixture
def head(s3, tmp_path):
    """Two nodes that `ray start` has started with a token: the address of their jobs, their own, and
    the environment that reaches them."""
    ray, folder = Path(sys.executable).with_name("ray"), tempfile.mkdtemp()  # sockets want a short path
    port, dashboard = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-test-alone-0123456789"}
    environment["PATH"] = f"{ray.parent}:{environment['PATH']}"  # jobs run `python`
    size = ["--num-cpus=1", "--object-store-memory=200000000", "--block"]
    first = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    started, agents = [], []
    for name, options in ("first", first), ("second", [f"--address=127.0.0.1:{port}"]):
        agent = free_port()  # two nodes on one machine share neither this port nor a folder
        options += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}/{name}"]
        with (tmp_path / name).open("w") as log:
            command = [ray, "start", *options, *size]
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        wait_for_port(port)  # the second node joins while the first one's agents start
        agents.append(agent)
    for each in [*agents, dashboard]:
        wait_for_port(each)
    yield f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment
    for process in reversed(started):
        process.terminate()
        process.wait(60)
    shutil.rmtree(folder)


@pytest.mark.timeout(400)
def test_job_on_two_nodes_with_a_token(head, s3, photos, bucket, tmp_path):
    """The modules come with the job's working directory, so that driver.py's would be too many."""
    jobs, address, environment = head
    work = tmp_path / "work"
    for package in "machinery", "tests":
        shutil.copytree(ROOT / package, work / package)
    for module in ROOT.glob("*.py"):
        shutil.copy(module, work)
    job = ["ray", "job", "submit", "--address", jobs, "--working-dir", work, "--"]
    driver = ["python", "tests/thin_driver.py", "NUM_WORKERS=2", "--s3-bucket", photos]
    driver += ["--iterations", "1", "--export-dir", f"s3://{bucket}/network"]
    ended = subprocess.run(
        [*job, *driver], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 workers; an iteration is 2 mini-batches" in ended.stdout
    assert f"Stopped at iteration 1: network in s3://{bucket}/network" in ended.stdout
    keys = [obj["Key"] for obj in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    assert "network/saved_model.pb" in keys

    environment = environment | {"RAY_AUTH_TOKEN": "another-token-0123456789abcdef0123456789"}
    refused = subprocess.run([*job, *driver], env=environment, capture_output=True, text=True)
    assert refused.returncode != 0 and "authentication" in (refused.stdout + refused.stderr).lower()

    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, ROOT / "driver.py"]
    without |= {"RAY_ADDRESS": address}
    refused = subprocess.run(command, env=without, capture_output=True, text=True)
    hint = "export RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token"
    assert refused.stderr == f"error: the Ray cluster at {address} refuses this run: {hint}\n"
