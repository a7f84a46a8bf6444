"""Put ImageNet into an S3 bucket, as driver.py reads it.

    python stage_imagenet.py SOURCE s3://bucket[/prefix] [--resize 256]

SOURCE is ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz (or that
folder) beside it, or a folder that holds all of these, or a folder of train/nXXXXXXXX/*.JPEG and
val/nXXXXXXXX/*.JPEG (also Kaggle's, below ILSVRC/Data/CLS-LOC, and Tiny ImageNet's, with a folder
images/ in each class), or of class tars, or a tar of such folders. Where val/ has no class folders, the
devkit, Kaggle's LOC_val_solution.csv or Tiny ImageNet's val_annotations.txt must lie in val/, SOURCE or
above.
Files that are no images by their first bytes are left out, counted and named.

Nothing is unpacked to disk. Every tar is written anew from its images, so that all layouts give the
same bytes, and carries a fingerprint of them: the same command, run again, uploads only what is missing
or differs. A tar appears in the bucket whole or not at all; the label files come last.
"""

import argparse
import contextlib
import hashlib
import io
import os
import re
import shlex
import signal
import sys
import tarfile
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from machinery.errors import MAX_NAMED, ImageError, InputError, one_line
from machinery.storage.ilsvrc2012 import NO_CLASS, TRAIN, VAL, caffe_labels, find_tars
from machinery.storage.images import QUALITY, small_jpeg
from machinery.storage.places import S3Folder, as_they_end
from machinery.storage.s3 import AHEAD, PIECE
from machinery.storage.terminal import bar, say

from boto3.s3.transfer import TransferConfig

PARTS = TransferConfig(multipart_chunksize=PIECE, max_concurrency=AHEAD)
TARS_AT_ONCE = 8  # tars read and uploaded at the same time; with --resize one a CPU, if that is more


class Destination(S3Folder):
    """A folder in S3, `s3://bucket/prefix`, to put files into that were never on disk."""

    def try_out(self, name):
        """Put a small file, and delete it if S3 allows that; InputError if it cannot be put."""
        self.upload_stream(io.BytesIO(b"This may be deleted."), ".check", {})
        with contextlib.suppress(InputError):
            self.delete(".check")

    def upload_stream(self, stream, name, metadata):
        """Put what a file object has to read, with a dict of metadata; some twelve parts are in memory.

        If reading raises, nothing is put. Threads may call this and `metadata` at the same time.
        """
        with self.file(name) as there:
            options = {"ExtraArgs": {"Metadata": metadata}, "Config": PARTS}
            self.client.upload_fileobj(stream, *there.values(), **options)

    def metadata(self, name):
        """The metadata that a file was put with."""
        with self.file(name) as there:
            return self.client.head_object(**there)["Metadata"]


def new_fingerprint(side):
    """A SHA-256 to feed with images; the way they are going to be encoded is part of it."""
    return hashlib.sha256(f"{side and (side, QUALITY)}".encode())


def read_images(images, stop, sha):
    """Yield name and bytes of each image, and feed both to `sha`; CancelledError once `stop` is set."""
    for image in images:
        if stop.is_set():
            raise CancelledError
        try:
            with image.path.open("rb") as file:
                file.seek(image.offset)
                data = file.read(image.size)
        except OSError as error:
            raise InputError(f"{image.path}: {error.strerror}") from error
        sha.update(f"{image.name}/{len(data)}/".encode())
        sha.update(data)
        yield image.name, data


def tar_bytes(images, side, stop, fingerprint):
    """Yield a tar of images bit by bit, resized to `side` x `side` pixels unless that is None.

    Names and contents alone decide on its bytes. InputError at the end if the fingerprint is another.
    """
    sha = new_fingerprint(side)
    for name, data in read_images(images, stop, sha):
        data = resize(data, side) if side else data
        info = tarfile.TarInfo(name)
        info.size = len(data)
        yield from (info.tobuf(), data, bytes(-len(data) % tarfile.BLOCKSIZE))
    yield bytes(2 * tarfile.BLOCKSIZE)
    if sha.hexdigest() != fingerprint:
        raise InputError(f"{images[0].path} changed while it was read; start again")


def resize(data, side):
    """An encoded image as a JPEG of `side` x `side` pixels. It stays as it is if it can't be decoded.

    The driver leaves such an image out and says so.
    """
    try:
        return small_jpeg(data, (side, side))
    except ImageError:
        return data


class Stream:
    """A file object, to be read once, of what an iterator over bytes yields."""

    def __init__(self, chunks):
        """Read from these chunks."""
        self._chunks, self._buffer = iter(chunks), bytearray()

    def read(self, size=sys.maxsize):
        """So many bytes, or fewer at the end."""
        while len(self._buffer) < size and (chunk := next(self._chunks, None)) is not None:
            self._buffer += chunk
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


