"""Whatever dies, a run ends with the weights of an undisturbed one, bit for bit."""

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from conftest import checksums, thin_constants, train
from ray.cluster_utils import Cluster
from thin_driver import fingerprint

import demo
import functions
import imagenet

ITERATIONS = 30
NO_DASHBOARD = {"include_dashboard": False}  # no test here looks at it


@pytest.fixture(scope="module")
def undisturbed(cluster, photos, tmp_path_factory):
    """Checksums after ITERATIONS of a run that nothing disturbs, with 2 mini-batches an iteration."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        thin_constants(patch)
        assert train_here(photos, folder) == 0
    return checksums(folder)


def train_here(bucket, folder, iterations=ITERATIONS):
    """driver.py in this process, on the session's Ray."""
    return train(bucket, "--iterations", iterations, "--checkpoint-dir", folder)


def at_iteration(monkeypatch, number, act):
    """Have `act` called when an iteration tells the workers to load its weights."""
    update = functions.Workers.update_weights

    def spy(self, iteration, weightref):
        if iteration == number:
            act()
        update(self, iteration, weightref)

    monkeypatch.setattr(functions.Workers, "update_weights", spy)


def in_a_thread(function, *arguments):
    """What starts a thread."""
    return lambda: threading.Thread(target=function, args=arguments).start()


class Run:
    """driver.py as a process of its own, its lines as they come."""

    def __init__(self, command, environment):
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.pid, self._lines, self._news = self._process.pid, [], threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in itertools.chain(self._process.stdout, ["[end]"]):
            with self._news:
                self._lines.append(line)
                self._news.notify_all()

    def output(self):
        return "".join(self._lines)

    def wait_for(self, text, seconds=120):
        """Wait until the output holds a text."""
        with self._news:
            came = self._news.wait_for(lambda: text in self.output() or "[end]" in self._lines, seconds)
        assert came and text in self.output(), f"{text!r} did not come:\n{self.output()}"

    def wait(self, seconds=200):
        """Wait for the end; the exit status."""
        return self._process.wait(seconds)

    def kill(self):
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def thin_driver(bucket, folder, *settings, iterations=ITERATIONS, address="local"):
    command = [sys.executable, "-u", str(Path(__file__).with_name("thin_driver.py"))]
    command += ["NUM_WORKERS=2", *settings, "--s3-bucket", bucket, "--checkpoint-dir", str(folder)]
    run = Run([*command, "--iterations", str(iterations)], os.environ | {"RAY_ADDRESS": address})
    try:
        yield run
    finally:
        run.kill()


def workers_of(pid):
    """The worker processes below a process."""
    below = psutil.Process(pid).children(recursive=True)
    return [process for process in below if title(process).startswith("ray::Worker")]


def title(process):
    with contextlib.suppress(psutil.Error, IndexError):
        return process.cmdline()[0]
    return ""


def hit_one_computing(pid, signum):
    """Send a signal to a worker while it computes a gradient."""
    workers, deadline = workers_of(pid), time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in workers:
            if title(process).startswith("ray::Worker.compute_grad"):
                process.send_signal(signum)
                return process
    raise AssertionError("no worker was seen computing")


@pytest.mark.parametrize(
    "moment", ["before update_weights", "in update_weights", "after update_weights"]
)
def test_worker_killed_around_update_weights(
    thin, cluster, photos, undisturbed, tmp_path, monkeypatch, capsys, moment
):
    update = functions.Workers.update_weights

    def with_a_death(self, iteration, weightref):
        victim = workers_of(os.getpid())[0] if iteration == 2 else None
        if victim and moment.startswith("before"):
            victim.kill()
            victim.wait()
        update(self, iteration, weightref)
        if victim and moment.startswith("after"):
            time.sleep(1)
        if victim and not moment.startswith("before"):
            victim.kill()

    monkeypatch.setattr(functions.Workers, "update_weights", with_a_death)
    assert train_here(photos, tmp_path) == 0
    assert "is lost" in capsys.readouterr().out
    assert checksums(tmp_path) == undisturbed


def test_worker_killed_in_compute_grad(
    thin, cluster, photos, undisturbed, tmp_path, monkeypatch, capsys
):
    kill = in_a_thread(hit_one_computing, os.getpid(), signal.SIGKILL)
    at_iteration(monkeypatch, 2, kill)
    assert train_here(photos, tmp_path) == 0
    assert "is lost" in capsys.readouterr().out
    assert checksums(tmp_path) == undisturbed


