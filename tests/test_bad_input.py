"""Each row of the table of bad input: one line on standard error, the exit status, what is kept."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import uuid
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import alexnet
import driver
import functions
from machinery import constants
from machinery.errors import InputError
from machinery.storage.images import MAX_BYTES, decode_image
from machinery.storage.s3 import IMPATIENT, data_client, read_object, s3_location
from machinery.storage.tars import decode_part
from tests.moments import At
from tests.support import (
    ROOT,
    decode_tar,
    draw_image,
    drive,
    encode,
    jpeg,
    make_tar,
    noting_worker,
    photo,
    thin_driver,
    title,
    train,
)

import boto3
import numpy as np
import psutil
import pytest
import ray
from botocore.config import Config
from PIL import Image

SIZE = [256, 256]


@ray.remote
class Idle:
    """A worker that starts at once, and is up never: for runs that end before they train."""

    def __init__(self, network):
        pass

    def seconds_at_work(self):
        threading.Event().wait()


def one_error(capsys, *arguments, actor=Idle):
    """The only line on standard error of a run that must end with exit status 2."""
    assert drive(arguments, actor=actor) == 2
    line, rest = capsys.readouterr().err.split("\n", 1)
    assert rest == "" and line.startswith("error: ") and line.isprintable()
    return line


# ---- S3 that cannot be read


def test_no_credentials(one_ray, bucket, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_") and "ENDPOINT" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    line = one_error(capsys, "--s3-bucket", bucket)
    assert f"s3://{bucket}: Unable to locate credentials" in line and "aws configure" in line
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "only half of them")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    line = one_error(capsys, "--s3-bucket", bucket)
    assert f"s3://{bucket}: " in line and "AWS_SECRET_ACCESS_KEY" in line


@contextlib.contextmanager
def answering(status, code):
    """An S3 server that answers every request with one error; yields its endpoint."""
    body = f"<Error><Code>{code}</Code><Message>two\nlines</Message></Error>".encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the name is BaseHTTPRequestHandler's
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02]).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ANSWERS = [
    (403, "AccessDenied", "access denied; check the credentials and the bucket's policy"),
    (
        403,
        "InvalidAccessKeyId",
        "(InvalidAccessKeyId) when calling the ListObjects operation (reached max retries: 2): two",
    ),
    (400, "ExpiredToken", "(ExpiredToken)"),
    (301, "PermanentRedirect", "(PermanentRedirect)"),
    (503, "SlowDown", "(SlowDown)"),
]


@pytest.mark.parametrize("status, code, why", ANSWERS)
def test_bucket_is_refused(one_ray, capsys, monkeypatch, status, code, why):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")  # "slow down" is borne for minutes without that
    with answering(status, code) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        line = one_error(capsys, "--s3-bucket", "theirs")
    assert line.startswith("error: s3://theirs: ") and why in line


@pytest.mark.timeout(60)
def test_endpoint_that_refuses_connections(one_ray, capsys, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        line = one_error(capsys, "--s3-bucket", "b")
    assert line.startswith(f'error: s3://b: Could not connect to the endpoint URL: "{endpoint}/')


def test_endpoint_that_never_answers(monkeypatch):
    """With the limits of the driver's own requests, it is given up within a minute."""
    patience = IMPATIENT
    attempts = patience.retries["total_max_attempts"]
    assert attempts * max(patience.connect_timeout, patience.read_timeout) <= 30
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        hasty = patience.merge(Config(read_timeout=0.2))
        with pytest.raises(InputError) as caught:
            read_object(data_client(hasty, **s3_location()), "b", "k")
    assert str(caught.value).startswith("s3://b/k: Read timeout on endpoint URL")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http://no such host"])
