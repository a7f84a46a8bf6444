"""Whatever dies, a run ends with the weights of an undisturbed one, bit for bit."""

import contextlib
import os
import re
import signal
import threading
import time

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

import decoding
import imagenet
import results
from tests.support import (
    checksums,
    fingerprint,
    make_tar,
    photo,
    thin_constants,
    thin_driver,
    title,
    train,
    workers_of,
)

ITERATIONS = 30
NO_DASHBOARD = {"include_dashboard": False}  # no test here looks at it


@pytest.fixture(scope="module")
def undisturbed(one_ray, photos, tmp_path_factory):
    """Checksums after ITERATIONS of a run that nothing disturbs, with 2 mini-batches an iteration."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        thin_constants(patch)
        assert train_here(photos, folder) == 0
    return checksums(folder)


def train_here(bucket, folder, iterations=ITERATIONS, **hooks):
    """driver.py in this process, on the session's Ray."""
    return train(bucket, "--iterations", iterations, "--checkpoint-dir", folder, **hooks)


def train_elsewhere(bucket, folder, address, *settings, iterations=ITERATIONS):
    """driver.py as a process, on the Ray at an address."""
    flags = ["--s3-bucket", bucket, "--checkpoint-dir", folder, "--iterations", iterations]
    return thin_driver("NUM_WORKERS=2", *settings, *flags, address=address)


def hit_one_computing(signum):
    """Send a signal to a worker while it computes a gradient; the process."""
    workers, deadline = workers_of(os.getpid()), time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in workers:
            if title(process).startswith("ray::Worker.compute_grad"):
                process.send_signal(signum)
                return process
    raise AssertionError("no worker was seen computing")


# ---- workers


class WorkerFaults(results.Report):
    """Does something to a worker at several moments, each time after the last one was replaced."""

    def __init__(self, faults):
        """`faults` is a dict of (iteration, moment) -> function."""
        super().__init__()
        self.faults, self.now = faults, 0

    def iteration(self, iteration, *numbers):
        """The end of an iteration, at which a worker that is lost is waited for."""
        super().iteration(iteration, *numbers)
        deadline = time.monotonic() + 60
        while [title(process) for process in workers_of(os.getpid())] != ["ray::Worker"] * 2:
            assert time.monotonic() < deadline, "no new worker came up"
            time.sleep(0.05)
        self.now = iteration + 1
        self.strike("before update_weights")

    def lap(self, phase):
        """The end of a phase; after "broadcast", the workers load the weights and then compute."""
        super().lap(phase)
        if phase == "broadcast":
            self.strike("in update_weights")

    def strike(self, moment):
        """Do what is due."""
        self.faults.pop((self.now, moment), lambda: None)()