def test_worker_that_hangs_is_replaced(
    thin, cluster, photos, undisturbed, tmp_path, monkeypatch, capsys
):
    stopped = []
    at_iteration(
        monkeypatch,
        2,
        in_a_thread(lambda: stopped.append(hit_one_computing(os.getpid(), signal.SIGSTOP))),
    )
    monkeypatch.setattr(thin, "WORKER_TIMEOUT", 6)
    assert train_here(photos, tmp_path) == 0
    assert "is lost (no answer in 6 s)" in capsys.readouterr().out
    stopped[0].wait(30)  # it is gone, not left behind stopped
    assert checksums(tmp_path) == undisturbed


def test_crashes_in_a_row_end_the_run_with_one_line(
    thin, cluster, photos, tmp_path, monkeypatch, capsys
):
    ended = threading.Event()

    def kill_all():
        while not ended.wait(0.01):
            for process in workers_of(os.getpid()):
                process.kill()

    at_iteration(monkeypatch, 2, in_a_thread(kill_all))
    try:
        assert train_here(photos, tmp_path) == 2
    finally:
        ended.set()
    assert re.fullmatch("error: .*\n", capsys.readouterr().err)


@pytest.fixture(scope="module")
def nodes(s3):
    """A cluster of two nodes of one CPU each, with object stores of their own."""
    size = {"num_cpus": 1, "object_store_memory": 300 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=size | NO_DASHBOARD)
    cluster.add_second = lambda: setattr(cluster, "second", cluster.add_node(**size))
    cluster.add_second()
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def contents(s3, photos):
    """What must be in the object store: every image of the bucket once, with its label."""
    labels = imagenet.read_labels(photos, "train.txt", 10)
    images, found = [], []
    for key in imagenet.list_tars(photos, "")[0]:
        tar = io.BytesIO(s3.get_object(Bucket=photos, Key=key)["Body"].read())
        decoded, names, _ = imagenet.decode_tar(tar, (256, 256))
        images.extend(decoded)
        found += [labels[name] for name in names]
    return f"{len(images)} images: {fingerprint(images, found)}"


@pytest.mark.parametrize("moment", ["Loading: 3 of 10", "Shuffle round 2", "Iteration 5: loss"])
def test_node_killed(nodes, photos, undisturbed, contents, tmp_path, moment):
    with thin_driver(photos, tmp_path, "WORKER_WAIT=60", address=nodes.address) as run:
        run.wait_for(moment)
        nodes.remove_node(nodes.second, allow_graceful=False)
        nodes.add_second()
        assert run.wait() == 0, run.output()
    fingerprints = re.findall(r"^\d+ images: \w{64}$", run.output(), re.M)
    assert set(fingerprints) == {contents} and len(fingerprints) >= 3
    assert checksums(tmp_path) == undisturbed


def test_run_goes_on_when_a_worker_cannot_come_back(nodes, photos, undisturbed, tmp_path):
    with thin_driver(photos, tmp_path, "ALL_UP_AT=20", address=nodes.address) as run:
        run.wait_for("Iteration 1: loss")
        nodes.remove_node(nodes.second, allow_graceful=False)
        run.wait_for("Iteration 15: loss")
        assert "1 of 2 go on" in run.output() and "is back" not in run.output()
        nodes.add_second()
        assert run.wait() == 0, run.output()
    assert "is back: 2 of 2" in run.output()
    assert checksums(tmp_path) == undisturbed


@pytest.mark.parametrize("moment", ["Loading: 3 of 10", "Iteration 13: loss"])
def test_driver_killed_resumes_to_the_same_weights(
    thin, cluster, photos, undisturbed, tmp_path, monkeypatch, capsys, moment
):
    with thin_driver(photos, tmp_path, "CHECKPOINT_EVERY=1") as run:  # it is always saving
        run.wait_for(moment)
        run.kill()
    for leftover in ("ckpt-99.data-00000-of-00001.tempstate123", "ckpt-99.data-00000-of-00001"):
        (tmp_path / leftover).write_bytes(b"half a save")
    # One worker computes both mini-batches of an iteration, as on a smaller cluster.
    monkeypatch.setattr(thin, "NUM_WORKERS", 1 if "loss" in moment else 2)
    assert train_here(photos, tmp_path) == 0
    assert ("Resumed from" in capsys.readouterr().out) == ("loss" in moment)
    assert checksums(tmp_path) == undisturbed


