"""Whatever dies, a run ends with the weights of an undisturbed one, bit for bit."""

import contextlib
import itertools
import os
import re
import signal
import time

import psutil
import pytest
import ray

import imagenet
import results
from tests.fault_proxy import fault_proxy
from tests.nodes import Nodes
from tests.support import (
    assert_clean,
    checksums,
    contents,
    fingerprints,
    make_tar,
    noting_worker,
    photo,
    titled,
    train,
    train_elsewhere,
    train_here,
    wait_until,
    workers_of,
)

# ---- nodes


@pytest.fixture(scope="module")
def nodes(s3):
    """Two nodes of one CPU each, the head's among them, as in cluster.yaml."""
    nodes = Nodes(1, others=1, cpus=1)
    yield nodes
    nodes.close()


def test_a_node_dies_again_and_again_and_storage_stands_still_meanwhile(
    nodes, photos, undisturbed, tmp_path
):
    """No worker is lost that only waits, though that takes longer here than computing may."""
    early = "Loading: 3 of 10", "Shuffle round 2"
    settings = ["WORKER_TIMEOUT=6", f"PAUSES={[*early, (3, 'apply')]}"]
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, contextlib.ExitStack() as for_a_while:
        environment = {"AWS_ENDPOINT_URL": proxy.url}
        training = train_elsewhere(photos, tmp_path, nodes.address, *settings, environment=environment)
        with training as run:
            for moment in early:
                with run.paused(moment):
                    nodes.add()  # in time to take part, so that some images lie on it
                    nodes.kill()
            with run.paused(3, "apply"):
                held = for_a_while.enter_context(proxy.held("GET"))
                nodes.kill()
            wait_until(held)  # images are read again
            time.sleep(10)
            for_a_while.close()
            run.wait_for("Iteration 15: loss")
            assert "is lost with 1 workers: 1 of 2 go on" in run.output()
            assert "is back" not in run.output()
            nodes.add()
            run.wait_for("is back: 2 of 2")
            nodes.replace()
            assert run.wait() == 0, run.output()
    assert "no answer" not in run.output()
    assert fingerprints(run.output()) == [contents(photos)] * 2
    assert_clean(run.output())
    assert checksums(tmp_path) == undisturbed


# ---- data


