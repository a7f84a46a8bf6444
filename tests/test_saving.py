"""Whatever ends a run or fails in its saves: the last whole step is saved, the last line is true."""

import contextlib
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

from machinery.storage import places
from machinery.storage.checkpoints import Checkpoints
from tests.fault_proxy import fault_proxy
from tests.moments import At
from tests.support import (
    ITERATIONS,
    ROOT,
    VALIDATED,
    assert_clean,
    checksums,
    noting_worker,
    train,
    train_elsewhere,
    train_here,
    wait_until,
    workers_of,
)

import psutil
import pytest


def send(signum):
    """A function that signals this process."""
    return lambda: os.kill(os.getpid(), signum)


def send_in_the_middle(signum):
    """A function that stops all workers, so that what they compute never ends, and then signals."""

    def stop():
        for process in workers_of(os.getpid()):
            process.send_signal(signal.SIGSTOP)
        threading.Timer(1, send(signum)).start()

    return stop


def fetch_newest(place, folder):
    """Download the last checkpoint of a whole run from S3."""
    there = places.S3Folder(place)
    for name in (f"ckpt-{ITERATIONS}.data-00000-of-00001", f"ckpt-{ITERATIONS}.index", "checkpoint"):
        there.download(name)
        shutil.copy(there.path / name, folder)


# ---- signals

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
MOMENTS = [  # a signal, the moment, what it does there, and the iteration that is saved
    (TERM, "Shuffle round 2", send(TERM), 0),
    (HUP, (4, "broadcast"), send_in_the_middle(HUP), 4),
    (TERM, (7, "apply"), send(TERM), 8),
    (INT, (10, "broadcast"), send_in_the_middle(INT), 10),  # in a validation
]


@pytest.mark.timeout(400)
def test_signals_at_any_moment_keep_the_last_whole_step(
    thin, one_ray, photos, undisturbed, tmp_path, monkeypatch, capsys
):
    """One run, which is resumed after each signal."""
    monkeypatch.setattr(thin, "VALIDATE_EVERY", 10)
    before = 0
    for signum, moment, act, saved in MOMENTS:
        handler = signal.getsignal(signum)
        hooks = {"report": At({moment: act}), "actor": noting_worker(tmp_path)}
        assert train_here(photos, tmp_path, ITERATIONS, *VALIDATED, **hooks) == 128 + signum
        assert signal.getsignal(signum) == handler
        out, err = capsys.readouterr()
        assert err == "" and ("Resumed" in out) == (before > 0)
        assert out.splitlines()[-1] == (
            f"Stopped at iteration {saved}: checkpoints in {tmp_path}"
            if saved
            else "Shuffle round 2 of 5 done"
        )
        newest = sorted(path.stem for path in tmp_path.glob("*.index"))
        assert f"ckpt-{saved}" in newest or not saved
        before = saved
    monkeypatch.setattr(thin, "NUM_WORKERS", 1)  # which computes both mini-batches
    assert train_here(photos, tmp_path, ITERATIONS, *VALIDATED, actor=noting_worker(tmp_path)) == 0
    assert f"Resumed from {tmp_path} at iteration {before}\n" in capsys.readouterr().out
    assert checksums(tmp_path) == undisturbed


