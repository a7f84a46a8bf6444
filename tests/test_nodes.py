"""Misfortunes of all kinds in one run, on nodes of one and of two workers and a head without CPUs."""

import contextlib
import os
import re
import signal
import subprocess
import time

import alexnet
import functions
from machinery.cluster.nodes import Place, is_fast_in_bfloat16
from tests.fault_proxy import fault_proxy
from tests.nodes import OWN_MOUNTS, Nodes, actor, actors
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
    train_here,
    wait_until,
)

import psutil
import pytest
from ray.autoscaler.v2.sdk import get_cluster_status

ITERATIONS = 32
TIMEOUT = 8  # seconds without an answer after which what hangs is replaced

# Ray carries what is smaller than 100 KB in its messages. Gradients of this network lie on nodes.
WIDE = tuple(("dense", 128) if layer == ("dense", 32) else layer for layer in THIN)

ONE = {"num_cpus": 1}  # Ray's option for a node of one worker


@pytest.fixture(scope="module")
def head(one_ray):
    """A head without CPUs, and no other node yet. Nodes that start after `one_ray` want its token."""
    nodes = Nodes(0, others=0, cpus=2)
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(head):
    """A node of two CPUs and two of one, beside the head."""
    head.add_all([{}, ONE, ONE])
    yield head
    while head.others:
        head.kill()


@pytest.fixture
def four_undisturbed(thin, one_ray, photos, tmp_path, monkeypatch):
    """Checksums of a run of four mini-batches an iteration, which one worker computes undisturbed.

    It begins at a checkpoint of iteration 0, which says how many mini-batches there are.
    """
    network = alexnet.AlexNet(WIDE, num_classes=10, rule=thin.update_rule(4 * thin.MINI_BATCH))
    network.restore(network.initial_state("he", functions.generator(0, "initial weights")))
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    save_start(folder, network, mini_batches=4)
    for name, value in {"LAYERS": WIDE, "STORED": "jpeg", "NUM_WORKERS": 1}.items():
        monkeypatch.setattr(thin, name, value)
    assert train_here(photos, folder, ITERATIONS) == 0
    return checksums(folder)


@pytest.fixture
def without_tensorflow(tmp_path):
    """Options of a node on which no worker can start, as in an image that lacks something."""
    (tmp_path / "tensorflow.py").write_text("raise ImportError('TensorFlow is not here')")
    return ONE | {"env_vars": {"PYTHONPATH": str(tmp_path)}}


@pytest.mark.timeout(600)
def test_misfortunes_one_after_another(four_undisturbed, nodes, photos, tmp_path, without_tensorflow):
    """No worker is lost that only waits, as long as storage stands still: longer than computing may
    take."""
    deaths = [("Loading: 3 of 10",), ("Shuffle round 2",), (1, "compute")]
    still, killed, hanging = moments = [(3, "broadcast"), (26, "broadcast"), (28, "compute")]
    pauses = [moment if len(moment) > 1 else moment[0] for moment in deaths + moments]
    settings = [f"LAYERS={WIDE}", "STORED='jpeg'", f"WORKER_TIMEOUT={TIMEOUT}", f"PAUSES={pauses}"]
    flags = ["--s3-bucket", photos, "--checkpoint-dir", tmp_path / "saved", "--iterations", ITERATIONS]
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(fault_proxy(os.environ["AWS_ENDPOINT_URL"]))
        options = {"address": nodes.address, "environment": {"AWS_ENDPOINT_URL": proxy.url}}
        run = stack.enter_context(thin_driver(*settings, *flags, **options))
        for moment, number, size in zip(deaths, (0, 0, 1), ({}, ONE, {}), strict=True):
            with run.paused(*moment):
                nodes.replace(number, **size)
        with contextlib.ExitStack() as for_a_while:
            with run.paused(*still):
                held = for_a_while.enter_context(proxy.held("GET"))
                for _ in range(3):  # all nodes at once, and all images
                    nodes.kill()
                nodes.add_all([{}, ONE, without_tensorflow])
            wait_until(held)  # images are read again
            time.sleep(TIMEOUT + 2)
        left_alone = nodes.others[-1].node_id
        run.wait_for(f"node {left_alone[:8]} is left alone: workers failed there 3 times in a row")
        so_far = run.output()
        nodes.replace(-1, **ONE)
        run.wait_for("is back: 4 of 4 are up", after=so_far)
        with run.paused(*killed):
            assert [len(actors(node, "Helper")) for node in nodes.others] == [1, 1, 1]
            actor(nodes.others[0], "Worker").kill()
            actor(nodes.others[1], "Helper").kill()
        with run.paused(*hanging):
            stopped = actor(nodes.others[1], "Worker"), actor(nodes.others[0], "Helper")
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
        assert run.wait() == 0, run.output()
    psutil.wait_procs(stopped, timeout=30)
    assert not any(process.is_running() for process in stopped)  # and not left behind stopped
    out = run.output()
    for line in (
        "4 workers; an iteration is 4 mini-batches of 5 images, in float32, an epoch is 6 iterations",
        "The number of mini-batches stays so. To wait for more workers, set NUM_WORKERS",
        r"gradients are lost \(.*\): they are computed again",
        r"node \w{8} is lost with 2 workers: \d of 4 go on",
        rf"worker \d is lost \(no answer in {TIMEOUT} s\): \d of 4 go on",
    ):
        assert re.search(f"^{line}$", out, re.M), line
    assert out.count("no answer") == 1
    assert fingerprints(out) == [contents(photos, "jpeg")] * 2
    assert_clean(out)
    assert checksums(tmp_path / "saved") == four_undisturbed


