"""Put ImageNet into an S3 bucket, as driver.py reads it.

    python stage_imagenet.py SOURCE s3://bucket[/prefix] [--resize 256]

SOURCE is ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz (or that
folder) beside it, or a folder that holds all of these, or a folder of train/nXXXXXXXX/*.JPEG and
val/nXXXXXXXX/*.JPEG (also Kaggle's, below ILSVRC/Data/CLS-LOC, and Tiny ImageNet's, with a folder
images/ in each class), or of class tars, or a tar of such folders. Where val/ has no class folders, the
devkit, Kaggle's LOC_val_solution.csv or Tiny ImageNet's val_annotations.txt must lie in val/, SOURCE or
above.
SOURCE can also be one, or a folder, of Hugging Face's archives train_images_*.tar.gz and
val_images.tar.gz, whose photos have the class in their names (also unpacked), of its parquet files
train-*.parquet and validation-*.parquet (they need pyarrow), or of WebDataset's tars. All archives of a
split belong together; their names or folders say which split it is. A .cls or .json beside a photo, or
the label of a row, is Caffe's number of the class, or its WNID.
Files that are no images by their first bytes, and the test set, are left out, counted and named.

What compressed archives and parquet files hold is copied to TMPDIR first, which needs as much room as
they have: photos of one class lie in all of them, and none can be read without those before it. All
else is read where it lies. No archive is in memory: of a parquet file, up to three of its pages are,
which have 100 photos each in Hugging Face's files, and 1,024 in those that pyarrow writes by itself.

Every tar is written anew from its images, so that all layouts give the same bytes, and carries a
fingerprint of them: the same command, run again, uploads only what is missing or differs. ImageNet's
photos have the names that ImageNet gave them: n01440764_10026_n01440764.jpg is n01440764_10026.JPEG.
A tar appears in the bucket whole or not at all; the label files come last. They keep the lines about
other tars that are there. A class that is there with other photos, from another part of the split, gets
a second tar.
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
import tempfile
import threading
from collections import defaultdict
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from machinery.errors import MAX_NAMED, ImageError, InputError, one_line
from machinery.storage.ilsvrc2012 import NO_CLASS, TRAIN, VAL, Image, caffe_labels, find_tars, stem_of
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


def stage_tar(folder, there, keys, list_images, before, side, stop):
    """Put a tar into the folder unless it is there. Returns its key, whether it was put, its Listing.

    It gets the first of two keys, or the second one if the first is that of other photos. `before` are
    the images that tars of these keys have, as paths. InputError if photos would be lost.
    """
    listing, sha = list_images(), new_fingerprint(side)
    images = listing.images
    for _ in read_images(images, stop, sha):
        pass
    fingerprint = sha.hexdigest()
    for key in keys:
        if has(folder, there, key, fingerprint):
            return key, False, listing
    key = key_of(folder, there, keys, before, set(map(label_path, images)))
    chunks = tar_bytes(images, side, stop, fingerprint)
    folder.upload_stream(Stream(chunks), key, {"fingerprint": fingerprint})
    return key, True, listing


def key_of(folder, there, keys, before, images):
    """Which of two keys a tar of some images gets. A tar with some of these is an older form of it."""
    taken = [key for key in keys if key in there]
    free = [key for key in keys if key not in there]
    other = before.isdisjoint(images)
    if not taken or not before:
        return keys[0]
    if other and free:
        return free[0]
    if not other and len(taken) == 1:
        return taken[0]
    hint = "put all archives of the split into one folder, and stage that; or name another prefix"
    raise InputError(f"{place_of(folder, taken[-1])}: has photos that would be lost; {hint}")


def place_of(folder, key):
    """What an error calls a file of the folder."""
    return f"s3://{folder.bucket}/{folder.prefix}{key}"


def has(folder, there, key, fingerprint):
    """Whether a file is `there` with this fingerprint."""
    return key in there and folder.metadata(key).get("fingerprint") == fingerprint


class Staged:
    """Of "train" or "val": keys, labels (a dict of `directory/name` -> label), and what is left out."""

    def __init__(self):
        """Nothing is staged yet."""
        self.keys, self.labels, self.others = set(), {}, []

    def add(self, key, listing):
        """Add a tar of this key."""
        self.keys.add(key)
        self.labels |= {label_path(image): caffe_labels()[image.wnid] for image in listing.images}
        self.others += listing.others


def stage_tars(name, tars, folder, there, before, side):
    """Put all tars of "train" or "val", several at a time; returns what is Staged.

    `tars` are pairs of two keys and a function, `before` the labels that are there. A progress bar on a
    terminal, plain lines elsewhere. Raises InputError.
    """
    staged, count, uploaded, stop = Staged(), 0, 0, threading.Event()
    pool = ThreadPoolExecutor(max(TARS_AT_ONCE, os.cpu_count() if side else 0))
    progress = bar(total=len(tars), desc=f"Staging {name}", unit="tar")
    known = images_by_tar(before)
    try:
        # No variable has all jobs, so that the finished ones go, with their lists of images.
        jobs = (
            pool.submit(stage_tar, folder, there, keys, list_images, known(keys[0]), side, stop)
            for keys, list_images in tars
        )
        for done, job in enumerate(as_they_end({*jobs}), 1):
            key, new, listing = job.result()
            uploaded, count = uploaded + new, count + len(listing.images)
            staged.add(key, listing)
            progress.set_postfix(uploaded=uploaded, refresh=False)
            progress.update()
            if progress.disable and done * 10 // len(tars) > (done - 1) * 10 // len(tars):
                say(f"Staging {name}: {done} of {len(tars)} tars, {uploaded} uploaded")
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        progress.close()
    say(f"{name}: {count} images in {len(tars)} tars, {uploaded} of them uploaded")
    return staged


# ---- label files


def label_path(image):
    """`directory/name` of an image; its name has its class already if others share it."""
    return image.name if "/" in image.name else f"{image.wnid}/{image.name}"


def labels_there(folder, there, key):
    """The labels of a label file that is there: a dict of path -> label, {} if there is no such file.

    InputError if it is none, or numbers the classes in another way than Caffe.
    """
    if key not in there:
        return {}
    folder.download(key)
    labels, place = {}, place_of(folder, key)
    lines = (folder.path / key).read_text("utf-8-sig", "replace").split("\n")
    for number, line in enumerate(lines, 1):
        path, _, label = line.strip().replace("\t", " ").rpartition(" ")
        path = path.strip()
        right = caffe_labels().get(directory_of(path), label)
        if line.strip() and not (path and label.isdecimal() and str(right) == label):
            why = f"{one_line(line)[:60]} is no label of Caffe's"
            raise InputError(f"{place}, line {number}: {why}; move it away, or name another prefix")
        if path:
            labels[path] = int(label)
    return labels


def directory_of(path):
    """The directory in which a label file's path ends, which is the class in those of this program."""
    return path.rpartition("/")[0].rpartition("/")[2]


