"""Places for results: what they may be, what is tried at the start, and what is never touched."""

import contextlib
import io
import os
import resource
import sys
from pathlib import Path

import alexnet
import driver
from machinery import results
from machinery.errors import InputError
from machinery.storage import places
from machinery.storage.checkpoints import Checkpoints, Facts
from machinery.storage.export import SavedModel
from machinery.storage.tf1 import tf
from tests.support import THIN, drive

import numpy as np
import pytest

MEAN = np.zeros((256, 256, 3), np.float32)

FACTS = Facts(mini_batches=1, precision="float32")


@pytest.fixture(scope="module")
def network():
    """The thin network, with weights."""
    made = alexnet.AlexNet(THIN, 10, rule=driver.update_rule(10))
    made.restore(made.initial_state("he", np.random.default_rng(0)), 0)
    return made


# ---- what a place may be


@pytest.mark.parametrize(
    "place", ["gs://b/x", "s3a://b", "hdfs://h/x", "s3:/b/x", "s3://", "file:///x"]
)
@pytest.mark.parametrize("flag", ["--checkpoint-dir", "--export-dir", "--log-dir"])
def test_kinds_that_are_not_supported(one_ray, tmp_path, monkeypatch, capsys, flag, place):
    """No folder is made that is called like one."""
    monkeypatch.chdir(tmp_path)
    assert drive([flag, place]) == 2
    kinds = "name a local folder" if flag == "--log-dir" else "name a folder or s3://bucket/prefix"
    assert capsys.readouterr().err == f"error: {flag} {place}: {kinds}\n"
    assert not list(tmp_path.iterdir())