can_mount = subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode == 0
no_mounts = "this user may not mount a file for some processes"
may_mount = pytest.mark.skipif(not can_mount, reason=no_mounts)


def test_a_cpu_that_hides_amx_is_not_fast_in_bfloat16():
    cpus = {
        "AuthenticAMD avx512_bf16": True,  # EPYC, of the fourth generation and the fifth
        "AuthenticAMD avx512_bf16 avx512_fp16": True,
        "GenuineIntel avx512_bf16": True,  # Cooper Lake
        "GenuineIntel avx512_bf16 avx512_fp16 amx_bf16": True,  # Sapphire Rapids
        "GenuineIntel avx512_bf16 avx512_fp16": False,  # the same behind a hypervisor
        "GenuineIntel avx512f": False,
    }
    places = {flags: Place("", frozenset(flags.split()), "", "") for flags in cpus}
    assert {flags: is_fast_in_bfloat16(place) for flags, place in places.items()} == cpus


@may_mount
def test_cpus_of_several_models_a_late_one_without_bfloat16_and_one_short_of_memory(
    head, photos, tmp_path
):
    def cpu(model, flags):
        (tmp_path / model).mkdir()
        (tmp_path / model / "cpuinfo").write_text(f"model name : {model}\nflags : {flags}\n")
        return tmp_path / model

    def free(kilobytes):
        memory.write_text(
            f"MemTotal: 6000000 kB\nMemFree: {kilobytes} kB\nMemAvailable: {kilobytes} kB\n"
        )

    late, short = (3, "apply"), (24, "apply")
    settings = ["PRECISION=None", "MINI_BATCH=2", f"PAUSES={[late, short]}", f"NOTES='{tmp_path}'"]
    known = cpu("Abacus", "fpu avx512_bf16"), cpu("Quipu", "fpu amx_bf16")
    memory = known[1] / "meminfo"
    free(5_000_000)
    with (
        head.with_proc(1, *known) as (abacus, quipu),
        train_elsewhere(photos, tmp_path / "saved", head.address, *settings, iterations=26) as run,
    ):
        run.wait_for("Paused after apply of iteration 3")
        with head.with_proc(2, cpu("Knots", "fpu")):
            with run.paused(*late):
                titled(abacus.pid, "ray::Worker")[0].kill()
            with run.paused(*short):
                free(1000)
                wait_until(lambda: not titled(quipu.pid, "ray::Worker"))
                free(5_000_000)
            assert run.wait() == 0
    out = run.output()
    for line in (
        r"CPU is not the same on all nodes \(Abacus; Quipu\): two runs may differ in the last bits",
        r"CPU instructions is not the same on all nodes \(amx_bf16; avx512_bf16\): .*",
        "2 workers; an iteration is 2 mini-batches of 2 images, in bfloat16, an epoch is 30 iterations",
        r"node \w{8} is left alone: its CPU has no instructions for bfloat16, in .*",
        r"worker \d is back: 2 of 2 are up",
        r"worker \d is lost \(.* low on memory.*\): 1 of 2 go on",
    ):
        assert re.search(f"^{line}$", out, re.M), out
    assert_clean(out)


