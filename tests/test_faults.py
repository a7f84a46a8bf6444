"""Whatever dies, a run ends with the weights of an undisturbed one, bit for bit."""

import contextlib
import itertools
import os
import re
import time
from pathlib import Path

import imagenet
from machinery import results
from machinery.cluster import tasks
from machinery.cluster.nodes import ANSWER, BETWEEN_LOOKS
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
    workers_of,
)

import psutil
import pytest
import ray

# ---- data


def test_task_that_hangs_is_named_and_run_again(
    thin, one_ray, photos, undisturbed, proxy, tmp_path, monkeypatch, capsys
):
    """It waits for an answer, less long than S3's own patience is."""
    monkeypatch.setattr(thin, "TASK_TIMEOUT", 6)
    monkeypatch.setattr(tasks, "PATIENCE", 2)
    task = f"s3://{photos}/ILSVRC2012_img_train/n01500003.tar"
    hanging = []

    def hang():
        hanging.extend(titled(os.getpid(), f"ray::{task}"))
        psutil.wait_procs(hanging, timeout=60)

    proxy.faults["GET", "n01500003.tar"] = iter([hang])
    assert train_here(photos, tmp_path, actor=noting_worker(tmp_path)) == 0
    asked = [request for request in proxy.requests if request.key == "n01500003.tar"]
    assert len(hanging) == 1 and not hanging[0].is_running()
    assert len(asked) == 2
    [log] = Path(os.environ["RAY_TMPDIR"]).glob(f"ray/session_2*/logs/worker-*-{hanging[0].pid}.err")
    assert "Timeout (0:00:06)!" in log.read_text() and "in load_tarfile" in log.read_text()
    named = f"Loading: 1 tars are still read ({task})"
    assert named in capsys.readouterr().out.splitlines()
    assert checksums(tmp_path) == undisturbed


def test_tar_that_ends_its_process_each_time_ends_the_run(
    thin, one_ray, photos, proxy, tmp_path, capsys
):
    """As one for which there is too little memory, or at which the decoder crashes."""
    task, killed = f"s3://{photos}/ILSVRC2012_img_train/n01500003.tar", []

    def kill():
        killed.extend(titled(os.getpid(), f"ray::{task}"))
        killed[-1].kill()

    proxy.faults["GET", "n01500003.tar"] = itertools.repeat(kill)
    assert train(photos, "--iterations", 1, actor=noting_worker(tmp_path)) == 2
    line = rf"error: {task}: this task has ended (\d+) processes \(.*\)\n"
    assert int(re.fullmatch(line, capsys.readouterr().err)[1]) == len(set(killed))


def test_tar_that_changes_after_it_was_listed_is_noticed(
    thin, one_ray, s3, photos, bucket, tmp_path, capsys
):
    s3.copy({"Bucket": photos, "Key": "train.txt"}, bucket, "train.txt")
    for tar in imagenet.list_tars(imagenet.source_of(photos), "")[0][:2]:
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
    s3, many, tmp_path
):
    """Two runs at once, each on a cluster of its own. One has workers on the driver's node, too; the
    other of its nodes dies with what has spilled there."""
    settings = ["STORED='pixels'", "SHUFFLE_ROUNDS=1", f"NOTES='{tmp_path}'"]
    full = {"local_fs_capacity_threshold": 0.001}
    dies = 1, "compute"
    with (
        contextlib.closing(Nodes(1, others=1, cpus=1)) as two,
        contextlib.closing(Nodes(2, others=0, cpus=0, _system_config=full)) as one,
        train_elsewhere(many, tmp_path / "1", two.address, *settings, f"PAUSES={[dies]}") as run,
        train_elsewhere(many, tmp_path / "2", one.address, *settings) as on_a_full_disk,
    ):
        with run.paused(*dies):
            two.replace()
        assert run.wait() == 0, run.output()
        assert on_a_full_disk.wait() == 2, on_a_full_disk.output()
    assert re.search("About 1[0-9]{3} images: 0.2 GB .* goes to disk", run.output())
    assert fingerprints(run.output()) == [contents(many)] * 2
    assert len(re.findall("^error: .*disk", on_a_full_disk.output(), re.M)) == 1
    assert_clean(on_a_full_disk.output())