def test_signal_while_a_save_goes_to_s3_waits_for_it_and_exports(
    thin, one_ray, photos, bucket, undisturbed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(thin, "CHECKPOINT_EVERY", 5)
    place, export = f"s3://{bucket}/runs/1", tmp_path / "network"
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        # So the save of iteration 5 goes on while the signal comes.
        proxy.always["PUT"] = lambda: threading.Event().wait(0.5)
        flags, actor = ["--export-dir", export], {"actor": noting_worker(tmp_path)}
        report = At({(6, "compute"): send(TERM)})
        assert train_here(photos, place, 100_000, *flags, report=report, **actor) == 143
        del proxy.always["PUT"]
        out, err = capsys.readouterr()
        assert re.findall(r"^Iteration (\d+): loss", out, re.M) == list("012345") and err == ""
        assert out.endswith(f"Stopped at iteration 6: checkpoints in {place}, network in {export}\n")
        assert (export / "saved_model.pb").exists()
        assert train_here(photos, place, **actor) == 0
        fetch_newest(place, tmp_path)
    assert f"Resumed from {place} at iteration 6" in capsys.readouterr().out
    assert checksums(tmp_path) == undisturbed


def test_second_signal_waits_for_nothing_and_leaves_no_worker(one_ray, photos, bucket, tmp_path):
    """A save goes on, and will not end."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, contextlib.ExitStack() as for_ever:
        environment = {"AWS_ENDPOINT_URL": proxy.url}
        place, settings = f"s3://{bucket}/runs/1", ["PAUSES=[(3, 'compute')]", f"NOTES='{tmp_path}'"]
        training = train_elsewhere(photos, place, one_ray, *settings, environment=environment)
        with training as run, run.paused(3, "compute"):
            held = for_ever.enter_context(proxy.held("PUT"))
            workers = workers_of(os.getpid())
            os.kill(run.pid, signal.SIGINT)
            wait_until(held)  # it saves
            os.kill(run.pid, signal.SIGTERM)
            assert run.wait(15) == 143, run.output()
    assert_clean(run.output())
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def test_run_whose_output_nobody_reads_any_more_ends_quietly(one_ray, photos, tmp_path):
    """As with a pipe to `head`: what is trained is saved."""
    flags = ["--s3-bucket", photos, "--checkpoint-dir", tmp_path]
    settings = "NUM_WORKERS=1", f"NOTES='{tmp_path}'"
    command = [sys.executable, "-u", ROOT / "tests" / "thin_driver.py", *settings, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"RAY_ADDRESS": one_ray}
    with subprocess.Popen(command, env=environment, **pipes) as run:
        while not run.stdout.readline().startswith("Iteration 2: loss"):
            assert run.poll() is None
        run.stdout.close()
        assert run.wait(60) == 141
        assert run.stderr.read() == ""
    assert Checkpoints(str(tmp_path)).start().facts.iteration > 2


# ---- saves that fail


def test_saves_that_a_disk_refuses_for_a_while_and_lost_curves(one_ray, photos, undisturbed, tmp_path):
    """As on a full disk, no file may be longer than 100 kB for a while, which curves never are."""
    full, free, curves = (3, "apply"), (6, "apply"), tmp_path / "curves"
    settings = [f"PAUSES={[full, free]}", "CHECKPOINT_EVERY=1", f"NOTES='{tmp_path}'"]
    flags, saved = ["--log-dir", curves], tmp_path / "saved"
    with train_elsewhere(photos, saved, one_ray, *settings, flags=flags) as run:
        limit = psutil.Process(run.pid).rlimit
        with run.paused(*full):
            limit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with run.paused(*free):
            assert (saved / "ckpt-3.index").exists() and not (saved / "ckpt-4.index").exists()
            limit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            shutil.rmtree(curves)
            curves.write_text("a file in its place")
        assert run.wait() == 3, run.output()
    out = run.output()
    refused = re.findall(
        r"^The checkpoint of iteration (\d+) is not saved: --checkpoint-dir .*$", out, re.M
    )
    assert refused == list("456")
    assert len(re.findall("curves are lost while that lasts, training goes on$", out, re.M)) == 1
    assert out.endswith(
        f"Stopped at iteration {ITERATIONS}: checkpoints in {saved}; not saved: curves in {curves}\n"
        "[end]"
    )
    assert_clean(out)
    assert checksums(saved) == undisturbed


def test_saves_that_s3_refuses_for_a_while_and_at_the_end(
    thin, one_ray, photos, bucket, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(thin, "CHECKPOINT_EVERY", 1)
    place = f"s3://{bucket}/runs/1"
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        refuse = functools.partial(proxy.always.update, PUT="403")
        moments = {(2, "apply"): refuse, (5, "apply"): proxy.always.clear, (8, "apply"): refuse}
        hooks = {"report": At(moments), "actor": noting_worker(tmp_path)}
        assert train_here(photos, place, 10, **hooks) == 3
        out, err = capsys.readouterr()
        assert err == ""
        refused = (
            rf"^The checkpoint of iteration (\d+) is not saved: s3://{bucket}/.*: access denied.*$"
        )
        tried = [int(number) for number in re.findall(refused, out, re.M)]
        assert tried[-1] == 10 and {4} <= set(tried) <= {2, 3, 4, 5, 8, 9, 10}
        saved = max({7, 8} - set(tried))
        assert out.endswith(
            f"Stopped at iteration 10: checkpoints in {place}; "
            f"not saved: the iterations after {saved}\n"
        )
        proxy.always.clear()
        assert Checkpoints(place).start().facts.iteration == saved


def test_output_to_a_disk_that_is_full_for_a_while(thin, one_ray, photos, tmp_path, monkeypatch):
    """Its file can grow by half a line for a while; other files are far from that size."""
    start, limits = 2**26, resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "out").open("w") as out:
        out.seek(start)

        def fill():
            most = os.fstat(out.fileno()).st_size + 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))

        def free():
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        hooks = {
            "report": At({(3, "apply"): fill, (6, "apply"): free}),
            "actor": noting_worker(tmp_path),
        }
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "__stdout__", out)
            try:
                assert train(photos, "--iterations", 9, **hooks) == 0
            finally:
                free()
    lines = (tmp_path / "out").read_bytes()[start:].decode().splitlines()
    [there] = [number for number, line in enumerate(lines) if " lost: " in line]
    assert re.match("Iteration 3: loss", lines[there - 1]) and len(lines[there - 1]) == 20
    # The losses of 3, 4 and 5, the accuracies of 4 and 6.
    assert lines[there] == "5 lines are lost: standard output could not be written"
    said = [re.match(r"Iteration (\d: \w+) = ", line)[1] for line in lines[there + 1 : -1]]
    assert said == ["6: loss", "7: loss", "8: accuracy", "8: loss"]
    assert lines[-1] == "Stopped at iteration 9: nothing is saved"


# ---- errors that end a run


def test_run_that_an_error_ends_leaves_its_last_whole_step(
    thin, one_ray, photos, tmp_path, monkeypatch, capsys
):
    """Every worker is killed; then, in another run, the loss is not finite."""
    ended, network = threading.Event(), tmp_path / "network"

    def kill_all():
        while not ended.wait(0.01):
            for process in workers_of(os.getpid()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    killer = threading.Thread(target=kill_all)
    try:
        report = At({(3, "broadcast"): killer.start})
        flags = [ITERATIONS, "--export-dir", network]
        actor = noting_worker(tmp_path)
        assert train_here(photos, tmp_path / "1", *flags, report=report, actor=actor) == 2
    finally:
        ended.set()
        killer.join()
    out, err = capsys.readouterr()
    [ended_at] = re.fullmatch("error: iteration (\\d+): no worker is left.*\n", err).groups()
    left = f"checkpoints in {tmp_path}/1, network in {network}"
    assert out.endswith(f"Stopped at iteration {ended_at}: {left}\n")
    exported = (network / "saved_model.pb").stat().st_mtime_ns

    monkeypatch.setattr(thin, "LEARNING_RATE", 1e30)
    assert train_here(photos, tmp_path / "2", *flags) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"error: iteration \d: the (loss|gradient) of mini-batch \d is not finite, on worker \d: "
        r"lower LEARNING_RATE, and remove this iteration's checkpoint\n",
        err,
    )
    steps = len(re.findall("^Iteration .: loss", out, re.M))
    assert re.search(
        f"^The network is not exported: {network} keeps that of an earlier run$", out, re.M
    )
    left = f"checkpoints in {tmp_path}/2; not saved: network in {network}"
    assert out.endswith(f"Stopped at iteration {steps}: {left}\n")
    assert (network / "saved_model.pb").stat().st_mtime_ns == exported
    assert [path.stem for path in (tmp_path / "2").glob("*.index")] == [f"ckpt-{steps}"]


def test_an_error_of_the_program_itself_is_raised_and_leaves_no_thread(thin, one_ray, photos, tmp_path):
    """One that calls Ray after its end would end the process before the traceback is printed."""
    before, left = set(threading.enumerate()), None
    try:
        report = At({"Shuffle round 1": lambda: 1 / 0})
        train_here(photos, tmp_path, report=report, actor=noting_worker(tmp_path))
    except ZeroDivisionError:  # which still holds all that the run had
        left = set(threading.enumerate()) - before
    wait_until(lambda: not any("ask" in thread.name and thread.is_alive() for thread in left))


# ---- two runs on one place


def test_second_run_on_a_folder_is_refused_until_the_first_is_dead(
    thin, one_ray, photos, undisturbed, tmp_path, monkeypatch, capsys
):
    settings = ["CHECKPOINT_EVERY=1", "PAUSES=[(2, 'apply')]", f"NOTES='{tmp_path}'"]
    with train_elsewhere(photos, tmp_path, one_ray, *settings) as run:
        with run.paused(2, "apply"):
            assert train_here(photos, tmp_path) == 2
            why = f"--checkpoint-dir {tmp_path}: another run saves here"
            assert capsys.readouterr().err == f"error: {why}\n"
        run.wait_for("Iteration 13: loss")
        run.kill()  # it is always saving
    for leftover in ("ckpt-99.data-00000-of-00001.tempstate123", "ckpt-99.data-00000-of-00001"):
        (tmp_path / leftover).write_bytes(b"half a save")
    monkeypatch.setattr(thin, "NUM_WORKERS", 1)  # which computes both mini-batches
    assert train_here(photos, tmp_path, actor=noting_worker(tmp_path)) == 0
    assert re.search(f"^Resumed from {tmp_path} at iteration 1.$", capsys.readouterr().out, re.M)
    assert checksums(tmp_path) == undisturbed


def test_second_run_on_a_place_in_s3_has_it_from_then_on(
    thin, one_ray, s3, photos, bucket, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(thin, "NUM_WORKERS", 1)
    place = f"s3://{bucket}/runs/1"
    settings = ["NUM_WORKERS=1", "CHECKPOINT_EVERY=1", "PAUSES=[(2, 'apply')]", f"NOTES='{tmp_path}'"]
    with train_elsewhere(photos, place, one_ray, *settings, iterations=5) as run:
        with run.paused(2, "apply"):
            assert train_here(photos, place, 9, actor=noting_worker(tmp_path)) == 0
            assert f"Resumed from {place} at iteration 2" in capsys.readouterr().out
            keys = {obj["Key"]: obj["ETag"] for obj in s3.list_objects_v2(Bucket=bucket)["Contents"]}
        assert run.wait() == 3, run.output()
    now = {obj["Key"]: obj["ETag"] for obj in s3.list_objects_v2(Bucket=bucket)["Contents"]}
    assert now == keys and "runs/1/ckpt-9.index" in keys
    line = rf"^The checkpoint of iteration (\d) is not saved: {place}: another run saves here now$"
    assert re.findall(line, run.output(), re.M) == ["3", "4", "5"]
    assert_clean(run.output())