def stage_tar(folder, there, key, list_images, side, stop):
    """Put a tar into the folder unless it is there. Returns whether it was put, and its Listing."""
    listing, sha = list_images(), new_fingerprint(side)
    images = listing.images
    for _ in read_images(images, stop, sha):
        pass
    fingerprint = sha.hexdigest()
    chunks = tar_bytes(images, side, stop, fingerprint)
    return put(folder, there, key, chunks, fingerprint), listing


def put(folder, there, key, chunks, fingerprint):
    """Put a file unless it is `there` with this fingerprint. Returns whether it was put."""
    if key in there and folder.metadata(key).get("fingerprint") == fingerprint:
        return False
    folder.upload_stream(Stream(chunks), key, {"fingerprint": fingerprint})
    return True


def stage_tars(name, tars, folder, there, side):
    """Put all tars of "train" or "val", several at a time.

    Returns the text of their label file, and what was left out. A progress bar on a terminal, plain
    lines elsewhere. Raises InputError.
    """
    lines, others, count, uploaded, stop = set(), [], 0, 0, threading.Event()
    pool = ThreadPoolExecutor(max(TARS_AT_ONCE, os.cpu_count() if side else 0))
    progress = bar(total=len(tars), desc=f"Staging {name}", unit="tar")
    try:
        # No variable has all jobs, so that the finished ones go, with their lists of images.
        jobs = (pool.submit(stage_tar, folder, there, *tar, side, stop) for tar in tars.items())
        for done, job in enumerate(as_they_end({*jobs}), 1):
            new, listing = job.result()
            uploaded, count = uploaded + new, count + len(listing.images)
            lines |= {label_line(image) for image in listing.images}
            others += listing.others
            progress.set_postfix(uploaded=uploaded, refresh=False)
            progress.update()
            if progress.disable and done * 10 // len(tars) > (done - 1) * 10 // len(tars):
                say(f"Staging {name}: {done} of {len(tars)} tars, {uploaded} uploaded")
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        progress.close()
    say(f"{name}: {count} images in {len(tars)} tars, {uploaded} of them uploaded")
    return "".join(sorted(lines)), others


def label_line(image):
    """The line of the label file about an image; its name has its class already if others share it."""
    name = image.name if "/" in image.name else f"{image.wnid}/{image.name}"
    return f"{name} {caffe_labels()[image.wnid]}\n"


def say_left_out(others):
    """Count what is left out, and name the first few."""
    if others:
        named = ", ".join(one_line(name)[:100] for name in sorted(others)[:MAX_NAMED])
        loose = sum(name.endswith(NO_CLASS) for name in others)
        images = f" ({loose} of them are images in no class)" if loose else ""
        say(f"{len(others)} files or folders are left out{images}: {named}")


def stage(source, url, side):
    """Put SOURCE into `s3://bucket/prefix`: all tars, then the label files. Raises InputError."""
    tars, others = find_tars(source)
    folder = Destination(url)
    folder.check()
    there = {key for start in (TRAIN, VAL, "train.txt", "val.txt") for key in folder.names(start)}
    staged = {name: stage_tars(name, tars[name], folder, there, side) for name in tars}
    say_left_out(others + [other for _, left_out in staged.values() for other in left_out])
    for name, (text, _) in staged.items():
        data = text.encode()
        put(folder, there, f"{name}.txt", [data], hashlib.sha256(data).hexdigest())
    ours = {key for keys in tars.values() for key in keys}
    directories = {key.partition("/")[0] for key in ours}
    if strange := {key for key in there if key.partition("/")[0] in directories} - ours:
        first = f"{folder.prefix}{one_line(min(strange))}"
        say(f"Not of {source}, but there: {first}, {len(strange)} in all")
    prefix = shlex.quote(folder.prefix) if folder.prefix else ""
    flags = f"--s3-bucket {folder.bucket}"
    if "train" in tars:
        flags += f" --key-prefix {prefix}{TRAIN}/ --label-file {prefix}train.txt"
    if "val" in tars:
        flags += f" --val-prefix {prefix}{VAL}/ --val-label-file {prefix}val.txt"
    say(f"Now: python driver.py {flags}")


def main(argv=None):
    """Stage as the command line says.

    Returns the exit status: 0, 2 (unusable input), 130, 141 (whoever read the output has gone).
    """
    parser = argparse.ArgumentParser(description="Put ImageNet into an S3 bucket, for driver.py.")
    what = "folder, or official tar, class tar or tar of folders; README lists the layouts"
    parser.add_argument("source", metavar="SOURCE", type=Path, help=what)
    parser.add_argument("url", metavar="s3://bucket[/prefix]", help="where to put it")
    what = "make images SIDE x SIDE pixels (the driver uses 256)"
    parser.add_argument("--resize", type=int, metavar="SIDE", help=what)
    args = parser.parse_args(argv)
    if args.resize is not None and not 1 <= args.resize <= 1024:
        parser.error("--resize must be 1 to 1024")
    if not re.fullmatch("(?i:s3)://[^/]+(/.*)?", args.url):
        parser.error(f"{args.url} is not s3://bucket or s3://bucket/prefix")
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        stage(args.source.expanduser(), f"s3{args.url[2:]}", args.resize)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except (InputError, OSError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, terminate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
