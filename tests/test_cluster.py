"""On a Ray cluster of more than this process: jobs, tokens, and the files for those who start it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import driver
from tests.support import ROOT, THIN, draw_image, free_port, jpeg, wait_for_port

import numpy as np
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

PINNED = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def test_cluster_yaml_is_of_rays_schema_and_of_the_same_ray():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["docker"]["image"] == f"rayproject/ray:{PINNED}-py311-cpu"
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists()


def test_rayjob_yaml_runs_driver_py_in_the_image_of_the_dockerfile():
    """With flags that there are, all of its files, and the same Ray; all of its nodes are alike."""
    job = yaml.safe_load((ROOT / "rayjob.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == PINNED
    image = (ROOT / "Dockerfile").read_text()
    lines = dict(line.split(" ", 1) for line in image.splitlines() if not line.startswith("#"))
    assert lines["FROM"] == f"rayproject/ray:{PINNED}-py311-cpu"
    python, program, *flags = job["spec"]["entrypoint"].split()
    assert (python, program) == ("python", f"{lines['WORKDIR']}/driver.py")
    args = driver.read_flags(flags)
    assert (args.s3_bucket, args.checkpoint_dir) == ("BUCKET", "s3://BUCKET/checkpoints")
    copied = re.findall(r"^COPY (\S+) ", image, re.M)
    for path in driver.runtime_env()["py_modules"]:
        assert any(Path(path).match(pattern) for pattern in copied)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [each for group in groups for each in group["template"]["spec"]["containers"]]
    assert len({(each["image"], str(each["envFrom"])) for each in containers}) == 1


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


OWN_SCRIPT = f"""
import driver
from machinery import ending
driver.LAYERS, driver.NUM_CLASSES, driver.PRECISION = {THIN}, 10, "float32"
driver.MINI_BATCH, driver.NUM_WORKERS = 5, 2
ending.leave(ending.status(driver.main))
"""


@pytest.fixture
def work(tmp_path):
    """A checkout with a script of the user's, and with more beside it than Ray takes for a job."""
    work = tmp_path / "work"
    shutil.copytree(ROOT / "machinery", work / "machinery")
    for name in [".rayignore", *ROOT.glob("*.py")]:
        shutil.copy(ROOT / name, work)
    (work / "own.py").write_text(OWN_SCRIPT)
    for place in "checkpoints/ckpt-500.data", ".venv/lib/library.so", ".git/objects/pack", "photos.tar":
        (work / place).parent.mkdir(parents=True, exist_ok=True)
        with (work / place).open("wb") as file:
            file.truncate(600 * 10**6)
    return work


@pytest.mark.timeout(400)
def test_job_on_two_nodes_with_a_token(head, s3, photos, bucket, work, tmp_path):
    """The modules come with the job's working directory, so that driver.py's would be too many."""
    jobs, address, environment = head
    job = ["ray", "job", "submit", "--address", jobs, "--working-dir", work, "--"]
    train = ["python", "own.py", "--s3-bucket", photos]
    train += ["--iterations", "1", "--export-dir", f"s3://{bucket}/network"]
    ended = subprocess.run(
        [*job, *train], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 workers; an iteration is 2 mini-batches" in ended.stdout
    assert f"Stopped at iteration 1: network in s3://{bucket}/network" in ended.stdout
    keys = [obj["Key"] for obj in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    assert "network/saved_model.pb" in keys

    photo = tmp_path / "imagenet" / "train" / "n01440764" / "n01440764_1.JPEG"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(jpeg(draw_image(0, np.random.default_rng(0))))
    stage = ["python", "stage_imagenet.py", tmp_path / "imagenet", f"s3://{bucket}/staged"]
    ended = subprocess.run([*job, *stage], env=environment, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"Now: python driver.py --s3-bucket {bucket} " in ended.stdout

    environment = environment | {"RAY_AUTH_TOKEN": "another-token-0123456789abcdef0123456789"}
    refused = subprocess.run([*job, *train], env=environment, capture_output=True, text=True)
    assert refused.returncode != 0 and "authentication" in (refused.stdout + refused.stderr).lower()

    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, ROOT / "driver.py"]
    without |= {"RAY_ADDRESS": address}
    refused = subprocess.run(command, env=without, capture_output=True, text=True)
    hint = "export RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token"
    assert refused.stderr == f"error: the Ray cluster at {address} refuses this run: {hint}\n"