# ---- workers and the driver


@pytest.mark.smoke
def test_worker_dies_and_is_back_then_the_driver_dies(
    thin, one_ray, photos, undisturbed, tmp_path, monkeypatch, capsys
):
    pauses = [(3, "broadcast"), "worker 0 is back", "worker 1 is back"]
    settings = ["CHECKPOINT_EVERY=1", f"PAUSES={pauses}", f"NOTES='{tmp_path}'"]
    with train_elsewhere(photos, tmp_path / "saved", one_ray, *settings) as run:
        with run.paused(3, "broadcast"):
            workers_of(os.getpid())[0].kill()
        run.wait_for("Paused after worker")
        run.kill()
    assert re.search(r"^worker \d is lost \(.*\): 1 of 2 go on$", run.output(), re.M)
    assert_clean(run.output())
    monkeypatch.setattr(thin, "NUM_WORKERS", 1)  # which computes both mini-batches
    assert train_here(photos, tmp_path / "saved", actor=noting_worker(tmp_path)) == 0
    assert re.search(r"^Resumed from .* at iteration \d+$", capsys.readouterr().out, re.M)
    assert checksums(tmp_path / "saved") == undisturbed


# ---- the cluster's head


def test_head_that_is_silent_for_a_while(photos, undisturbed, tmp_path):
    """While it stands still, and is not asked for anything else, iterations go on."""
    first, then, last = pauses = [(3, "compute"), (9, "compute"), (15, "compute")]
    settings = [f"NOTES='{tmp_path}'", f"PAUSES={pauses}"]
    saved, line = tmp_path / "saved", "The head of the Ray cluster is silent for 20 s: the run goes on"
    with (
        contextlib.closing(Nodes(2, others=0, cpus=0)) as nodes,
        train_elsewhere(photos, saved, nodes.address, *settings) as run,
    ):
        with run.paused(*first):
            nodes.head().suspend()
            time.sleep(BETWEEN_LOOKS)
        with run.paused(*then):
            time.sleep(ANSWER)
        with run.paused(*last):
            assert line in run.output()
            assert len([*saved.glob("ckpt-*.index")]) == 1
            nodes.head().resume()
        assert run.wait() == 0, run.output()
    assert run.output().count(line) == 1
    assert_clean(run.output())
    assert checksums(saved) == undisturbed


# ---- a long run


class Memory(results.Report):
    """Keeps the losses, and the memory of driver and workers after 50 and after 150 iterations."""

    def __init__(self):
        super().__init__()
        self.losses, self.seen = [], {}

    def iteration(self, iteration, losses, *numbers):
        super().iteration(iteration, losses, *numbers)
        self.losses += losses
        if iteration in (50, 150):
            processes = [psutil.Process(), *workers_of(os.getpid())]
            free = ray.available_resources()["object_store_memory"]
            # USS is what a process has for itself: the object store is not counted.
            self.seen[iteration] = [process.memory_full_info().uss for process in processes], free


def test_many_iterations_learn_and_memory_stays_flat(thin, one_ray, photos, monkeypatch):
    monkeypatch.setattr(thin, "ACCURACY_EVERY", 10)
    monkeypatch.setattr(thin, "KEEP_PROBABILITY", 1.0)
    report = Memory()
    assert train(photos, "--iterations", 151, report=report) == 0
    (early, early_free), (late, late_free) = report.seen[50], report.seen[150]
    assert len(early) == len(late) == 3
    for before, after in zip(early, late, strict=True):
        assert after - before < 10 * 2**20
    assert early_free - late_free < 10 * 2**20
    first, last = (sum(part) / len(part) for part in (report.losses[:6], report.losses[-100:]))
    assert first > 2 and last < 0.75 * first