def test_workers_killed_and_hanging(thin, one_ray, photos, undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(thin, "WORKER_TIMEOUT", 6)
    stopped, threads = [], []

    def kill_one(seconds=0):
        time.sleep(seconds)
        victim = workers_of(os.getpid())[0]
        victim.kill()
        victim.wait()

    def once_computing(signum):
        threads.append(threading.Thread(target=lambda: stopped.append(hit_one_computing(signum))))
        threads[-1].start()

    faults = {
        (2, "before update_weights"): kill_one,
        (4, "in update_weights"): kill_one,
        (6, "in update_weights"): lambda: kill_one(seconds=1),  # after it, by now
        (8, "in update_weights"): lambda: once_computing(signal.SIGKILL),
        (10, "in update_weights"): lambda: once_computing(signal.SIGSTOP),
    }
    assert train_here(photos, tmp_path, report=WorkerFaults(faults)) == 0
    assert not faults
    out = capsys.readouterr().out
    assert out.count(" is lost (") == out.count(" is back: 2 of 2 are up") == 5
    assert out.count("is lost (no answer in 6 s): 1 of 2 go on") == 1
    for thread in threads:
        thread.join()
    psutil.wait_procs(stopped, timeout=30)
    assert not any(process.is_running() for process in stopped)  # and not left behind stopped
    assert checksums(tmp_path) == undisturbed


class OnIteration(results.Report):
    """Does something once, at the end of an iteration."""

    def __init__(self, number, act):
        super().__init__()
        self.number, self.act = number, act

    def iteration(self, iteration, *numbers):
        super().iteration(iteration, *numbers)
        if iteration == self.number:
            self.act()


def test_crashes_in_a_row_end_the_run_with_one_line(thin, one_ray, photos, tmp_path, capsys):
    ended = threading.Event()

    def kill_all():
        while not ended.wait(0.01):
            for process in workers_of(os.getpid()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    killer = threading.Thread(target=kill_all)
    try:
        assert train_here(photos, tmp_path, report=OnIteration(2, killer.start)) == 2
    finally:
        ended.set()
        killer.join()
    assert re.fullmatch("error: .*\n", capsys.readouterr().err)


def test_loss_that_is_not_finite_ends_the_run(thin, one_ray, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(thin, "LEARNING_RATE", 1e30)
    monkeypatch.setattr(thin, "CHECKPOINT_EVERY", 1)
    assert train_here(photos, tmp_path) == 2
    assert re.fullmatch(
        r"error: iteration \d+: the (loss|gradient) of mini-batch \d is not finite, on worker \d: "
        r"lower LEARNING_RATE\n",
        capsys.readouterr().err,
    )


# ---- nodes


class Nodes:
    """A cluster of two nodes of one CPU each, with small object stores of their own."""

    SIZE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}

    def __init__(self):
        # Ray looks often whether a node answers, and so misses a dead one in seconds.
        look = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}
        head = self.SIZE | NO_DASHBOARD | {"_system_config": look}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address
        self.add()

    def add(self):
        """Start a second node."""
        self.second = self.cluster.add_node(**self.SIZE)

    def kill(self):
        """Kill the second node with all that runs and lies on it."""
        self.cluster.remove_node(self.second, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes(s3):
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


def contents(bucket):
    """What must be in the object store: every image of a bucket once, with its label."""
    labels = imagenet.read_labels(bucket, "train.txt", 10)
    pairs = []
    for tar in imagenet.list_tars(bucket, "")[0]:
        images, names, _ = decoding.decode_tar(imagenet.download(bucket, tar.key), (256, 256))
        pairs.append((images, [labels[name] for name in names]))
    return fingerprint(pairs)


def fingerprints(output):
    return re.findall(r"^\d+ images: \w{64}$", output, re.M)


def test_nodes_killed_while_data_loads_and_is_shuffled(nodes, photos, undisturbed, tmp_path):
    with train_elsewhere(photos, tmp_path, nodes.address) as run:
        for moment in ("Loading: 3 of 10", "Shuffle round 2"):
            run.wait_for(moment)
            nodes.kill()
            nodes.add()
        assert run.wait() == 0, run.output()
    assert fingerprints(run.output()) == [contents(photos)] * 3
    assert checksums(tmp_path) == undisturbed


def test_nodes_killed_in_training_and_one_cannot_come_back_for_a_while(
    nodes, photos, undisturbed, tmp_path
):
    with train_elsewhere(photos, tmp_path, nodes.address) as run:
        run.wait_for("Iteration 1: loss")
        nodes.kill()
        run.wait_for("Iteration 15: loss")
        assert "1 of 2 go on" in run.output() and "is back" not in run.output()
        nodes.add()
        run.wait_for("is back: 2 of 2")
        nodes.kill()
        nodes.add()
        assert run.wait() == 0, run.output()
    assert run.output().count("1 of 2 go on") == 2
    assert fingerprints(run.output()) == [contents(photos)] * 3
    assert checksums(tmp_path) == undisturbed


# ---- the driver


def test_driver_killed_resumes_to_the_same_weights(
    thin, one_ray, photos, undisturbed, tmp_path, monkeypatch, capsys
):
    for moment in ("Loading: 3 of 10", "Iteration 13: loss"):
        with train_elsewhere(photos, tmp_path, one_ray, "CHECKPOINT_EVERY=1") as run:
            run.wait_for(moment)  # it is always saving
            run.kill()
        assert "Resumed" not in run.output()
    for leftover in ("ckpt-99.data-00000-of-00001.tempstate123", "ckpt-99.data-00000-of-00001"):
        (tmp_path / leftover).write_bytes(b"half a save")
    monkeypatch.setattr(thin, "NUM_WORKERS", 1)  # which computes both mini-batches
    assert train_here(photos, tmp_path) == 0
    assert f"Resumed from {tmp_path} at iteration 1" in capsys.readouterr().out
    assert checksums(tmp_path) == undisturbed


def test_interrupt_saves_and_exports_and_the_run_resumes_from_s3(
    thin, one_ray, photos, bucket, undisturbed, tmp_path, capsys
):
    place, export = f"s3://{bucket}/runs/1", tmp_path / "network"
    interrupt = OnIteration(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    flags = ["--iterations", 100_000, "--checkpoint-dir", place, "--export-dir", export]
    assert train(photos, *flags, report=interrupt) == 143
    out, err = capsys.readouterr()
    assert re.findall(r"^Iteration (\d+): loss", out, re.M) == list("012345") and err == ""
    assert out.endswith(
        "Stopping after this step\n"
        f"Stopped at iteration 6: checkpoints in {place}, network in {export}\n"
    )
    assert (export / "saved_model.pb").exists()
    assert train_here(photos, place) == 0
    assert f"Resumed from {place} at iteration 6" in capsys.readouterr().out
    for name in (f"ckpt-{ITERATIONS}.data-00000-of-00001", f"ckpt-{ITERATIONS}.index", "checkpoint"):
        imagenet.S3Folder(place).download(name, tmp_path / name)
    assert checksums(tmp_path) == undisturbed


def test_second_interrupt_stops_at_once_and_leaves_no_worker(one_ray, photos, tmp_path):
    with train_elsewhere(photos, tmp_path, one_ray, iterations=100_000) as run:
        run.wait_for("Iteration 3: loss")
        hit_one_computing(signal.SIGSTOP)  # this step would never end
        workers = workers_of(os.getpid())
        os.kill(run.pid, signal.SIGINT)
        run.wait_for("Stopping after this step")
        os.kill(run.pid, signal.SIGINT)
        assert run.wait(60) == 130, run.output()
        assert "Traceback" not in run.output()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


# ---- data


def test_tar_that_changes_after_it_was_listed_is_noticed(
    thin, one_ray, s3, photos, bucket, tmp_path, capsys
):
    s3.copy({"Bucket": photos, "Key": "train.txt"}, bucket, "train.txt")
    for tar in imagenet.list_tars(photos, "")[0][:2]:
        s3.copy({"Bucket": photos, "Key": tar.key}, bucket, tar.key)
    assert train_here(bucket, tmp_path, 1) == 0
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


def test_data_larger_than_the_object_stores_spills(nodes, many, tmp_path):
    with train_elsewhere(many, tmp_path, nodes.address, "SHUFFLE_ROUNDS=1", iterations=2) as run:
        assert run.wait() == 0, run.output()
    assert re.search("About 1[0-9]{3} images: 0.2 GB .* goes to disk", run.output())
    assert fingerprints(run.output()) == [contents(many)]


def test_full_disk_is_one_clear_line(many, tmp_path):
    full = {"_system_config": {"local_fs_capacity_threshold": 0.001}}
    size = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=size | full | NO_DASHBOARD)
    try:
        with train_elsewhere(many, tmp_path, nodes.address) as run:
            assert run.wait() == 2, run.output()
    finally:
        nodes.shutdown()
    assert len(re.findall("^error: .*disk", run.output(), re.M)) == 1
    assert "Traceback" not in run.output()


# ---- a long run


class Memory(results.Report):
    """Keeps the losses, and the memory of driver and workers after 100 and after 1000 iterations."""

    def __init__(self):
        super().__init__()
        self.losses, self.seen = [], {}

    def iteration(self, iteration, losses, *numbers):
        super().iteration(iteration, losses, *numbers)
        self.losses += losses
        if iteration in (100, 1000):
            processes = [psutil.Process(), *workers_of(os.getpid())]
            free = ray.available_resources()["object_store_memory"]
            # USS is what a process has for itself: the object store is not counted.
            self.seen[iteration] = [process.memory_full_info().uss for process in processes], free


def test_a_thousand_iterations_learn_and_memory_stays_flat(thin, one_ray, photos, monkeypatch):
    monkeypatch.setattr(thin, "ACCURACY_EVERY", 10)
    monkeypatch.setattr(thin, "MINI_BATCH", 4)
    monkeypatch.setattr(thin, "KEEP_PROBABILITY", 1.0)
    report = Memory()
    assert train(photos, "--iterations", 1001, report=report) == 0
    (early, early_free), (late, late_free) = report.seen[100], report.seen[1000]
    assert len(early) == len(late) == 3
    for before, after in zip(early, late, strict=True):
        assert after - before < 20 * 2**20
    assert early_free - late_free < 20 * 2**20
    first, last = (sum(part) / len(part) for part in (report.losses[:6], report.losses[-100:]))
    assert first > 2 and last < 0.75 * first
