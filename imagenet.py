"""ImageNet in S3: listing the tars, loading them, the label file."""

import contextlib
import functools
import hashlib
import io
import json
import math
import re
import time
import unicodedata
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cv2
import ray
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import HTTPClientError, IncompleteReadError
from s3transfer.exceptions import RetriesExceededError
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

import terminal
from decoding import A_TAR, decode_part, one_line, walk
from s3 import PATIENT, InputError, data_client, s3_errors, s3_location
from watching import Wait

IMAGE_SIZE = 256  # side of an image in the object store, pixels (the write-up; paper, section 2)

# Bytes of an image in each form that it can be stored in; as a JPEG, on an average of ILSVRC-2012.
STORED_BYTES = {"pixels": IMAGE_SIZE * IMAGE_SIZE * 3, "jpeg": 24_000}

CROP_SIZE = 224  # side of the square crop of it that the network sees, pixels (paper, section 4.1)

STORM = 30  # seconds for which a piece of a tar is asked for anew if every attempt breaks off

PIECE = 8 * 2**20  # bytes of one request

AHEAD = 4  # pieces of a tar that are fetched while one is decoded

ATTEMPTS = 8  # to read one piece, of which each begins with as many requests as PATIENT says

PATIENCE = 30  # seconds of waiting after which the run says what it waits for, and again

MAX_NAMED = 5  # left-out members (or keys) that a report names; the others are only counted

SEVERAL = -2  # the label of a name that has several, in several directories

JPEG_BYTES = 110_000  # of an average ILSVRC-2012 photo

PARTS = TransferConfig(
    multipart_chunksize=PIECE,
    io_chunksize=PIECE,  # a part at once: in small pieces, threads take turns for half the time
    max_concurrency=AHEAD,
    num_download_attempts=ATTEMPTS,
)


# A tar as it is listed; `size` is in bytes.
Tar = namedtuple("Tar", "key etag size")

# References to what a load task makes of one part of a tar: n images uint8 [n, height, width, 3] RGB,
# or Jpegs; n names as `in_directory` has them; a dict of `key`, `images` (n), `left_out` (a count),
# `named` (the first few of those) and `rest` (where the next part begins, or None). `more(rest)` starts
# to load that part.
Loaded = namedtuple("Loaded", "images filenames report more")


