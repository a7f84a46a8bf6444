"""What is done once all iterations are made: evaluation and export; and the best checkpoint."""

import contextlib
import functools
import io
import re
import shutil

from machinery.storage.tf1 import tf
from tests.moments import At
from tests.support import VALIDATED, checksums, noting_worker, thin_constants, train_here

import pytest


@pytest.fixture(scope="module")
def trained(one_ray, photos, tmp_path_factory):
    """The folder of a run of four iterations, validated at 2 and 4, and its lines about that."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        thin_constants(patch)
        patch.setattr("driver.VALIDATE_EVERY", 2)
        patch.setattr("driver.CHECKPOINT_EVERY", 2)
        assert train_here(photos, folder, 4, *VALIDATED) == 0
    return folder, re.findall("^Iteration . .*: validation .*$", out.getvalue(), re.M)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(trained[0], tmp_path / "copied")


def files(folder):
    """The bytes of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_kept_iteration_gives_the_figure_that_training_gave(
    thin, s3, photos, bucket, proxy, trained, monkeypatch, capsys
):
    """From S3, on one worker. Not even the keys of the training set are listed."""
    folder, validations = trained
    for path in folder.iterdir():
        s3.upload_file(str(path), bucket, f"run/{path.name}")
    monkeypatch.setattr(thin, "NUM_WORKERS", 1)
    place = f"s3://{bucket}/run"
    for iteration in (2, 4):
        assert train_here(photos, place, iteration, *VALIDATED) == 0
        lines = capsys.readouterr().out.splitlines()
        about = f"this is about iteration {iteration}"
        assert lines[0] == f"Nothing to train: {place} has iteration 4 already; {about}"
        assert lines[-2:] == [
            validations[iteration // 2 - 1],
            f"Stopped at iteration {iteration}: checkpoints in {place}",
        ]
    read = {request.path for request in proxy.requests if "img_train" in request.path}
    assert read and all("n01500003" in path for path in read)
    keys = {obj["Key"] for obj in s3.list_objects_v2(Bucket=bucket)["Contents"]}
    assert keys == {f"run/{path.name}" for path in folder.iterdir()}


def test_an_export_needs_no_worker_and_another_held_out_set_will_do(
    thin, one_ray, photos, trained, tmp_path, capsys
):
    folder, network = trained[0], tmp_path / "network"
    assert train_here(photos, folder, 3, "--export-dir", network, actor=None) == 0
    exported = tf.train.load_checkpoint(str(network / "variables" / "variables"))
    saved = tf.train.load_checkpoint(str(folder / "ckpt-2"))
    for name in exported.get_variable_to_shape_map():
        assert (exported.get_tensor(name) == saved.get_tensor(name)).all()
    others = ["--val-prefix", "ILSVRC2012_img_train/n01500004", *VALIDATED[2:]]
    actor = noting_worker(tmp_path, [(4, 9)])
    assert train_here(photos, folder, 4, "--export-dir", network, *others, actor=actor) == 0
    out = capsys.readouterr().out
    assert "\nIteration 4 (epoch 0.3): validation top-1 = 75.0%, top-5 = 75.0%\n" in out
    assert out.endswith(f"Stopped at iteration 4: checkpoints in {folder}, network in {network}\n")


def test_without_anything_to_do_one_line_says_so(thin, one_ray, photos, trained, capsys):
    folder = trained[0]
    before = files(folder)
    for iterations in (1, 3, 4):
        assert train_here(photos, folder, iterations) == 0
        line = f"Nothing to train: {folder} has iteration 4 already; --iterations can be more\n"
        assert capsys.readouterr().out == line
    assert files(folder) == before
    assert train_here(photos, folder, 1, *VALIDATED) == 2
    why = f"{folder}: no intact checkpoint up to iteration 1 is kept; there are 2, 4"
    assert capsys.readouterr().err == f"error: {why}\n"


def test_of_damaged_checkpoints_the_newest_intact_one(thin, one_ray, photos, copied, tmp_path, capsys):
    """It is evaluated; a run that has nothing to evaluate makes the others again."""
    actor = noting_worker(tmp_path, [(2, 9)])
    (copied / "ckpt-4.data-00000-of-00001").write_bytes(b"damaged")
    assert train_here(photos, copied, 4, *VALIDATED, actor=actor) == 0
    out = capsys.readouterr().out
    assert "ckpt-4 is damaged" in out and "\nIteration 2 (epoch 0.2): validation top-1 = 75.0%" in out
    assert f"Nothing to train: {copied} has iteration 4 already; this is about iteration 2\n" in out
    assert train_here(photos, copied, 4, actor=actor) == 0
    assert f"Resumed from {copied} at iteration 2\n" in capsys.readouterr().out
    assert len(checksums(copied)) == 32


def test_the_best_is_the_same_after_crashes(thin, one_ray, photos, tmp_path, monkeypatch, capsys):
    """A copy of the folder stands for what a crash would have left."""
    monkeypatch.setattr(thin, "VALIDATE_EVERY", 3)
    monkeypatch.setattr(thin, "CHECKPOINT_EVERY", 5)
    moments = (6, "broadcast"), (16, "broadcast")
    saved = tmp_path / "saved"

    def crash(iteration, phase):
        copy = tmp_path / f"{iteration}-{phase}"
        with contextlib.suppress(shutil.Error):  # a file that was renamed in this moment
            return shutil.copytree(saved, copy)
        shutil.rmtree(copy)
        return crash(iteration, phase)

    actor = noting_worker(tmp_path, [(3, 5), (6, 9), (9, 7), (12, 9)])
    report = At({moment: functools.partial(crash, *moment) for moment in moments})
    assert train_here(photos, saved, 22, *VALIDATED, report=report, actor=actor) == 0
    best = r"\(best: top-1 75.0% at iteration 6\)"
    last = rf"Stopped at iteration 22: checkpoints in .* {best}"
    assert re.fullmatch(last, capsys.readouterr().out.splitlines()[-1])
    for moment in moments:
        folder = tmp_path / f"{moment[0]}-{moment[1]}"
        assert train_here(photos, folder, 22, *VALIDATED, actor=actor) == 0
        assert re.fullmatch(last, capsys.readouterr().out.splitlines()[-1])
        kept = sorted(path.stem for path in folder.glob("*.index"))
        assert kept == ["ckpt-15", "ckpt-20", "ckpt-22", "ckpt-6"]
