"""A folder of tars in the place of a bucket: the same data, and errors that name the file."""

import contextlib
import os

import imagenet
from machinery import ending
from machinery.errors import InputError
from tests.support import VALIDATED, checksums, drive, make_tar, noting_worker, photo, train_here

import numpy as np
import pytest
import ray

SIZE = [64, 64]


@pytest.fixture(scope="session")
def data(s3, photos, tmp_path_factory):
    """A folder that holds what the bucket of photos holds."""
    root = tmp_path_factory.mktemp("data")
    for listed in s3.list_objects(Bucket=photos)["Contents"]:
        (root / listed["Key"]).parent.mkdir(exist_ok=True)
        s3.download_file(photos, listed["Key"], str(root / listed["Key"]))
    return root


@pytest.fixture
def small(tmp_path):
    """A folder with one tar, of an image and of damage, and a label file."""
    root = tmp_path / "small"
    root.mkdir()
    (root / "a.tar").write_bytes(make_tar({"a.JPEG": photo(), "b.JPEG": b"no image"}))
    (root / "train.txt").write_text("n1/a.JPEG 1\n")
    return root


def read(place):
    """All that is read of a bucket or a folder, as driver.py does."""
    source = imagenet.source_of(place)
    tars, others = imagenet.list_tars(source, "ILSVRC2012_img_train/n0150000")
    labels = imagenet.read_labels(source, "train.txt", 10)
    keys = [(tar.key, tar.size) for tar in tars]
    loaded = imagenet.load_tarfiles_from_s3(source, tars, SIZE)
    loaded = imagenet.report_loading(imagenet.DataSet(source, "", "train.txt", tars), loaded)
    parts = [ray.get([part.images, part.filenames, part.report]) for part in loaded]
    images = np.concatenate([part[0] for part in parts])
    said = [part[1:] for part in parts]
    return images, (keys, others, labels, imagenet.estimate_images(source, tars), said)


def test_a_folder_is_read_as_a_bucket_is(one_ray, data, photos):
    images, rest = read(str(data))
    same, wanted = read(photos)
    assert rest == wanted and len(rest[0]) == 10
    np.testing.assert_array_equal(images, same)


def test_a_run_is_the_same_as_from_s3(thin, one_ray, data, undisturbed, tmp_path, capsys):
    """To the last bit. It resumes with the same tars only."""
    place, actor = f"file://{data}", noting_worker(tmp_path)
    assert train_here(place, tmp_path, actor=actor) == 0
    assert checksums(tmp_path) == undisturbed
    assert train_here(place, tmp_path, 31, *VALIDATED, actor=actor) == 0
    out = capsys.readouterr().out
    assert f"{data}/ILSVRC2012_img_train/n015*: 10 tars, 0 other keys left out\n" in out
    assert "120 images in 10 batches\n" in out and "Iteration 31 (epoch 2.6): validation" in out
    first = data / "ILSVRC2012_img_train" / "n01500000.tar"
    before = first.stat().st_mtime_ns
    os.utime(first, ns=(0, 0))
    try:
        assert train_here(place, tmp_path, 32, actor=actor) == 2
    finally:
        os.utime(first, ns=(before, before))
    assert "different are tars " in capsys.readouterr().err


def test_what_is_left_out_is_named_by_its_file(thin, one_ray, small, tmp_path, capsys):
    flags = ["--s3-bucket", small, "--key-prefix", "", "--iterations", 1]
    assert drive(flags, actor=noting_worker(tmp_path)) == 0
    assert f"{small}/a.tar: 1 left out: b.JPEG: no image\n" in capsys.readouterr().out


HINT = "check its name and rights, and that every node sees the folder"


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--key-prefix", "x/"],
            ": no key with the prefix 'x/' ends in .tar; there are: a.tar, train.txt",
        ),
        (
            ["--key-prefix", "/"],
            ": no key with the prefix '/' ends in .tar; there are: a.tar, train.txt",
        ),
        (["--label-file", "no.txt"], f"/no.txt: No such file or directory; {HINT}"),
        (["--label-file", "a.tar"], "/a.tar, line "),
    ],
)
def test_flags_that_name_nothing_usable(thin, one_ray, small, capsys, flags, message):
    flags = ["--s3-bucket", small, "--key-prefix", "", *flags]
    assert drive(flags) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {small}{message}") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["{}/none", "file://{}/none", "file://data", "{}/small/a.tar"])
def test_a_name_of_no_folder(small, name):
    name = name.format(small.parent)
    with pytest.raises(InputError) as caught:
        imagenet.source_of(name)
    assert str(caught.value) == f"--s3-bucket {name}: no such folder; name it by its full path"


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}: no key .* ends in .tar; the folder is empty$"):
        imagenet.list_tars(imagenet.source_of(f"{tmp_path}/"), "")


def test_a_folder_within_that_cannot_be_listed_is_no_empty_one(small, monkeypatch):
    (small / "secret").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError) as caught:
        imagenet.list_tars(imagenet.source_of(str(small)), "")
    assert str(caught.value) == f"{small}/secret: Permission denied; {HINT}"


def rewritten(path):
    """Other bytes, and no more of them."""
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(0, 0))


def longer(path):
    with path.open("ab") as file:
        file.write(bytes(512))


CHANGED = "has changed since it was listed: start again"


@pytest.mark.parametrize(
    "change, why",
    [
        (rewritten, CHANGED),
        (longer, CHANGED),
        (os.unlink, f"No such file or directory; {HINT}"),
    ],
)
def test_a_tar_that_changes_after_it_was_listed(one_ray, small, change, why):
    data = imagenet.find(imagenet.source_of(str(small)), "", "train.txt")
    change(small / "a.tar")
    loaded = imagenet.load_tarfiles_from_s3(data.source, data.tars, SIZE)
    with pytest.raises(InputError) as caught, ending.Stop():
        imagenet.report_loading(data, loaded)
    assert str(caught.value) == f"{small}/a.tar: {why}"


@pytest.mark.parametrize("change", [rewritten, longer])
def test_a_tar_that_changes_while_it_is_read(small, change):
    source = imagenet.source_of(str(small))
    [tar], _ = imagenet.list_tars(source, "")
    with contextlib.closing(source.open(tar)) as file:
        assert file.read(6) == b"a.JPEG"
        change(small / "a.tar")
        with pytest.raises(InputError) as caught:
            file.read(512)
    assert str(caught.value) == f"{small}/a.tar: {CHANGED}"
