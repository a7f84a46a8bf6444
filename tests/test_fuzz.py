"""A share of the fuzzer's inputs, and the proof that it finds what it looks for."""

import os
import signal
import time
from pathlib import Path

import fuzz
import numpy as np
import pytest

import demo
import imagenet


def test_a_share_of_the_inputs():
    assert fuzz.run(inputs=1_000, seed=0) == []


PLANTED = [  # what an input does, and the finding that it must lead to
    (lambda: imagenet.no_such_name, "AttributeError: "),
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


def test_every_misbehaviour_is_a_finding(monkeypatch):
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 1)
    monkeypatch.setattr(fuzz, "PATIENCE", 15)
    findings = fuzz.run(len(PLANTED), seed=3, attempt=planted)
    for number, (_, wanted) in enumerate(PLANTED):
        found = [finding for finding in findings if finding.startswith(f"input {number} of seed 3: ")]
        assert wanted in found[0] if wanted else found == []


@pytest.mark.filterwarnings("ignore:Palette images")
def test_a_lost_image_is_a_finding(monkeypatch):
    content = fuzz.intact_images()
    tar = demo.make_tar({"n0.JPEG": content[0], "a/n1.JPEG": content[1]})
    assert fuzz.check_tar(tar) == []
    decode_tar = imagenet.decode_tar

    def loses_one(*arguments):
        images, names, left_out = decode_tar(*arguments)
        return images[1:], names[1:], left_out

    def swaps_names(*arguments):
        images, names, left_out = decode_tar(*arguments)
        return images, names[::-1], left_out

    for wrong, number in ((loses_one, 2), (swaps_names, 2)):
        monkeypatch.setattr(imagenet, "decode_tar", wrong)
        findings = fuzz.check_tar(tar)
        assert len(findings) == number
        assert all(finding.startswith("intact, but not kept: 1 x ") for finding in findings)


def test_pixels_that_change_are_a_finding(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        imagenet, "decode_image", lambda data, size: rng.integers(0, 255, (*size, 3), np.uint8)
    )
    [finding] = fuzz.check_image(b"")
    assert finding.startswith("not the same twice: ")


@pytest.mark.parametrize(
    "labels", [{"a.JPEG": 1, "b.JPEG": 1}, {"a.JPEG": 1, "b.JPEG": 2, "c.JPEG": 10}]
)
def test_wrong_labels_are_a_finding(monkeypatch, labels):
    monkeypatch.setattr(imagenet, "parse_labels", lambda *_: labels)
    assert len(fuzz.check_labels(b"n1/a.JPEG 1\nn1/b.JPEG 2\n")) == 1
