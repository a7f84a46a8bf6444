"""S3 that answers errors, resets connections, stalls, or changes: retried whole, or one line."""

import contextlib
import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import imagenet
from machinery import ending, results
from machinery.errors import InputError
from machinery.storage import s3 as reading
from machinery.storage.s3 import PATIENT, PIECE, S3File, Tar, data_client, read_object, s3_location
from tests.support import draw_image, jpeg, make_tar

import numpy as np
import pytest
import ray
from botocore.config import Config

CONTENT = np.random.default_rng(0).bytes(2 * PIECE + 1000)  # an object of three pieces
PIECES = 3

BEFORE_THE_BODY = ["500", "503", "silent", "drop"]
IN_THE_BODY = ["reset", "cut", "stall"]
FAULTS = BEFORE_THE_BODY + IN_THE_BODY

HASTY = Config(read_timeout=2)  # seconds after which what stalls is given up


def put(s3, bucket, content=CONTENT, key="a.tar"):
    """Put an object; its ETag."""
    return s3.put_object(Bucket=bucket, Key=key, Body=content)["ETag"]


def client(hasty=HASTY):
    """A client with less patience than that of a run."""
    return data_client(PATIENT.merge(hasty), **s3_location())


def read_tar(bucket, etag, content=CONTENT, hasty=HASTY, key="a.tar", **storm):
    """All bytes of a tar, which were listed as `content`, read with less patience."""
    opened = S3File(client(hasty), bucket, Tar(key, etag, len(content)), **storm)
    with contextlib.closing(opened) as file:
        return file.read()


def download(bucket):
    """All bytes of an object such as a label file."""
    return read_object(client(), bucket, "a.tar")


def each_fault(check):
    """Check all faults at once, each with an object of its own: most of them only take time."""
    with ThreadPoolExecutor(len(FAULTS)) as threads:
        list(threads.map(check, FAULTS, [f"{fault}.tar" for fault in FAULTS]))


# ---- faults that pass


def test_only_the_piece_that_failed_is_fetched_again(proxy, s3, bucket):
    def check(fault, key):
        etag = put(s3, bucket, key=key)
        proxy.faults["GET", key] = iter([None, fault])
        assert read_tar(bucket, etag, key=key) == CONTENT
        gets = [request for request in proxy.requests if (request.method, request.key) == ("GET", key)]
        [spoilt] = [request for request in gets if request.fault]
        assert spoilt.fault == fault
        fetches = Counter(request.range for request in gets)
        assert len(fetches) == PIECES
        assert fetches == Counter(dict.fromkeys(fetches, 1) | {spoilt.range: 2})
        assert sum(request.sent for request in gets if not request.fault) == len(CONTENT)

    each_fault(check)


def test_the_first_request_is_retried(proxy, s3, bucket):
    def check(fault, key):
        etag = put(s3, bucket, key=key)
        proxy.faults["GET", key] = iter([fault])
        assert read_tar(bucket, etag, key=key) == CONTENT
        faults = [request.fault for request in proxy.requests if request.key == key]
        assert Counter(faults) == {fault: 1, None: PIECES}

    each_fault(check)
    assert {request.method for request in proxy.requests} == {"GET"}  # no HEAD before a GET


def test_many_faults_in_one_object(proxy, s3, bucket):
    etag = put(s3, bucket)
    proxy.faults["GET", "a.tar"] = iter(["500", "reset", "503", "drop", "cut", "500", "reset", "503"])
    assert read_tar(bucket, etag) == CONTENT
    assert sum(request.sent for request in proxy.requests if not request.fault) == len(CONTENT)


def test_empty_object(proxy, s3, bucket):
    assert read_tar(bucket, put(s3, bucket, b""), b"") == b""
    assert download(bucket) == b""


@pytest.mark.parametrize("fault", ["503", "drop", "cut"])
def test_list_and_labels_are_retried(proxy, s3, bucket, fault):
    etag = put(s3, bucket, b"")
    put(s3, bucket, b"n1/a.JPEG 1\n" * 1_000, "train.txt")
    proxy.faults["GET", bucket] = iter([fault])  # the path of a listing ends in the bucket's name
    proxy.faults["GET", "train.txt"] = iter([fault])
    source = imagenet.source_of(bucket)
    assert imagenet.list_tars(source, "") == ([Tar("a.tar", etag, 0)], 1)
    assert imagenet.read_labels(source, "train.txt", 10) == {"a.JPEG": 1}
    gets = [(request.key, request.fault) for request in proxy.requests if request.method == "GET"]
    assert gets == [(bucket, fault), (bucket, None), ("train.txt", fault), ("train.txt", None)]


@pytest.mark.parametrize("fault, times", [("503", 1), ("reset", 1), ("reset", reading.ATTEMPTS + 1)])
def test_the_estimate_is_made_in_any_case(proxy, s3, bucket, fault, times):
    """From the head of the first tar, not from its size alone, though every attempt breaks off."""
    tars = [Tar("a.tar", put(s3, bucket, tar(0)), len(tar(0)))]
    proxy.faults["GET", "a.tar"] = iter([fault] * times)
    source = imagenet.source_of(bucket)
    through_fault, undisturbed = (imagenet.estimate_images(source, tars) for _ in range(2))
    assert through_fault == undisturbed > 10 * len(tar(0)) // imagenet.JPEG_BYTES


# ---- faults that stay