def test_endpoint_that_is_no_url(one_ray, capsys, monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    line = one_error(capsys, "--s3-bucket", "b")
    assert line.startswith("error: s3://b: ") and endpoint in line


def test_bucket_names(one_ray, capsys, s3, bucket):
    hint = "name the bucket alone; what follows it goes into --key-prefix"
    for name, why in (
        ("No Bucket", "error: s3://No Bucket: no bucket can have this name"),
        (f"s3://{bucket}/train/", f"error: --s3-bucket s3://{bucket}/train/: {hint}"),
        (f"S3://{bucket}/", f"error: s3://{bucket}: no key with the prefix "),
        (f"{bucket}/", f"error: s3://{bucket}: no key with the prefix "),
    ):
        assert one_error(capsys, "--s3-bucket", name).startswith(why)


def test_tar_in_an_archive(one_ray, capsys, s3, bucket):
    archived = {"Bucket": bucket, "Key": "a.tar", "Body": b"x", "StorageClass": "GLACIER"}
    s3.put_object(**archived)
    line = one_error(capsys, "--s3-bucket", bucket, "--key-prefix", "a")
    assert line == f"error: s3://{bucket}/a.tar: lies in an archive storage class; restore it first"


def test_official_train_tar_as_it_is(thin, one_ray, capsys, s3, bucket):
    inner = {f"{wnid}.tar": make_tar({"a.JPEG": photo()}) for wnid in ("n01440764", "n01443537")}
    s3.put_object(Bucket=bucket, Key="train.tar", Body=make_tar(inner))
    s3.put_object(Bucket=bucket, Key="train.txt", Body=b"a.JPEG 1")
    line = one_error(capsys, "--s3-bucket", bucket, "--key-prefix", "t")
    hint = "holds tars, no images: put it into a bucket with stage_imagenet.py"
    assert line == f"error: s3://{bucket}/train.tar: {hint}"


# ---- keys and labels


def test_prefix_without_a_tar(one_ray, s3, bucket, capsys):
    line = one_error(capsys, "--s3-bucket", bucket, "--key-prefix", "nowhere/")
    assert (
        line
        == f"error: s3://{bucket}: no key with the prefix 'nowhere/' ends in .tar; the bucket is empty"
    )
    for key in ("a/1.tar", "a/2.tar", "b/1.txt", "c/1.tar", "c/2.tar"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    line = one_error(capsys, "--s3-bucket", bucket, "--key-prefix", "nowhere/")
    assert line.endswith(
        "no key with the prefix 'nowhere/' ends in .tar; there are: a/1.tar, a/2.tar, b/1.txt"
    )
    line = one_error(capsys, "--s3-bucket", bucket, "--key-prefix", "b/")
    assert line.endswith("no key with the prefix 'b/' ends in .tar; there are: b/1.txt")


LABEL_FILES = {  # test_imagenet.py has all that a line can be
    "missing": (None, ": there is no such key; check the flag that names it"),
    "malformed": (
        b"n1/a.JPEG 1\nn1/b.JPEG\n",
        ", line 2: not `directory/name.JPEG label`: 'n1/b.JPEG'",
    ),
    "elsewhere": (
        b"n1/a.JPEG 1\nn2/a.JPEG 2",
        ": has no line for a/a.JPEG, and several labels for that name elsewhere",
    ),
}


@pytest.mark.parametrize("data, why", LABEL_FILES.values(), ids=LABEL_FILES)
def test_label_file(thin, one_ray, s3, bucket, capsys, data, why):
    s3.put_object(Bucket=bucket, Key="a.tar", Body=make_tar({"a.JPEG": photo()}))
    if data is not None:
        s3.put_object(Bucket=bucket, Key="labels/x.txt", Body=data)
    options = ["--s3-bucket", bucket, "--key-prefix", "", "--label-file", "labels/x.txt"]
    assert one_error(capsys, *options) == f"error: s3://{bucket}/labels/x.txt{why}"


# ---- images and tars


def huge_png():
    """A PNG of a few bytes whose header declares 50000x50000 pixels."""
    data = bytearray(encode(Image.new("L", (1, 1)), "PNG"))
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def huge_jpeg():
    """A JPEG whose header declares 65000x65000 pixels."""
    data = bytearray(photo())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = (65_000).to_bytes(2, "big") * 2
    return bytes(data)


def with_a_hole(data):
    """Bytes without 200 of them in the middle."""
    middle = len(data) // 2
    return data[: middle - 100] + data[middle + 100 :]


def special(kind):
    """A member that has no bytes of its own."""
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, "good1.JPEG"
    return member


NOISE = Image.effect_noise((300, 300), 50)
CMYK = jpeg(draw_image(0, np.random.default_rng(0)).convert("CMYK"))
LEFT_OUT = {
    "text": (b"this is no image", "no image"),
    "no bytes": (b"", "no image"),
    "another format": (b"%PDF-1.7", "no image"),
    "a cut JPEG": (photo()[: len(photo()) // 2], "cut or corrupt JPEG"),
    "a JPEG cut by 10 bytes": (photo()[:-10], "cut or corrupt JPEG"),
    "a JPEG cut in its header": (photo()[:300], "no readable image"),
    "a small cut grey JPEG": (jpeg(NOISE.resize((99, 99)))[:-99], "cut or corrupt JPEG"),
    "a cut CMYK JPEG": (CMYK[:-999], "no readable image"),
    "a cut PNG": (encode(NOISE, "PNG")[:-5000], "no readable image"),
    "a JPEG with a hole": (with_a_hole(photo()), "cut or corrupt JPEG"),
    "a PNG with a hole": (with_a_hole(encode(NOISE, "PNG")), "no readable image"),
    "a huge PNG": (huge_png(), "pixels"),
    "a huge JPEG": (huge_jpeg(), "pixels"),
    "a symbolic link": (special(tarfile.SYMTYPE), "no regular file"),
    "a hard link": (special(tarfile.LNKTYPE), "no regular file"),
    "a character device": (special(tarfile.CHRTYPE), "no regular file"),
    "a block device": (special(tarfile.BLKTYPE), "no regular file"),
    "a pipe": (special(tarfile.FIFOTYPE), "no regular file"),
}


@pytest.mark.parametrize("content, why", LEFT_OUT.values(), ids=LEFT_OUT)
def test_member_is_left_out_and_all_others_are_kept(content, why):
    members = {"good1.JPEG": photo(1), "bad.JPEG": content, "good2.JPEG": photo(2)}
    images, names, left_out = decode_tar(make_tar(members), SIZE)
    assert names == ["good1.JPEG", "good2.JPEG"]
    assert np.array_equal(images, [decode_image(photo(seed), SIZE) for seed in (1, 2)])
    [(name, reason)] = left_out
    assert name == "bad.JPEG" and why in reason and reason.isprintable() and "0x" not in reason


def test_a_file_too_large_for_an_image_is_left_out(tmp_path):
    """Without reading it, and with the image after it."""
    image, size = make_tar({"good.JPEG": photo()}), MAX_BYTES + 512
    header = tarfile.TarInfo("large.JPEG")
    header.size = size
    with (tmp_path / "a.tar").open("wb+") as file:
        file.write(header.tobuf())
        file.truncate(512 + size)  # a hole takes no space
        file.seek(512 + size)
        file.write(image)
        tracemalloc.start()
        images, names, left_out, rest = decode_part(file, SIZE, "jpeg")
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
        assert names == [] and left_out == [("large.JPEG", f"too large: {size} bytes")]
        images, names, left_out, end = decode_part(file, SIZE, "jpeg", rest)
    assert names == ["good.JPEG"] and len(images) == 1 and left_out == [] and end is None


def test_folders_are_no_damage():
    members = {"n1": special(tarfile.DIRTYPE), "n1/a.JPEG": photo()}
    _, names, left_out = decode_tar(make_tar(members), SIZE)
    assert names == ["n1/a.JPEG"] and left_out == []


GOOD = make_tar({f"{i}.JPEG": photo(i) for i in range(3)})
THIRD = GOOD.index(b"2.JPEG\0")
TARS = {
    "cut in its last image": (GOOD[: THIRD + 2000], "01", "2.JPEG: cut off by the end of the tar"),
    "cut in a header": (GOOD[: THIRD + 200], "01", f"the tar itself: damaged at byte {THIRD}"),
    "cut between images": (GOOD[:THIRD], "01", "the tar itself: cut: its end mark is missing"),
    "cut in its first header": (GOOD[:100], "", "the tar itself: empty, or no tar"),
    "no bytes": (b"", "", "the tar itself: empty, or no tar"),
    "without members": (make_tar({}), "", "the tar itself: empty, or no tar"),
    "text": (b"this is no tar\n" * 1000, "", "the tar itself: empty, or no tar"),
    "an image": (photo(), "", "the tar itself: empty, or no tar"),
    "noise": (np.random.default_rng(0).bytes(20_000), "", "the tar itself: empty, or no tar"),
    "compressed": (zlib.compress(GOOD), "", "the tar itself: empty, or no tar"),
    "with a damaged header": (
        GOOD.replace(b"1.JPEG\0", b"1.JPEX\0", 1),
        "02",
        f"the tar itself: damaged at byte {GOOD.index(b'1.JPEG')}",
    ),
}


@pytest.mark.parametrize("tar, kept, why", TARS.values(), ids=TARS)
def test_what_is_readable_of_a_tar_is_kept(tar, kept, why):
    images, names, left_out = decode_tar(tar, SIZE)
    assert names == [f"{seed}.JPEG" for seed in kept]
    for seed, image in zip(kept, images, strict=True):
        assert np.array_equal(image, decode_image(photo(int(seed)), SIZE))
    assert f"{left_out[0][0]}: {left_out[0][1]}" == why


def test_training_goes_on_with_what_is_usable(thin, one_ray, s3, bucket, tmp_path, capsys):
    """The held-out set, too: it goes the same road."""
    bad = {f"{what}.JPEG": content for what, (content, _) in LEFT_OUT.items()}
    images, specials = dict(list(bad.items())[:-5]), dict(list(bad.items())[-5:])
    tars = {
        "t/cut.tar": GOOD[: THIRD + 2000],
        "t/empty.tar": b"",
        "t/good.tar": make_tar({"c.JPEG": photo(3), "no\nlabel.JPEG": photo(4)}),
        "t/images.tar": make_tar({"a.JPEG": photo(1)} | images | {"b.JPEG": photo(2)}),
        "t/specials.tar": make_tar(specials | {"d.JPEG": photo(5)}),
        "t/text.tar": b"no tar",
        "t/unlabelled.tar": make_tar({"e.JPEG": photo(6)}),
        "v/0.tar": make_tar({"f.JPEG": photo(7), "text.JPEG": b"no image", "g.JPEG": photo(8)}),
        "v/1.tar": make_tar({"h.JPEG": photo(9), "i.JPEG": photo(6)})[:-512],
        "v/2.tar": b"no tar",
    }
    for key, body in tars.items():
        s3.put_object(Bucket=bucket, Key=key, Body=body)
    s3.put_object(Bucket=bucket, Key="t/notes", Body=b"")
    labels = "\n".join(f"x/{name}.JPEG {label}" for label, name in enumerate("abcd01"))
    s3.put_object(Bucket=bucket, Key="train.txt", Body=labels.encode())
    s3.put_object(Bucket=bucket, Key="val.txt", Body=b"f.JPEG 7\nh.JPEG 9\ni.JPEG 3\n")
    flags = ["--key-prefix", "t/", "--val-prefix", "v/", "--iterations", 2]
    assert train(bucket, *flags, actor=noting_worker(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    where = f"s3://{bucket}"
    assert f"{where}/t/*: 7 tars, 1 other keys left out" in out
    assert (
        f"{where}/t/cut.tar: 2 left out: 2.JPEG: cut off by the end of the tar; the tar itself" in out
    )
    assert f"{where}/t/images.tar: {len(images)} left out: text.JPEG: no image; no bytes.JPEG:" in out
    assert f"{where}/t/specials.tar: 5 left out: a symbolic link.JPEG: no regular file; " in out
    assert "; a pipe.JPEG: no regular file\n" in out
    assert f"{where}/t/empty.tar: 1 left out: the tar itself: empty, or no tar" in out
    assert f"{where}/t/text.tar: 1 left out: the tar itself: " in out
    assert "2 images have no label and are left out: 'no\\nlabel.JPEG', 'e.JPEG'" in out
    assert "6 images in 4 batches" in out
    assert f"{where}/v/0.tar: 1 left out: text.JPEG: no image\n" in out
    assert f"{where}/v/2.tar: 1 left out: the tar itself: empty, or no tar\n" in out
    assert "1 images have no label and are left out: 'g.JPEG'\n" in out
    assert "3 images in 2 batches" in out
    assert len(re.findall(r"^Iteration \d: loss", out, re.M)) == 2
    [share] = re.findall(r"^Iteration 2 \(epoch 3.3\): validation top-1 = ([\d.]+)%", out, re.M)
    assert share == "0.0"  # these workers count no hits


def test_nothing_usable_left(thin, one_ray, s3, bucket, capsys):
    tar = make_tar({"unlabelled.JPEG": photo(), "unreadable.JPEG": b"no image"})
    s3.put_object(Bucket=bucket, Key="a.tar", Body=tar)
    s3.put_object(Bucket=bucket, Key="train.txt", Body=b"n1/other.JPEG 1\nn1/unreadable.JPEG 2")
    line = one_error(capsys, "--s3-bucket", bucket, "--key-prefix", "a")
    reason = f"s3://{bucket}/a*: no image is readable and has a label in train.txt"
    assert line.startswith(f"error: {reason}")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--val-prefix", "none/"], ": no key with the prefix 'none/' ends in .tar"),
        (["--val-prefix", "a"], "/val.txt, line 1: label '99' is no integer in 0..9"),
        (["--val-prefix", "a", "--val-label-file", "other.txt"], "/a*: no image is readable and has a"),
    ],
)
def test_held_out_set_that_is_unusable(thin, one_ray, s3, bucket, capsys, flags, message):
    s3.put_object(Bucket=bucket, Key="a.tar", Body=make_tar({"a.JPEG": photo()}))
    for key, line in {"train.txt": "a.JPEG 1", "val.txt": "a.JPEG 99", "other.txt": "b.JPEG 1"}.items():
        s3.put_object(Bucket=bucket, Key=key, Body=line.encode())
    line = one_error(capsys, "--s3-bucket", bucket, "--key-prefix", "a", "--iterations", 1, *flags)
    assert line.startswith(f"error: s3://{bucket}{message}")


def test_places_for_results_that_are_unusable(one_ray, s3, bucket, capsys, tmp_path):
    """Each is told before anything is loaded."""
    (tmp_path / "file").write_text("of someone else")
    model, theirs = tmp_path / "model", "saved_model.pb there is another program's"
    model.mkdir()
    (model / "saved_model.pb").write_text("of someone else")
    for flags, message in (
        (["--log-dir", "s3://b/curves"], "--log-dir s3://b/curves: name a local folder"),
        (["--log-dir", tmp_path / "file"], f"--log-dir {tmp_path}/file: File exists"),
        (["--log-dir", "/proc/x"], "--log-dir /proc/x: No such file or directory"),
        (["--checkpoint-dir", "/proc/x"], "--checkpoint-dir /proc/x: No such file or directory"),
        (["--export-dir", "/proc/x/y"], "--export-dir /proc/x/y: No such file or directory"),
        (["--export-dir", tmp_path / "file"], f"--export-dir {tmp_path}/file: File exists"),
        (["--export-dir", model], f"--export-dir {model}: {theirs}; name another place"),
        (["--export-dir", "s3://none-such/x"], "s3://none-such/x/.check-"),
    ):
        assert one_error(capsys, "--s3-bucket", bucket, *flags).startswith(f"error: {message}")


# ---- workers and signals


@pytest.fixture
def small(s3, bucket):
    """Arguments of a run on a bucket of a single image."""
    s3.put_object(Bucket=bucket, Key="a.tar", Body=make_tar({"a.JPEG": photo()}))
    s3.put_object(Bucket=bucket, Key="train.txt", Body=b"n1/a.JPEG 1")
    return ["--s3-bucket", bucket, "--key-prefix", ""]


def test_more_workers_than_a_growing_cluster_gets_room_for(thin, one_ray, small, capsys, monkeypatch):
    monkeypatch.setattr(thin, "NUM_WORKERS", 2)
    monkeypatch.setattr(thin, "CPUS_PER_WORKER", 3)
    monkeypatch.setattr(thin, "WORKER_WAIT", 2)
    assert drive(small) == 2
    lack = "2 workers of 3 CPUs and 0 GPUs each were asked for, the cluster has room for 0"
    out, err = capsys.readouterr()
    assert f"{lack}: waiting up to 2 s for more nodes" in out.splitlines()
    assert err == f"error: {lack}: lower NUM_WORKERS or add nodes\n"


def test_gpu_that_no_worker_can_use(thin, one_ray, small, capsys, monkeypatch):
    """The session's Ray counts GPUs that are none: computing on the CPU instead would take weeks."""
    monkeypatch.setattr(thin, "GPUS_PER_WORKER", 1)
    monkeypatch.setattr(thin, "NUM_WORKERS", 1)
    why = "TensorFlow sees 0 of 1 GPUs: it needs pip install tensorflow[and-cuda]"
    assert one_error(capsys, *small, "--iterations", 1, actor=functions.Worker).endswith(why)


CONSTANTS = {
    "MINI_BATCH": (0, "a whole number from 1 on"),
    "CHECKPOINT_EVERY": (-1, "a whole number from 0 on"),
    "LEARNING_RATE_DROPS": (100, "numbers of images in brackets, such as (100_000,)"),
    "SEED": (None, "a whole number from 0 on"),
    "PRECISION": ("float16", "None or 'float32' or 'bfloat16'"),
    "STORED": ("jpg", "None or 'pixels' or 'jpeg'"),
    "GPUS_PER_WORKER": (0.5, "a whole number from 0 on"),
    "LEARNING_RATE": (float("nan"), "a number from 0 on, but not 0"),
    "WEIGHT_DECAY": (float("inf"), "a number from 0 on"),
    "CLIP_NORM": (0, "inf or a number from 0 on, but not 0"),
    "KEEP_PROBABILITY": (0, "a number from 0 to 1, but not 0"),
    "INITIAL_WEIGHTS": ("xavier", "'he' or a number from 0 on, but not 0"),
    "LAYERS": (
        (("conv", 8, 11, 4, "pool"), *[("conv", 8, 3, 2, "pool")] * 3, ("dense", 8)),
        "a table of layers as in alexnet.py, dense ones last, none of size 0",
    ),
}


VANISHED = ("conv", 8, 11, 4, "pool"), *[("conv", 8, 3, 2, "pool")] * 4, ("dense", 8)


@pytest.mark.parametrize("layers", [(), (("conv", 8, 11, 4), ("dense", 8)) * 2, VANISHED])
def test_layers_without_a_dense_one_last_or_with_one_between_or_with_too_many_pools(layers):
    with pytest.raises(InputError) as caught:
        constants.check(vars(driver) | {"LAYERS": layers}, alexnet.are_layers)
    assert str(caught.value).endswith(CONSTANTS["LAYERS"][1])


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_that_makes_no_sense(capsys, monkeypatch, name):
    """Told before Ray starts, and so at once."""
    value, must_be = CONSTANTS[name]
    monkeypatch.setattr(driver, name, value)
    line = one_error(capsys)
    assert line.startswith(f"error: {name} = ") and line.endswith(
        f" in driver.py: it must be {must_be}"
    )


def test_every_constant_has_a_rule_that_it_keeps():
    named = re.findall(r"^([A-Z_]+) = ", Path(driver.__file__).read_text(), re.MULTILINE)
    assert {*named} == {*constants.RULES, "LAYERS"}
    constants.check(vars(driver), alexnet.are_layers)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_while_loading_stops_at_once(thin, one_ray, small, capsys, number, status):
    before = signal.getsignal(number)
    report = At({"Loading: ": lambda: os.kill(os.getpid(), number)})
    assert drive([*small, "--iterations", "3"], report=report, actor=Idle) == status
    assert signal.getsignal(number) == before  # it leaves no handler of its own
    out, err = capsys.readouterr()
    assert "Loading" in out and "Shuffle" not in out and err == ""


def test_ctrl_c_while_modules_are_imported():
    command = [sys.executable, "-X", "importtime", ROOT / "driver.py"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not process.stderr.readline().endswith(" numpy\n"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 130


@contextlib.contextmanager
def own_ray(*arguments):
    """A Run of driver.py with a Ray of its own, of which nothing may be left at the end.

    RAY_ADDRESS is not set: the session's Ray, which is another program's, is not joined.
    """
    mark, options = {"STARTED_BY": uuid.uuid4().hex}, {"address": "", "start_new_session": True}
    mark["TF_USE_LEGACY_KERAS"] = "0"  # as users load TensorFlow
    with thin_driver("NUM_WORKERS=1", *arguments, environment=mark, **options) as run:
        yield run
    ours = [p for p in psutil.process_iter() if mark["STARTED_BY"] in environ(p)]
    _, alive = psutil.wait_procs(ours, timeout=20)
    assert alive == []


def test_signals_to_runs_with_a_ray_of_their_own(one_ray, small):
    """Two come while Ray starts, which can crash then, and handles SIGTERM itself, by SystemExit.

    One is the Ctrl-C of a terminal, which signals the whole process group.
    """
    with own_ray(*small) as first, own_ray(*small) as second, own_ray(*small) as third:
        starting, deadline = {first: signal.SIGINT, second: signal.SIGTERM}, time.monotonic() + 100
        while starting:
            assert time.monotonic() < deadline
            for run in list(starting):
                below = psutil.Process(run.pid).children(True)
                if any("gcs_server" in title(process) for process in below):
                    run.process.send_signal(starting.pop(run))
            time.sleep(0.01)
        assert (first.wait(60), second.wait(60)) == (130, 143)
        assert (first.output(), second.output()) == ("[end]", "[end]")
        third.wait_for("Iteration 1: loss ")
        os.killpg(third.pid, signal.SIGINT)
        assert third.wait(60) == 130, third.output()
    done = re.findall(r"^Iteration (\d+): loss = ", third.output(), re.M)
    assert "Traceback" not in third.output()
    assert third.output().endswith(f"Stopped at iteration {len(done)}: nothing is saved\n[end]")


def environ(process):
    """The values in a process's environment; none if it has just ended or is not ours."""
    try:
        return process.environ().values()
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return []