def test_spellings_that_are_understood(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    s3 = f"S3://{bucket}/x", f"s3://{bucket}/x"
    for place, meant in s3, ("~/ck", f"{tmp_path}/ck"), ("a:b", "a:b"):
        assert places.open_place("--export-dir", place).place == meant
    assert {path.name for path in tmp_path.iterdir()} == {"ck", "a:b"}


def test_folders_that_a_ray_job_throws_away(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    for place in ("saved", "./saved", str(copy / "saved")):
        with pytest.raises(InputError, match="a copy|job's copy of its working directory"):
            places.open_place("--checkpoint-dir", place)
    assert not list(copy.iterdir())
    assert places.open_place("--checkpoint-dir", str(tmp_path)).place == str(tmp_path)


# ---- S3-compatible stores


@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
@pytest.mark.parametrize("flag", ["--checkpoint-dir", "--export-dir"])
def test_rights_that_are_missing_are_told_at_the_start(one_ray, bucket, proxy, capsys, flag, method):
    proxy.always[method] = "403"
    assert drive([flag, f"s3://{bucket}/x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: s3://{bucket}/x/") and "access denied" in error


def is_plain(request):
    """Whether a simple S3-compatible store knows such a request: no parts, no checksums, no chunks."""
    of_parts = request.method == "POST" or "upload" in request.path
    names = " ".join(request.headers).lower()
    chunked = "aws-chunked" in request.headers.get("Content-Encoding", "")
    return not (of_parts or chunked or "checksum" in names or "trailer" in names)


def test_results_need_plain_requests_alone(s3, bucket, proxy, network):
    """A checkpoint of more than boto3 puts in one piece by itself, and an export."""
    place = f"s3://{bucket}/x"
    saved = Checkpoints(place)
    saved.claim(FACTS)
    large = places.S3Folder(place)
    (large.path / "large").write_bytes(bytes(20 * 2**20))
    large.upload("large")
    network.iteration = 1
    saved.save(network, FACTS, MEAN)
    saved.wait()
    assert saved.saved == 1
    SavedModel(place).write(network, MEAN)
    assert Checkpoints(place).start().facts.iteration == 1
    assert len(proxy.requests) > 20 and all(map(is_plain, proxy.requests))


# ---- what this program has not written


def foreign_checkpoint(folder, name):
    """Write what another TensorFlow program saves."""
    with tf.Graph().as_default(), tf.Session() as session:
        variable = tf.get_variable("x", [3])
        session.run(tf.global_variables_initializer())
        return tf.train.Saver([variable]).save(session, str(folder / name))


@pytest.mark.parametrize("name", ["ckpt-5", "model.ckpt-5"])
@pytest.mark.parametrize("remote", [False, True])
def test_checkpoints_of_another_program_are_never_touched(s3, bucket, tmp_path, name, remote):
    foreign_checkpoint(tmp_path, name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    place = f"s3://{bucket}/x" if remote else str(tmp_path)
    if remote:
        for path, data in before.items():
            s3.put_object(Bucket=bucket, Key=f"x/{path.name}", Body=data)
    which = r"(checkpoint|ckpt-5\..*)" if name == "ckpt-5" else "checkpoint"
    why = f"{which} there is another program's; name another place"
    with pytest.raises(InputError, match=f"^--checkpoint-dir {place}: {why}$"):
        Checkpoints(place)
    if remote:
        listed = s3.list_objects_v2(Bucket=bucket)["Contents"]
        assert sorted(obj["Key"] for obj in listed) == sorted(f"x/{path.name}" for path in before)
    else:
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def save_all(checkpoints, network, iterations):
    for network.iteration in iterations:
        checkpoints.save(network, FACTS, MEAN)
    checkpoints.wait()
    checkpoints.close()


def test_damaged_checkpoints_are_not_deleted_until_they_are_made_again(network, tmp_path):
    save_all(Checkpoints(str(tmp_path)), network, [1])
    for number in (2, 3, 9):
        for file in (f"ckpt-{number}.index", f"ckpt-{number}.data-00000-of-00001"):
            (tmp_path / file).write_bytes(b"damaged")
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.start().facts.iteration == 1
    save_all(checkpoints, network, range(3, 7))
    left = sorted(path.stem for path in tmp_path.glob("*.index"))
    assert left == ["ckpt-2", "ckpt-4", "ckpt-5", "ckpt-6", "ckpt-9"]


@pytest.mark.parametrize("remote", [False, True])
def test_other_files_beside_checkpoints_do_not_matter(network, s3, bucket, tmp_path, remote):
    """Such as logs, and an export."""
    place = f"s3://{bucket}/x" if remote else str(tmp_path)
    others = ("notes.txt", "saved_model.pb", "ckpt-1", "my-checkpoint")
    for name in others:
        (tmp_path / name).write_text("x")
        s3.put_object(Bucket=bucket, Key=f"x/{name}", Body=b"x")
    for iteration in (1, 2):
        checkpoints = Checkpoints(place)
        assert checkpoints.start().facts.iteration == iteration - 1
        checkpoints.claim(FACTS)
        save_all(checkpoints, network, [iteration])
    keys = [obj["Key"] for obj in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    assert {f"x/{name}" for name in others} <= set(keys)
    assert all((tmp_path / name).read_text() == "x" for name in others)


@pytest.mark.parametrize("remote", [False, True])
def test_a_model_of_another_program_is_not_replaced(s3, bucket, tmp_path, remote):
    with tf.Graph().as_default(), tf.Session() as session:
        x = tf.placeholder(tf.float32, [3])
        tf.saved_model.simple_save(session, str(tmp_path / "model"), {"x": x}, {"y": x + 1})
    data = (tmp_path / "model" / "saved_model.pb").read_bytes()
    place = f"s3://{bucket}/x" if remote else str(tmp_path / "model")
    s3.put_object(Bucket=bucket, Key="x/saved_model.pb", Body=data)
    why = r"(saved_model.pb|variables.*|fingerprint.pb) there is another program's"
    with pytest.raises(InputError, match=f"^--export-dir {place}: {why}; name another place$"):
        SavedModel(place)
    assert (tmp_path / "model" / "saved_model.pb").read_bytes() == data


@pytest.mark.parametrize("remote", [False, True])
def test_exports_of_before_there_was_a_mark_are_replaced(network, s3, bucket, tmp_path, remote):
    place = f"s3://{bucket}/x" if remote else str(tmp_path)
    SavedModel(place).write(network, MEAN)
    if remote:
        s3.delete_object(Bucket=bucket, Key="x/exported-by-driver")
    else:
        (tmp_path / "exported-by-driver").unlink()
    model = SavedModel(place)
    with pytest.raises(InputError, match="keeps that of an earlier run"):
        model.write(network, MEAN, keep=True)
    model.write(network, MEAN)


# ---- exports


def test_an_export_into_a_folder_that_cannot_be_replaced(network, tmp_path):
    """Such as a mount point: the folder stays, and what else is in it."""
    place = tmp_path / "volume"
    place.mkdir()
    (place / "lost+found").mkdir()
    before = place.stat().st_ino
    tmp_path.chmod(0o555)
    try:
        for mean in (MEAN, MEAN + 100):
            SavedModel(str(place)).write(network, mean)
            model = tf.saved_model.load_v2(str(place)).signatures["serving_default"]
            given = model(tf.constant(np.zeros((1, 256, 256, 3), np.uint8)))["probabilities"].numpy()
            assert np.isclose(given.sum(), 1, atol=1e-5)
    finally:
        tmp_path.chmod(0o755)
    assert place.stat().st_ino == before
    names = {path.name for path in place.iterdir()}
    ours = {"saved_model.pb", "variables", "exported-by-driver"}
    assert names - {"fingerprint.pb"} == {"lost+found"} | ours


def test_an_export_that_was_killed_is_made_anew(network, tmp_path):
    place = tmp_path / "x"
    (place / "variables").mkdir(parents=True)
    (place / "notes.txt").touch()
    with pytest.raises(InputError, match="variables there is another program's"):
        SavedModel(str(place))
    assert {path.name for path in place.iterdir()} == {"variables", "notes.txt"}  # it stays as it is
    (place / ".export-1").mkdir()
    SavedModel(str(place)).write(network, MEAN)
    assert (place / "saved_model.pb").exists() and (place / "notes.txt").exists()
    assert not (place / ".export-1").exists()


def test_an_export_on_a_full_disk_says_why_and_leaves_the_old_one(network, tmp_path):
    place = str(tmp_path / "x")
    SavedModel(place).write(network, MEAN)
    before = {path: path.read_bytes() for path in Path(place).rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError) as caught:
            SavedModel(place).write(network, MEAN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"--export-dir {place}: File too large"
    assert {path: path.read_bytes() for path in Path(place).rglob("*") if path.is_file()} == before


# ---- standard output


@contextlib.contextmanager
def output_to(file):
    """Standard output goes to the file of a number."""
    with pytest.MonkeyPatch.context() as patch, os.fdopen(file, "w") as stream:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "__stdout__", stream)
        yield


def test_lines_that_cannot_be_written_are_lost_and_counted(tmp_path):
    report, there = results.Report(), os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    with output_to(full := os.open("/dev/full", os.O_WRONLY)):
        report.say("first")
        report.say("second")
        os.dup2(there, full)
        report.say("third")
        report.say("fourth")
    lost = "2 lines are lost: standard output could not be written"
    assert (tmp_path / "out").read_text().splitlines() == ["", lost, "third", "fourth"]


def test_output_that_nobody_reads_ends_the_run_and_then_all_is_thrown_away():
    reader, writer = os.pipe()
    os.close(reader)
    with output_to(writer):
        with pytest.raises(BrokenPipeError):
            results.Report().say("first")
        results.Report().say("second")


@pytest.mark.parametrize(
    "encoding, said", [("ascii", b"n\\xe9 \\udc80\n"), ("utf-8", b"n\xc3\xa9 \\udc80\n")]
)
def test_letters_that_the_output_does_not_have_are_escaped(monkeypatch, encoding, said):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        results.Report().say("n\u00e9 \udc80")
    assert stream.buffer.getvalue() == said