def test_interrupt_saves_and_the_run_resumes_from_s3(
    thin, cluster, photos, bucket, undisturbed, tmp_path, monkeypatch, capsys
):
    place = f"s3://{bucket}/runs/1"
    at_iteration(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_here(photos, place, 100_000) == 143
    output = capsys.readouterr()
    assert f"Stopped at iteration 6: checkpoints in {place}" in output.out
    assert "Traceback" not in output.err
    assert train_here(photos, place) == 0
    assert f"Resumed from {place} at iteration 6" in capsys.readouterr().out
    for key in ("data-00000-of-00001", "index"):
        name = f"ckpt-{ITERATIONS}.{key}"
        imagenet.S3Folder(place).download(name, tmp_path / name)
    imagenet.S3Folder(place).download("checkpoint", tmp_path / "checkpoint")
    assert checksums(tmp_path) == undisturbed


def test_second_interrupt_stops_at_once_and_leaves_nothing_running(photos, tmp_path):
    with thin_driver(photos, tmp_path, iterations=100_000) as run:
        run.wait_for("Iteration 3: loss")
        below = psutil.Process(run.pid).children(recursive=True)
        worker = hit_one_computing(run.pid, signal.SIGSTOP)  # this step would never end
        os.kill(run.pid, signal.SIGINT)
        run.wait_for("Stopping after this step")
        os.kill(run.pid, signal.SIGINT)
        assert run.wait(60) == 130, run.output()
        assert "Traceback" not in run.output()
        _, alive = psutil.wait_procs(below, timeout=30)
        assert worker not in alive and not alive


def test_loss_that_is_not_finite_ends_the_run(thin, cluster, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(thin, "LEARNING_RATE", 1e30)
    monkeypatch.setattr(thin, "CHECKPOINT_EVERY", 1)
    assert train_here(photos, tmp_path) == 2
    assert re.fullmatch(
        r"error: iteration \d+: the (loss|gradient) of mini-batch \d is not finite, on worker \d: "
        r"lower LEARNING_RATE\n",
        capsys.readouterr().err,
    )


def test_tar_that_changes_after_it_was_listed_is_noticed(
    thin, cluster, s3, photos, bucket, tmp_path, capsys
):
    s3.copy({"Bucket": photos, "Key": "train.txt"}, bucket, "train.txt")
    for key in imagenet.list_tars(photos, "")[0]:
        s3.copy({"Bucket": photos, "Key": key}, bucket, key)
    assert train_here(bucket, tmp_path, 1) == 0
    s3.put_object(Bucket=bucket, Key=key, Body=demo.make_tar({"n1500000_0.JPEG": b"changed"}))
    assert train_here(bucket, tmp_path, 2) == 2  # a resume would read other images
    assert re.search(r"^error: .*different are tars", capsys.readouterr().err, re.M)


@pytest.fixture(scope="module")
def many(s3):
    """A bucket of 600 images, which take 118 MB when they are decoded."""
    demo.fill_bucket(s3, "many", images_per_class=60)
    return "many"


def test_data_larger_than_the_object_store_spills(thin, cluster, many, tmp_path):
    size = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=size | NO_DASHBOARD)
    try:
        with thin_driver(many, tmp_path / "a", iterations=10, address=nodes.address) as run:
            assert run.wait() == 0, run.output()
    finally:
        nodes.shutdown()
    assert re.search("About [56]\\d\\d images: 0.1 GB .* 0.0 GB goes to disk", run.output())
    assert train_here(many, tmp_path / "b", 10) == 0
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")


def test_full_disk_is_one_clear_line(many, tmp_path):
    full = {"_system_config": {"local_fs_capacity_threshold": 0.001}}
    size = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=size | full | NO_DASHBOARD)
    try:
        with thin_driver(many, tmp_path, address=nodes.address) as run:
            assert run.wait() == 2, run.output()
    finally:
        nodes.shutdown()
    assert len(re.findall("^error: .*disk", run.output(), re.M)) == 1
    assert "Traceback" not in run.output()


def test_memory_stays_flat_over_1000_iterations(thin, cluster, photos, monkeypatch):
    draw, seen = functions.Helpers.draw_minibatches, {}

    def spy(self, batches, size, count, seed, iteration):
        if iteration in (100, 1000):
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            ours = [p for p in processes if p.pid == os.getpid() or title(p).startswith("ray::Worker")]
            free = ray.available_resources()["object_store_memory"]
            seen[iteration] = [p.memory_full_info().uss for p in ours], free  # the store not counted
        return draw(self, batches, size, count, seed, iteration)

    monkeypatch.setattr(functions.Helpers, "draw_minibatches", spy)
    monkeypatch.setattr(thin, "ACCURACY_EVERY", 10)
    monkeypatch.setattr(thin, "MINI_BATCH", 4)
    assert train(photos, "--iterations", 1001) == 0
    (early, early_free), (late, late_free) = seen[100], seen[1000]
    assert len(early) == len(late) == 3
    for before, after in zip(early, late, strict=True):
        assert after - before < 10 * 2**20
    assert early_free - late_free < 20 * 2**20