def digest(value):
    """A short fingerprint of a JSON-like value: of the tars with their ETags, or of the labels."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def list_tars(bucket, prefix):
    """The tars below a prefix in the order of their keys, and how many other keys there are.

    Raises InputError where the bucket cannot be listed or holds no tar below the prefix.
    """
    with s3_errors(bucket):
        pages = data_client(**s3_location()).get_paginator("list_objects").paginate
        found = [page.get("Contents", []) for page in pages(Bucket=bucket, Prefix=prefix)]
        listed = [obj for page in found for obj in page]
        tars = [Tar(o["Key"], o["ETag"], o["Size"]) for o in listed if o["Key"].endswith(".tar")]
        if not tars:
            there = listed or next(iter(pages(Bucket=bucket))).get("Contents", [])
            keys = [obj["Key"] for obj in there[:3]]
            there = f"there are: {', '.join(map(one_line, keys))}" if keys else "the bucket is empty"
            missing = f"no key with the prefix {one_line(prefix)!r} ends in .tar"
            raise InputError(f"s3://{bucket}: {missing}; {there}")
    return tars, len(listed) - len(tars)


def estimate_images(bucket, tars):
    """About how many images some tars hold, from the sizes of all and the head of the first."""
    total, head = sum(tar.size for tar in tars), b""
    if tars[0].size:
        client, first = data_client(**s3_location()), {"Bucket": bucket, "Key": tars[0].key}
        # A body that breaks off is not read again: there is an answer without it.
        broken = contextlib.suppress(IncompleteReadError, HTTPClientError)
        with s3_errors(bucket, tars[0].key), broken:
            head = client.get_object(**first, Range="bytes=0-1048575")["Body"].read()
    members = [member for _, member in walk(io.BytesIO(head), 0, len(head)) if member]
    ends = [member.offset_data + member.size for member in members if member.isreg()]
    whole = [end for end in ends if end <= len(head)]
    return round(total * len(whole) / whole[-1]) if whole else total // JPEG_BYTES


def form_that_fits(images, room):
    """The form to store so many images in, if there is room for so many bytes: pixels if they fit."""
    return "pixels" if images * STORED_BYTES["pixels"] <= room else "jpeg"


def memory_needed(images, stored, room):
    """A line that says what images take of memory, and of disk if there is room for fewer bytes."""
    size, form = images * STORED_BYTES[stored], {"pixels": "decoded", "jpeg": "as JPEGs"}[stored]
    held = f"{size / 1e9:.1f} GB {form}, the object stores have room for {max(0, room) / 1e9:.1f} GB"
    if size > room:
        held += f": {(size - room) / 1e9:.1f} GB goes to disk (Ray spills it), and is slower"
    return f"About {images} images: {held}"


def load_tarfiles_from_s3(bucket, tars, size, tasks, stored="pixels"):
    """Start to download and decode tars, one remote task each; returns a list of Loaded at once.

    A large tar takes one task after the other: these Loaded are its first parts. `size` is [height,
    width] of the images, `tasks` are the cluster's DataTasks, `stored` is the form of the images,
    "pixels" or "jpeg".
    """
    with s3_errors(bucket):
        where = s3_location()
    options = {"num_returns": 3, "scheduling_strategy": "SPREAD"}

    def load(tar, start=0):
        options["name"] = f"s3://{bucket}/{one_line(tar.key)}"
        what = bucket, tar, start, tuple(size), stored, where
        return Loaded(*tasks.start(load_tarfile, *what, **options), more=partial(load, tar))

    return [load(tar) for tar in tars]


def report_loading(bucket, loaded, say):
    """Wait for tars that are loaded, a list of Loaded, and start to load the rest of large ones.

    Returns all parts of all tars, in order. Shows how far it is, a progress bar on a terminal, lines
    that `say` takes elsewhere, and then says what was left out and why. Raises a task's InputError.
    """
    parts, ended = [[part] for part in loaded], 0
    left, reports = {part.report: number for number, part in enumerate(loaded)}, []
    wait = Wait(say)
    with terminal.bar(total=len(left), desc="Loading", unit="tar") as bar:
        while left:
            done, _ = ray.wait(list(left), num_returns=1, timeout=PATIENCE)
            if not done:
                wait.is_long(f"Loading: {len(left)} tars are still read")
                continue
            wait.goes_on()
            number = left.pop(done[0])
            try:
                reports += ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, InputError):
                    raise error.cause from None
                raise
            images, count = sum(report["images"] for report in reports), len(loaded)
            bar.set_postfix(images=images, refresh=False)
            if (rest := reports[-1]["rest"]) is not None:
                parts[number].append(part := parts[number][-1].more(rest))
                left[part.report] = number
                continue
            ended += 1
            bar.update()
            if bar.disable and ended * 10 // count > (ended - 1) * 10 // count:
                say(f"Loading: {ended} of {count} tars, {images} images")
    say_left_out(bucket, reports, say)
    return [part for some in parts for part in some]


def say_left_out(bucket, reports, say):
    """Name what was left out of the first few tars, from all parts' reports, and count the rest."""
    counts, named = Counter(), defaultdict(list)
    for report in reports:
        counts[report["key"]] += report["left_out"]
        named[report["key"]] += report["named"]
    spoilt = sorted(key for key in counts if counts[key])
    for key in spoilt[:MAX_NAMED]:
        names = "; ".join(named[key][:MAX_NAMED])
        say(f"s3://{bucket}/{one_line(key)}: {counts[key]} left out: {names}")
    if len(spoilt) > MAX_NAMED:
        rest = sum(counts[key] for key in spoilt[MAX_NAMED:])
        say(f"{rest} left out of {len(spoilt) - MAX_NAMED} more tars")


def load_tarfile(bucket, tar, start, size, stored, where):
    """What a load task does: a part of a Tar as images, their names and a report, as in Loaded."""
    cv2.setNumThreads(1)  # tasks run side by side
    with contextlib.closing(S3Tar(bucket, tar, where)) as file:
        images, paths, left_out, rest = decode_part(file, size, stored, start)
    if not paths and any(why == A_TAR for _, why in left_out):
        hint = "holds tars, no images: put it into a bucket with stage_imagenet.py"
        raise InputError(f"s3://{bucket}/{one_line(tar.key)}: {hint}")
    directory = tar.key.rpartition("/")[2].removesuffix(".tar")  # a tar of ImageNet is that of a class
    names = [in_directory(path, directory) for path in paths]
    named = [f"{one_line(name)[:100]}: {why}" for name, why in left_out[:MAX_NAMED]]
    counts = {"images": len(names), "left_out": len(left_out)}
    return images, names, {"key": tar.key, "named": named, "rest": rest} | counts


