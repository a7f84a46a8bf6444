"""A share of the fuzzer's inputs, and the proof that it finds what it looks for."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import decoding
from tests import fuzz
from tests.support import decode_tar, draw_image, encode, make_tar, photo


def test_a_share_of_the_inputs():
    assert fuzz.run(inputs=500, seed=0) == []


IMAGE = fuzz.member(b"n0.JPEG", photo())
SPARSE = {"at386": fuzz.number_field(0) * 2, "at482": b"\1", "at483": fuzz.number_field(0)}
MENDED = {
    "negative size": fuzz.header(b"x", -512) + IMAGE,
    "size that is no number": fuzz.member(b"x", fuzz.record(b"size", b"-512"), b"x") + IMAGE,
    "negative size beyond any index": IMAGE + fuzz.header(b"x", -(2**87)),
    "cut header of a sparse file": IMAGE + fuzz.header(b"x", 0, b"S", **SPARSE),
    "long name of a damaged member": fuzz.member(b"x", b"long", b"L") + b"x" * 512 + IMAGE,
    "20,000 headers of one member": fuzz.header(b"x", 0, b"L") * 20_000 + IMAGE,
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
    assert fuzz.check_image(image) == []
    last_scan = image[image.rindex(b"\xff\xda") : -2]
    with pytest.raises(decoding.ImageError, match="too many scans"):
        decoding.decode_image(image[:-2] + last_scan * decoding.MAX_SCANS + image[-2:], fuzz.SIZE)


PLANTED = [  # what an input does, and the finding that it must lead to
    (lambda: decoding.no_such_name, "AttributeError: "),
    (lambda: os.kill(os.getpid(), signal.SIGSEGV), "the process died of SIGSEGV"),
    (lambda: [None for _ in iter(int, 1)], "the process died of SIGXCPU"),
    (lambda: np.empty(2 * fuzz.MEMORY, np.uint8), "MemoryError: "),
    (lambda: Path(os.devnull).open("w").close(), "open "),
    (lambda: Path("/proc/self/comm").symlink_to("elsewhere"), "FileExistsError: "),
    (lambda: os.memfd_create("file") and os.write(os.memfd_create("file"), b"x"), "SIGXFSZ"),
    (lambda: time.sleep(1_000), "stuck"),
    (lambda: None, None),
]


def planted(seed, number):
    PLANTED[number][0]()
    return []


def test_every_misbehaviour_is_a_finding():
    findings = fuzz.run(len(PLANTED), seed=3, attempt=planted, cpu_seconds=1, patience=5)
    for number, (_, wanted) in enumerate(PLANTED):
        found = [finding for finding in findings if finding.startswith(f"input {number} of seed 3: ")]
        assert wanted in found[0] if wanted else found == []


def loses_one(*arguments):
    images, names, left_out = decode_tar(*arguments)
    return images[1:], names[1:], left_out


def swaps_names(*arguments):
    images, names, left_out = decode_tar(*arguments)
    return images, names[::-1], left_out


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("wrong", [loses_one, swaps_names])
def test_a_lost_image_is_a_finding(wrong):
    content = fuzz.intact_images()
    tar = make_tar({"n0.JPEG": content[0], "a/n1.JPEG": content[1]})
    assert fuzz.check_tar(tar) == []
    findings = fuzz.check_tar(tar, wrong)
    assert [finding.partition(":")[0] for finding in findings[:2]] == ["intact, but not kept"] * 2
    assert findings[2:] == ["other images, or others left out, in parts"]


def test_pixels_that_change_are_a_finding():
    rng = np.random.default_rng(0)
    [finding] = fuzz.check_image(b"", lambda data, size: rng.integers(0, 255, (*size, 3), np.uint8))
    assert finding.startswith("not the same twice: ")


@pytest.mark.parametrize(
    "labels", [{"a.JPEG": 1, "b.JPEG": 1}, {"a.JPEG": 1, "b.JPEG": 2, "c.JPEG": 10}]
)
def test_wrong_labels_are_a_finding(labels):
    assert len(fuzz.check_labels(b"n1/a.JPEG 1\nn1/b.JPEG 2\n", lambda *_: labels)) == 1
