"""A short fuzz: no hang, no crash, nothing lost before the damage; and the proof that it would tell."""

import random

from machinery.errors import ImageError
from machinery.storage import images
from tests import fuzz
from tests.support import decode_tar, draw_image, encode, make_tar, photo

import numpy as np
import pytest


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged images
@pytest.mark.parametrize("make, check", fuzz.KINDS)
def test_a_share_of_the_inputs(make, check):
    for seed in range(100):
        try:
            check(make(random.Random(seed)))
        except Exception as error:
            raise AssertionError(f"the input of seed {seed}") from error


IMAGE = fuzz.member(b"n0.JPEG", photo())
SPARSE = {"at386": fuzz.number_field(0) * 2, "at482": b"\1", "at483": fuzz.number_field(0)}
MENDED = {
    "negative size": fuzz.header(b"x", -512) + IMAGE,
    "size that is no number": fuzz.member(b"x", fuzz.record(b"size", b"-512"), b"x") + IMAGE,
    "negative size beyond any index": IMAGE + fuzz.header(b"x", -(2**87)),
    "cut header of a sparse file": IMAGE + fuzz.header(b"x", 0, b"S", **SPARSE),
    "long name of a damaged member": fuzz.member(b"x", b"long", b"L") + b"x" * 512 + IMAGE,
    "20,000 headers of one member": fuzz.header(b"x", 0, b"L") * 20_000 + IMAGE,
    "map that is no number": fuzz.member(b"x", fuzz.record(b"GNU.sparse.map", b"1e9"), b"x") + IMAGE,
    "size of all members": fuzz.member(b"x", fuzz.record(b"size", b"7"), b"g") + IMAGE,
    "a million digits": fuzz.member(b"x", b"1" * 10**6, b"x") + IMAGE,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tar", MENDED.values(), ids=MENDED)
def test_tar_that_once_was_a_finding(tar):
    """Each made decode_tar raise, hang, or lose the image."""
    _, names, left_out = decode_tar(tar, fuzz.SIZE)
    assert len(names) == 1 and left_out


def test_jpeg_of_too_many_scans():
    image = encode(draw_image(0, np.random.default_rng(0)), "JPEG", progressive=True)
    fuzz.check_image(image)
    last_scan = image[image.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="too many scans"):
        images.decode_image(image[:-2] + last_scan * images.MAX_SCANS + image[-2:], fuzz.SIZE)


WRONG = [
    lambda *three: [each[1:] for each in three],
    lambda images, names, out: (images, names[::-1], out),
]


@pytest.mark.parametrize("wrong", WRONG, ids=["lost", "swapped"])
def test_a_lost_image_or_a_swapped_name_is_a_finding(wrong):
    first, second, *_ = fuzz.intact_images()
    tar = make_tar({"n0.JPEG": first, "a/n1.JPEG": second})
    fuzz.check_tar(tar)
    with pytest.raises(AssertionError, match="an intact image is lost"):
        fuzz.check_tar(tar, lambda *arguments: wrong(*decode_tar(*arguments)))


def test_pixels_that_change_are_a_finding():
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError, match="not the same twice"):
        fuzz.check_image(b"", lambda data, size: rng.integers(0, 255, (*size, 3), np.uint8))


@pytest.mark.parametrize(
    "labels", [{"a.JPEG": 1, "b.JPEG": 1}, {"a.JPEG": 1, "b.JPEG": 2, "c.JPEG": 10}]
)
def test_wrong_labels_are_a_finding(labels):
    with pytest.raises(AssertionError):
        fuzz.check_labels(b"n1/a.JPEG 1\nn1/b.JPEG 2\n", lambda *_: labels)