class S3Tar:
    """A Tar in S3, as a file object to read forwards: threads fetch the next pieces ahead of time.

    What lies behind is let go: AHEAD + 1 pieces are in memory. Raises InputError if the tar is
    unreadable or has changed since it was listed.
    """

    def __init__(self, bucket, tar, where, config=PATIENT, storm=STORM):
        """Nothing is asked of S3 yet. `where` is that of `s3_location`, `config` is botocore's."""
        self._bucket, self._tar, self._storm, self._place = bucket, tar, storm, 0
        self._client = _client(config, **where)
        self._pieces, self._threads = {}, ThreadPoolExecutor(AHEAD)  # number -> Future of its bytes

    def close(self):
        """Begin to fetch nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def seek(self, offset, whence=io.SEEK_SET):
        """Go to a byte, and return its number."""
        self._place = offset + (self._tar.size if whence == io.SEEK_END else 0)
        return self._place

    def read(self, size=None):
        """The next bytes: so many, or all to the end."""
        end = self._tar.size if size is None else min(self._place + size, self._tar.size)
        read = []
        while self._place < end:
            number, skipped = divmod(self._place, PIECE)
            read.append(self._piece(number)[skipped : skipped + end - self._place])
            self._place += len(read[-1])
        return b"".join(read)

    def _piece(self, number):
        wanted = range(number, min(number + AHEAD + 1, math.ceil(self._tar.size / PIECE)))
        for behind in self._pieces.keys() - set(wanted):
            self._pieces.pop(behind).cancel()
        for n in wanted:
            if n not in self._pieces:
                self._pieces[n] = self._threads.submit(self._fetch, n * PIECE)
        with s3_errors(self._bucket, self._tar.key):
            return self._pieces[number].result()

    def _fetch(self, start):
        stop = min(start + PIECE, self._tar.size)
        what = {"Bucket": self._bucket, "Key": self._tar.key, "Range": f"bytes={start}-{stop - 1}"}
        deadline, attempts = time.monotonic() + self._storm, 0
        while True:
            attempts += 1
            try:  # boto3 tries a request again, but not one whose body breaks off
                data = self._client.get_object(**what, IfMatch=self._tar.etag)["Body"].read()
                if len(data) != stop - start:
                    raise ValueError("S3 has sent other bytes than it was asked for")
                return data
            except S3_RETRYABLE_DOWNLOAD_ERRORS as error:
                if attempts >= ATTEMPTS:
                    if time.monotonic() > deadline:
                        raise RetriesExceededError(error) from error
                    time.sleep(2)


def download(bucket, key, config=PATIENT):
    """One object as bytes; InputError if it is unreadable, or changes meanwhile.

    `config` is botocore's: how long it waits, and what it tries again.
    """
    body = io.BytesIO()
    with s3_errors(bucket, key):
        _client(config, **s3_location()).download_fileobj(bucket, key, body, Config=PARTS)
    return body.getvalue()


_client = functools.cache(data_client)  # a new one takes 50 ms


def in_directory(path, outside=""):
    """A path's `directory/name`, by which an image and its label find each other.

    `outside` is the directory of a path that has none. Slashes of both kinds separate. Unicode is
    normalised (NFC), since file names from a Mac have accents as letters of their own.
    """
    *directories, name = re.split(r"[/\\]", unicodedata.normalize("NFC", path))
    return f"{([outside] + [d for d in directories if d not in ('', '.')])[-1]}/{name}"


def read_labels(bucket, key, num_classes):
    """The label file, lines of `directory/name.JPEG label`, as a dict name.JPEG -> int.

    If a name has different labels in several directories, the dict has SEVERAL for the name, and the
    label for each `directory/name.JPEG`.
    Raises InputError with the line number for a line that is malformed, a label that is no integer
    or outside 0..num_classes-1, and a name that has two labels in one directory.
    """
    return parse_labels(download(bucket, key), num_classes, f"s3://{bucket}/{one_line(key)}")


def parse_labels(data, num_classes, place):
    """`read_labels` on the file's bytes; `place` names it in errors."""
    try:
        lines = re.split("\r\n?|\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{place}, line {line}: not text; is it a label file?") from error
    labels, several = {}, set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, label = _fields(line)
        name, here = in_directory(path).partition("/")[2], f"{place}, line {number}"
        if not name or not label or _SECOND_LABEL.search(path):
            raise InputError(f"{here}: not `directory/name.JPEG label`: {shorten(line)}")
        if not (re.fullmatch("[0-9]{1,9}", label) and int(label) < num_classes):
            raise InputError(f"{here}: label {shorten(label)} is no integer in 0..{num_classes - 1}")
        if labels.setdefault(name, int(label)) != int(label):
            several.add(name)
    if not labels:
        raise InputError(f"{place}: holds no label; is it a label file?")
    return labels | dict.fromkeys(several, SEVERAL) | _by_directory(lines, several, place)


# A name may hold blanks, but a number after .JPEG is a second label.
_SECOND_LABEL = re.compile(r"\.\w{3,4}[ \t]+\d+$")


def _fields(line):
    """What a line of the label file has before its last field, and that field."""
    line = line.strip(" \t")
    end = max(line.rfind(" "), line.rfind("\t"))
    return (line[:end].rstrip(" \t"), line[end + 1 :]) if end > 0 else (line, "")


def _by_directory(lines, names, place):
    """The labels of some names by their directories, from the lines of a label file."""
    labels = {}
    for number, line in enumerate(lines if names else [], 1):
        path, label = _fields(line)
        key = in_directory(path)
        if key.partition("/")[2] in names and labels.setdefault(key, int(label)) != int(label):
            why = f"{shorten(key.strip('/'))} already has label {labels[key]}"
            raise InputError(f"{place}, line {number}: {why}")
    return labels


def shorten(text):
    """At most 60 characters of a text, quoted, on one line."""
    return f"'{one_line(text)[:60]}'"