def images_by_tar(labels):
    """A function that gives the paths of a tar's images by its key, by the labels that are there."""
    images = defaultdict(set)
    for path in labels:
        wnid = directory_of(path)
        image = Image.named(path.rpartition("/")[2], wnid, None)
        images[f"{TRAIN}/{wnid}.tar"].add(label_path(image))
    all_images = set().union(*images.values())  # a number is all that tars of val have for a name
    return lambda key: images[key] if key.startswith(TRAIN) else all_images


def with_kept(labels, before, strange, place):
    """Labels, and those `before` that can be of strange tars, a list of keys, which are there, too.

    InputError if a photo has two labels.
    """
    classes = {Path(key).stem for key in strange}
    of_any = not classes <= caffe_labels().keys()
    names = {path.rpartition("/")[2]: label for path, label in labels.items()} if of_any else {}
    kept = {}
    for path, label in before.items():
        name, directory = path.rpartition("/")[2], directory_of(path)
        if directory not in caffe_labels() and names.get(name, label) != label:
            why = f"{one_line(path)[:60]} has label {label}, but {names[name]} in SOURCE"
            raise InputError(f"{place}: {why}; move it away, or name another prefix")
        if path not in labels and (of_any or directory in classes):
            kept[path] = label
    if kept:
        say(f"{place}: keeps {len(kept)} lines about other tars that are there")
    if gone := before.keys() - labels.keys() - kept.keys():
        say(f"{place}: no longer has {len(gone)} lines that it had, such as {one_line(min(gone))}")
    return labels | kept


def put_labels(folder, there, key, labels):
    """Put a label file into the folder unless it is there."""
    data = "".join(sorted(f"{path} {label}\n" for path, label in labels.items())).encode()
    fingerprint = hashlib.sha256(data).hexdigest()
    if not has(folder, there, key, fingerprint):
        folder.upload_stream(Stream([data]), key, {"fingerprint": fingerprint})


def say_left_out(others):
    """Count what is left out, and name the first few."""
    if others:
        named = ", ".join(one_line(name)[:100] for name in sorted(others)[:MAX_NAMED])
        loose = sum(name.endswith(NO_CLASS) for name in others)
        images = f" ({loose} of them are images in no class)" if loose else ""
        say(f"{len(others)} files or folders are left out{images}: {named}")


def with_second_keys(tars, source):
    """Tars as pairs of two keys and a function. The second key has a folder named like SOURCE in it.

    It keeps apart what comes in several runs: some archives of a split, and later the others.
    """
    part = re.sub("[^A-Za-z0-9_-]", "_", stem_of(source.absolute()))
    keys = {key: key.replace("/", f"/{part}/") for key in tars}
    return [((key, keys[key]), tars[key]) for key in tars]


def stage(source, url, side):
    """Put SOURCE into `s3://bucket/prefix`: all tars, then the label files. Raises InputError."""
    folder = Destination(url)
    folder.check()
    with tempfile.TemporaryDirectory(prefix="stage-imagenet-") as scratch:
        found, others = find_tars(source, Path(scratch))
        there = {key for start in (TRAIN, VAL, "train.txt", "val.txt") for key in folder.names(start)}
        before = {name: labels_there(folder, there, f"{name}.txt") for name in found}
        tars = {name: with_second_keys(found[name], source) for name in found}
        staged = {n: stage_tars(n, tars[n], folder, there, before[n], side) for n in tars}
    say_left_out(others + [other for each in staged.values() for other in each.others])
    all_strange = []
    for name, each in staged.items():
        directory = next(iter(found[name])).partition("/")[0]
        strange = [key for key in there if key.startswith(f"{directory}/") and key not in each.keys]
        label_file = f"{name}.txt"
        kept = with_kept(each.labels, before[name], strange, place_of(folder, label_file))
        put_labels(folder, there, label_file, kept)
        all_strange += strange
    if all_strange:
        first = f"{folder.prefix}{one_line(min(all_strange))}"
        say(f"Not of {source}, but there: {first}, {len(all_strange)} in all")
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