@pytest.mark.parametrize("content", [CONTENT, CONTENT[:1000]], ids=["pieces", "one piece"])
def test_unreadable_object_is_given_up(proxy, s3, bucket, monkeypatch, content):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    hasty = Config(read_timeout=0.2)

    def check(fault, key):
        etag = put(s3, bucket, content, key)
        proxy.faults["GET", key] = itertools.repeat(fault)
        with pytest.raises(InputError) as caught:
            read_tar(bucket, etag, content, hasty, key, storm=0)
        line = str(caught.value)
        assert line.startswith(f"s3://{bucket}/{key}: ") and line.isprintable()
        gets = [request for request in proxy.requests if (request.method, request.key) == ("GET", key)]
        fetches = Counter(request.range for request in gets)
        assert 2 <= max(fetches.values()) <= 2 * reading.ATTEMPTS

    each_fault(check)


def test_a_stall_is_given_up_within_a_quarter_of_an_hour():
    """By a run's own limits, of which the test above has shown that both hold."""
    attempts = PATIENT.retries["total_max_attempts"] * reading.ATTEMPTS
    assert attempts * max(PATIENT.connect_timeout, PATIENT.read_timeout) <= 15 * 60


# ---- objects that change


CHANGED = "has changed since it was listed: start again with the new data"


@pytest.mark.parametrize("content", [CONTENT, b"old"], ids=["pieces", "one piece"])
def test_object_that_changed_after_it_was_listed(proxy, s3, bucket, content):
    old = put(s3, bucket, content)
    assert imagenet.list_tars(imagenet.source_of(bucket), "") == ([Tar("a.tar", old, len(content))], 0)
    put(s3, bucket, content[::-1])
    with pytest.raises(InputError) as caught:
        read_tar(bucket, old, content)
    assert str(caught.value) == f"s3://{bucket}/a.tar: {CHANGED}"


def test_object_that_changes_while_it_is_fetched(proxy, s3, bucket):
    """After its first pieces: pieces of both are never mixed."""
    content, changed = bytes((reading.AHEAD + 2) * PIECE), threading.Lock()

    def change():  # no answer to one of the first requests comes before it
        with changed:
            put(s3, bucket, b"\1" * len(content))

    put(s3, bucket, content)
    proxy.faults["GET", "a.tar"] = itertools.repeat(change, reading.AHEAD)
    with pytest.raises(InputError) as caught:
        download(bucket)
    assert str(caught.value) == f"s3://{bucket}/a.tar: {CHANGED}"


def test_tar_that_changes_while_it_is_read(s3, bucket):
    """Beyond the pieces that were fetched ahead of time."""
    size = (reading.AHEAD + 2) * PIECE
    tar = Tar("a.tar", put(s3, bucket, bytes(size)), size)
    with contextlib.closing(imagenet.source_of(bucket).open(tar)) as file:
        assert file.read(1) == b"\0"
        put(s3, bucket, b"\1" * size)
        with pytest.raises(InputError) as caught:
            file.read()
    assert str(caught.value) == f"s3://{bucket}/a.tar: {CHANGED}"


# ---- through Ray, as driver.py loads


def tar(number):
    rng = np.random.default_rng(number)
    names = [f"n{number}_{i}.JPEG" for i in range(3)]
    files = {name: jpeg(draw_image(number, rng, (100, 80))) for name in names}
    return make_tar(files | {"not an image": rng.bytes(PIECE)})


def load(bucket):
    """Load what is listed, as driver.py does; the names of all images."""
    with ending.Stop(), results.Report().lines():
        data = imagenet.find(imagenet.source_of(bucket), "", "train.txt")
        loaded = imagenet.load_tarfiles_from_s3(data.source, data.tars, [64, 64])
        parts = imagenet.report_loading(data, loaded)
    return sorted(name for tar in parts for name in ray.get(tar.filenames))


@pytest.fixture
def tars(one_ray, s3, bucket):
    """A bucket with five tars of two parts each; the names of the images."""
    for number in range(5):
        put(s3, bucket, tar(number), f"{number}.tar")
    return [f"{number}/n{number}_{i}.JPEG" for number in range(5) for i in range(3)]


def test_a_load_through_faults_is_whole(tars, proxy, bucket, capsys):
    passing = ["500", "503", "drop", "reset", "cut"]
    for number, fault in enumerate(passing):
        proxy.faults["GET", f"{number}.tar"] = iter([fault])
    assert load(bucket) == tars
    faults = Counter(request.fault for request in proxy.requests if request.method == "GET")
    whole = 1 + 2 * len(passing)  # the list, and two parts each
    assert faults == Counter([*passing, *[None] * whole])
    assert "Loading: 5 of 5 tars, 15 images" in capsys.readouterr().out.splitlines()


def test_a_load_with_an_unreadable_tar_ends_with_its_name(tars, proxy, bucket):
    proxy.faults["GET", "3.tar"] = itertools.repeat("403")
    with pytest.raises(InputError) as caught:
        load(bucket)
    assert str(caught.value).startswith(f"s3://{bucket}/3.tar: ") and str(caught.value).isprintable()


def test_a_load_ends_if_a_tar_changes(tars, proxy, s3, bucket):
    proxy.faults["GET", bucket] = iter([lambda: put(s3, bucket, b"new", "3.tar")])  # once it is listed
    with pytest.raises(InputError) as caught:
        load(bucket)
    assert str(caught.value).startswith(f"s3://{bucket}/3.tar") and " changed " in str(caught.value)