def test_task_that_hangs_is_named_and_run_again(
    thin, one_ray, photos, undisturbed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(thin, "TASK_TIMEOUT", 6)
    task = f"s3://{photos}/ILSVRC2012_img_train/n01500003.tar"
    stopped = []

    def stop():
        """The tar comes only once the task is stopped, so that this is in the middle of it."""
        stopped.extend(titled(os.getpid(), f"ray::{task}"))
        stopped[-1].send_signal(signal.SIGSTOP)

    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.faults["GET", "n01500003.tar"] = iter([stop])
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert train_here(photos, tmp_path) == 0
    late = rf"{task} has not ended in 6 s on node \w{{8}}: this task is run again"
    seen = rf"a process is stopped on node \w{{8}} \(ray::{task}\): it is ended"  # at the same time
    assert len(re.findall(f"^(?:{late}|{seen})$", capsys.readouterr().out, re.M)) == len(stopped) == 1
    psutil.wait_procs(stopped, timeout=30)
    assert not stopped[0].is_running()
    assert checksums(tmp_path) == undisturbed


def test_tar_that_ends_its_process_each_time_ends_the_run(thin, one_ray, photos, monkeypatch, capsys):
    """As one for which there is too little memory, or at which the decoder crashes."""
    task, killed = f"s3://{photos}/ILSVRC2012_img_train/n01500003.tar", []

    def kill():
        killed.extend(titled(os.getpid(), f"ray::{task}"))
        killed[-1].kill()

    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.faults["GET", "n01500003.tar"] = itertools.repeat(kill)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert train(photos, "--iterations", 1) == 2
    line = rf"error: {task}: this task has ended (\d+) processes \(.*\)\n"
    assert int(re.fullmatch(line, capsys.readouterr().err)[1]) == len(set(killed))


def test_tar_that_changes_after_it_was_listed_is_noticed(
    thin, one_ray, s3, photos, bucket, tmp_path, capsys
):
    s3.copy({"Bucket": photos, "Key": "train.txt"}, bucket, "train.txt")
    for tar in imagenet.list_tars(photos, "")[0][:2]:
        s3.copy({"Bucket": photos, "Key": tar.key}, bucket, tar.key)
    assert train_here(bucket, tmp_path, 1, actor=noting_worker(tmp_path)) == 0
    s3.put_object(Bucket=bucket, Key=tar.key, Body=make_tar({"n1500000_0.JPEG": b"changed"}))
    assert train_here(bucket, tmp_path, 2) == 2  # a resume would read other images
    assert re.search(r"^error: .*different are tars", capsys.readouterr().err, re.M)


@pytest.fixture(scope="module")
def many(s3):
    """A bucket of 1000 images, which take 197 MB when they are decoded; few of them are different."""
    images, lines = [photo(seed) for seed in range(10)], []
    s3.create_bucket(Bucket="many")
    for tar in range(10):
        files = {f"{tar}_{number}.JPEG": images[number % 10] for number in range(100)}
        s3.put_object(Bucket="many", Key=f"ILSVRC2012_img_train/n015{tar}.tar", Body=make_tar(files))
        lines += [f"{name} {number % 10}" for number, name in enumerate(files)]
    s3.put_object(Bucket="many", Key="train.txt", Body="\n".join(lines).encode())
    return "many"


def test_data_larger_than_the_object_stores_spills_and_a_full_disk_is_one_clear_line(
    nodes, many, tmp_path
):
    """Two runs at once, each on a cluster of its own."""
    settings, full = ["STORED='pixels'", "SHUFFLE_ROUNDS=1"], {"local_fs_capacity_threshold": 0.001}
    others = Nodes(2, others=0, cpus=0, _system_config=full)
    try:
        with (
            train_elsewhere(many, tmp_path / "1", nodes.address, *settings, iterations=2) as run,
            train_elsewhere(many, tmp_path / "2", others.address, *settings) as on_a_full_disk,
        ):
            assert run.wait() == 0, run.output()
            assert on_a_full_disk.wait() == 2, on_a_full_disk.output()
    finally:
        others.close()
    assert re.search("About 1[0-9]{3} images: 0.2 GB .* goes to disk", run.output())
    assert fingerprints(run.output()) == [contents(many)]
    assert len(re.findall("^error: .*disk", on_a_full_disk.output(), re.M)) == 1
    assert_clean(on_a_full_disk.output())


# ---- a long run


class Memory(results.Report):
    """Keeps the losses, and the memory of driver and workers after 100 and after 200 iterations."""

    def __init__(self):
        super().__init__()
        self.losses, self.seen = [], {}

    def iteration(self, iteration, losses, *numbers):
        super().iteration(iteration, losses, *numbers)
        self.losses += losses
        if iteration in (100, 200):
            processes = [psutil.Process(), *workers_of(os.getpid())]
            free = ray.available_resources()["object_store_memory"]
            # USS is what a process has for itself: the object store is not counted.
            self.seen[iteration] = [process.memory_full_info().uss for process in processes], free


def test_hundreds_of_iterations_learn_and_memory_stays_flat(thin, one_ray, photos, monkeypatch):
    monkeypatch.setattr(thin, "ACCURACY_EVERY", 10)
    monkeypatch.setattr(thin, "KEEP_PROBABILITY", 1.0)
    report = Memory()
    assert train(photos, "--iterations", 201, report=report) == 0
    (early, early_free), (late, late_free) = report.seen[100], report.seen[200]
    assert len(early) == len(late) == 3
    for before, after in zip(early, late, strict=True):
        assert after - before < 10 * 2**20
    assert early_free - late_free < 10 * 2**20
    first, last = (sum(part) / len(part) for part in (report.losses[:6], report.losses[-100:]))
    assert first > 2 and last < 0.75 * first