# ---- nodes that come as a replacement


def test_node_with_a_broken_library_is_left_alone(head, photos, tmp_path):
    """It fails fastest, and so would get most of the tasks that read lost images again."""
    (tmp_path / "simplejpeg.py").write_text("raise OSError('libjpeg.so is not here')")
    moments = [(3, "compute"), (9, "compute")]
    settings = ["STORED='jpeg'", f"NOTES='{tmp_path}'", f"PAUSES={moments}"]
    head.add()
    with train_elsewhere(photos, tmp_path / "saved", head.address, *settings) as run:
        with run.paused(*moments[0]):
            left_alone = head.replace(env_vars={"PYTHONPATH": str(tmp_path)}).node_id
        run.wait_for("is left alone")
        head.add()
        with run.paused(*moments[1]):
            head.kill(1)
            head.add()
        assert run.wait() == 0, run.output()
    why = r"no task can run there \(OSError: libjpeg.so is not here\)"
    assert re.search(rf"^node {left_alone[:8]} \([\d.]+\) is left alone: {why}$", run.output(), re.M)
    assert fingerprints(run.output()) == [contents(photos, "jpeg")] * 2
    assert_clean(run.output())
    while head.others:
        head.kill()


def test_no_node_has_the_libraries(head, photos, tmp_path):
    (tmp_path / "simplejpeg.py").write_text("raise ImportError('no simplejpeg')")
    head.add_all([{"env_vars": {"PYTHONPATH": str(tmp_path)}}] * 2)
    with train_elsewhere(photos, tmp_path / "saved", head.address) as run:
        assert run.wait() == 2
    line = r"error: no task can run on any of 2 nodes \(ImportError: no simplejpeg\): pip install .*"
    assert re.search(f"^{line}$", run.output(), re.M), run.output()
    while head.others:
        head.kill()


def test_nodes_with_less_memory_come_instead(head, photos, undisturbed, tmp_path):
    """One that holds a task on data, and then one that is too small for any."""
    moments = [(3, "compute"), (9, "compute")]
    settings = [f"NOTES='{tmp_path}'", f"PAUSES={moments}", "WORKER_WAIT=60"]
    head.add(memory=24 * 10**9)
    with train_elsewhere(photos, tmp_path / "saved", head.address, *settings) as run:
        with run.paused(*moments[0]):
            head.replace(memory=10**9)
        with run.paused(*moments[1]):
            head.replace(memory=5 * 10**8)
        assert run.wait() == 2, run.output()
    lack = "a task needs 0.9 GB of memory, and no node gives Ray more than 0.5"
    assert re.search(rf"^Iteration \d+ waits for images to be read again: {lack}$", run.output(), re.M)
    assert re.search(rf"^error: Iteration \d+ waits for .*, in vain: {lack}$", run.output(), re.M)
    while head.others:
        head.kill()


def test_demand_for_nodes_ends_with_a_run_that_is_killed(head, photos, tmp_path):
    """On a cluster that grows on demand, nodes would stay for it, and be billed."""

    def demand():
        status = get_cluster_status(head.address).resource_demands
        assert not status.cluster_constraint_demand  # which outlives a job
        return sum(
            shape.count for each in status.ray_task_actor_demand for shape in each.bundles_by_count
        )

    head.add()
    with train_elsewhere(photos, tmp_path, head.address, "NUM_WORKERS=5") as run:
        run.wait_for("5 workers of 1 CPUs and 0 GPUs each were asked for, the cluster has room for 2")
        wait_until(lambda: demand() == 3)
        os.kill(run.pid, signal.SIGKILL)
        wait_until(lambda: demand() == 0)
    head.kill()
