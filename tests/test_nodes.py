"""Misfortunes of all kinds in one run, on nodes of two workers and a head without CPUs."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import alexnet
import functions
from tests.fault_proxy import fault_proxy
from tests.nodes import OWN_MOUNTS, Nodes, actor, actors, memory_monitor, use_memory_until
from tests.support import (
    THIN,
    assert_clean,
    checksums,
    contents,
    fingerprints,
    save_start,
    thin_driver,
    titled,
    train_elsewhere,
    wait_until,
)

import psutil
import pytest

ITERATIONS = 36
TIMEOUT = 8  # seconds without an answer after which what hangs is replaced

# Ray carries what is smaller than 100 KB in its messages. Gradients of this network lie on nodes.
WIDE = tuple(("dense", 128) if layer == ("dense", 32) else layer for layer in THIN)
SETTINGS = [f"LAYERS={WIDE}", "STORED='jpeg'"]


@pytest.fixture(scope="module")
def head(s3):
    """A head without CPUs, and no other node yet."""
    nodes = Nodes(0, others=0, cpus=2)
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(head):
    """Three nodes of two CPUs beside the head."""
    head.add_all([{}] * 3)
    yield head
    while head.others:
        head.kill()


@pytest.fixture
def six_undisturbed(thin, one_ray, photos, tmp_path):
    """A run of six mini-batches an iteration, which two workers compute undisturbed, and its folder.

    It begins at a checkpoint of iteration 0, which says how many mini-batches there are.
    """
    network = alexnet.AlexNet(WIDE, num_classes=10, rule=thin.update_rule(6 * thin.MINI_BATCH))
    network.restore(network.initial_state("he", functions.generator(0, "initial weights")))
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    save_start(folder, network, mini_batches=6)
    with train_elsewhere(photos, folder, one_ray, *SETTINGS, iterations=ITERATIONS) as run:
        yield run, folder


@pytest.fixture
def without_tensorflow(tmp_path):
    """Options of a node on which no worker can start, as in an image that lacks something."""
    (tmp_path / "tensorflow.py").write_text("raise ImportError('TensorFlow is not here')")
    return {"env_vars": {"PYTHONPATH": str(tmp_path)}}


@pytest.mark.timeout(700)
def test_misfortunes_one_after_another(six_undisturbed, nodes, photos, tmp_path, without_tensorflow):
    """No worker is lost that only waits, as long as storage stands still: longer than computing may
    take."""
    deaths = [("Loading: 3 of 10",), ("Shuffle round 2",), (1, "compute")]
    still, killed, hanging, memory = moments = [
        *((3, "broadcast"), (26, "broadcast"), (28, "compute"), (34, "apply"))
    ]
    pauses = [moment if len(moment) > 1 else moment[0] for moment in deaths + moments]
    settings = [*SETTINGS, f"WORKER_TIMEOUT={TIMEOUT}", f"PAUSES={pauses}"]
    flags = ["--s3-bucket", photos, "--checkpoint-dir", tmp_path / "saved", "--iterations", ITERATIONS]
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(fault_proxy(os.environ["AWS_ENDPOINT_URL"]))
        options = {"address": nodes.address, "environment": {"AWS_ENDPOINT_URL": proxy.url}}
        run = stack.enter_context(thin_driver(*settings, *flags, **options))
        for moment in deaths:
            with run.paused(*moment):
                nodes.replace()
        with contextlib.ExitStack() as for_a_while:
            with run.paused(*still):
                held = for_a_while.enter_context(proxy.held("GET"))
                for _ in range(3):  # all nodes at once, and all images
                    nodes.kill()
                nodes.add_all([{}, {}, without_tensorflow])
            wait_until(held)  # images are read again
            time.sleep(TIMEOUT + 2)
        left_alone = nodes.others[-1].node_id
        run.wait_for(f"node {left_alone[:8]} is left alone: workers failed there 3 times in a row")
        nodes.kill(-1)
        so_far, monitored = run.output(), nodes.add(env_vars=memory_monitor())
        run.wait_for("is back: 6 of 6 are up", after=so_far)
        with run.paused(*killed):
            assert [len(actors(node, "Helper")) for node in nodes.others] == [1, 1, 1]
            actor(nodes.others[0], "Worker").kill()
            actor(nodes.others[1], "Helper").kill()
        with run.paused(*hanging):
            stopped = actor(nodes.others[1], "Worker"), actor(nodes.others[0], "Helper")
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
        with run.paused(*memory):
            use_memory_until(lambda: len(actors(monitored, "Worker")) < 2)
        assert run.wait() == 0, run.output()
    psutil.wait_procs(stopped, timeout=30)
    assert not any(process.is_running() for process in stopped)  # and not left behind stopped
    out = run.output()
    for line in (
        "6 workers; an iteration is 6 mini-batches of 5 images, in float32, an epoch is 4 iterations",
        "The number of mini-batches stays so. To wait for more workers, set NUM_WORKERS",
        r"gradients are lost \(.*\): they are computed again",
        r"node \w{8} is lost with 2 workers: \d of 6 go on",
        rf"worker \d is lost \(no answer in {TIMEOUT} s\): \d of 6 go on",
        r"worker \d is lost \(.* low on memory.*\): \d of 6 go on",
    ):
        assert re.search(f"^{line}$", out, re.M), line
    assert out.count("no answer") == 1
    assert fingerprints(out) == [contents(photos, "jpeg")] * 2
    assert_clean(out)
    undisturbed, folder = six_undisturbed
    assert undisturbed.wait() == 0, undisturbed.output()
    assert checksums(tmp_path / "saved") == checksums(folder)


can_mount = subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode == 0
no_mounts = "this user may not mount a file for some processes"
may_mount = pytest.mark.skipif(not can_mount, reason=no_mounts)

# Says for each line of its input whether a CPU is fast in bfloat16 if /proc/cpuinfo is that line.
ASKED = """
import pathlib, subprocess, sys
from machinery.cluster import nodes
file = pathlib.Path(sys.argv[1])
file.touch()
subprocess.run(["mount", "--bind", file, "/proc/cpuinfo"], check=True)
for line in sys.stdin:
    file.write_text(line)
    print(nodes.is_fast_in_bfloat16())
"""


@may_mount
def test_a_cpu_that_hides_amx_is_not_fast_in_bfloat16(tmp_path):
    cpus = {
        "AuthenticAMD fpu avx512_bf16": True,  # EPYC, of the fourth generation and the fifth
        "AuthenticAMD fpu avx512_bf16 avx512_fp16": True,
        "GenuineIntel fpu avx512_bf16": True,  # Cooper Lake
        "GenuineIntel fpu avx512_bf16 avx512_fp16 amx_bf16": True,  # Sapphire Rapids
        "GenuineIntel fpu avx512_bf16 avx512_fp16": False,  # the same behind a hypervisor
        "GenuineIntel fpu avx512f": False,
    }
    command = [*OWN_MOUNTS, sys.executable, "-c", ASKED, tmp_path / "cpuinfo"]
    said = subprocess.run(command, input="\n".join(cpus), capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(fast) for fast in cpus.values()]


@may_mount
def test_cpus_of_several_models_and_a_late_one_without_bfloat16(head, photos, tmp_path):
    def cpu(model, flags):
        (tmp_path / model).write_text(f"model name : {model}\nflags : {flags}\n")
        return tmp_path / model

    settings = ["PRECISION=None", "MINI_BATCH=2", "PAUSES=[(3, 'apply')]", f"NOTES='{tmp_path}'"]
    known = cpu("Abacus", "fpu avx512_bf16"), cpu("Quipu", "fpu amx_bf16")
    with (
        head.with_cpuinfo(1, *known) as (abacus, _),
        train_elsewhere(photos, tmp_path / "saved", head.address, *settings, iterations=20) as run,
    ):
        run.wait_for("Paused after apply of iteration 3")
        with head.with_cpuinfo(2, cpu("Knots", "fpu")):
            with run.paused(3, "apply"):
                titled(abacus.pid, "ray::Worker")[0].kill()
            assert run.wait() == 0
    out = run.output()
    for line in (
        r"CPUs of several models \(Abacus; Quipu\): two runs may differ in the last bits",
        "2 workers; an iteration is 2 mini-batches of 2 images, in bfloat16, an epoch is 30 iterations",
        r"node \w{8} is left alone: its CPU has no instructions for bfloat16, in .*",
        r"worker \d is back: 2 of 2 are up",
    ):
        assert re.search(f"^{line}$", out, re.M), out
    assert_clean(out)
