"""ImageNet as tars and a label file, in a bucket or a folder: listing, loading, labels."""

import contextlib
import hashlib
import io
import itertools
import json
import re
import unicodedata
from collections import namedtuple
from functools import partial

from machinery.cluster import nodes, tasks
from machinery.errors import MAX_NAMED, InputError, one_line, say
from machinery.storage import folder, s3, terminal
from machinery.storage.images import IMAGE_SIZE, STORED_BYTES
from machinery.storage.tars import A_TAR, PART, decode_part, walk

import cv2
import ray

SEVERAL = -2  # the label of a name that has several, in several directories
JPEG_BYTES = 110_000  # of an average ILSVRC-2012 photo
TARS_A_CPU = 2  # are loaded at once: each one takes a process, whose start takes most of a second
HEAD = 2**20  # bytes of a tar by which the number of images in all tars is estimated
SECOND_LABEL = re.compile(r"\.\w{3,4} +\d+ *$")  # a number behind .JPEG; names may hold blanks

# The tars below a prefix of a source, and the key of their label file; no tars if there is no prefix.
DataSet = namedtuple("DataSet", "source prefix label_file tars")

# References to what `load_tarfile` makes of one part of a tar, None while the tar waits, and a function
# that starts to load the part that begins at a byte.
Loaded = namedtuple("Loaded", "images filenames report more")


def source_of(name):
    """Where data is read from, by its name: a folder's path or URL, or else the name of a bucket."""
    return folder.Folder.named(name) or s3.Bucket.named(name)


def digest(value):
    """A short fingerprint of a JSON-like value: of the tars with their ETags, or of the labels."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def find(source, prefix, label_file):
    """The DataSet of a prefix, which may be None."""
    if prefix is None:
        return DataSet(source, prefix, label_file, [])
    tars, others = list_tars(source, prefix)
    say(f"{source}/{prefix}*: {len(tars)} tars, {others} other keys left out")
    if not all(tar.etag for tar in tars):
        say(f"{source}: tars are listed without ETags, so a tar that changes is not noticed")
    return DataSet(source, prefix, label_file, tars)


def list_tars(source, prefix):
    """The tars below a prefix, sorted by key, and the number of other keys; InputError if no tar."""
    listed = list(source.keys(prefix))
    tars = [tar for tar in listed if tar.key.endswith(".tar")]
    if not tars:
        keys = [one_line(tar.key) for tar in itertools.islice(listed or source.keys(""), 3)]
        there = f"there are: {', '.join(keys)}" if keys else f"the {source.kind} is empty"
        missing = f"no key with the prefix {one_line(prefix)!r} ends in .tar"
        raise InputError(f"{source}: {missing}; {there}")
    return tars, len(listed) - len(tars)


def estimate_images(source, tars):
    """About how many images some tars hold, from the sizes of all and the head of the first."""
    total = sum(tar.size for tar in tars)
    with contextlib.closing(source.open(tars[0])) as file:
        head = file.read(HEAD)
    members = [member for _, member in walk(io.BytesIO(head), 0, len(head)) if member]
    ends = [member.offset_data + member.size for member in members if member.isreg()]
    whole = [end for end in ends if end <= len(head)]
    return round(total * len(whole) / whole[-1]) if whole else total // JPEG_BYTES


def form_of_images(source, tars, stored, room):
    """The form to store images of some tars in: `stored`, or pixels if they fit, where that is None.

    `room` tells for how many bytes of images there is room beside batches of so many bytes each.
    """
    images = estimate_images(source, tars)
    in_batch = min(images / len(tars), PART.images)
    rooms = {form: room(in_batch * size) for form, size in STORED_BYTES.items()}
    if not stored:
        stored = "pixels" if images * STORED_BYTES["pixels"] <= rooms["pixels"] else "jpeg"
    size, held = images * STORED_BYTES[stored], {"pixels": "decoded", "jpeg": "as JPEGs"}[stored]
    there = f"the object stores have room for {max(0, rooms[stored]) / 1e9:.1f} GB"
    if size > rooms[stored]:
        there += f": {(size - rooms[stored]) / 1e9:.1f} GB goes to disk (Ray spills it), and is slower"
    say(f"About {images} images: {size / 1e9:.1f} GB {held}, {there}")
    return stored


def load_tarfiles_from_s3(source, tars, size=(IMAGE_SIZE, IMAGE_SIZE), stored="pixels"):
    """Start to download and decode tars, one remote task each; returns a list of Loaded at once.

    These are the first parts of large tars. If tars are many, the last ones wait, see `report_loading`.
    `size` is [height, width] of the images, `stored` is their form, "pixels" or "jpeg".
    """

    def load(tar, start=0):
        options = {"num_returns": 3, "scheduling_strategy": "SPREAD", "name": _place(source, tar)}
        refs = tasks.start(load_tarfile, source, tar, start, tuple(size), stored, **options)
        return Loaded(*refs, more=partial(load, tar))

    at_once = tars_at_once()
    waiting = [Loaded(None, None, None, more=partial(load, tar)) for tar in tars[at_once:]]
    return [load(tar) for tar in tars[:at_once]] + waiting


def tars_at_once():
    """How many tars the nodes load at once."""
    return max(1, round(TARS_A_CPU * nodes.total("CPU")))


def _place(source, tar):
    return f"{source}/{one_line(tar.key)}"


def report_loading(data, loaded):
    """Wait for a DataSet's tars, a Loaded for each; start those that wait, and the rest of large ones.

    Returns all parts of all tars, in order. Shows how far it is, and says what was left out and why.
    """
    parts = [[] for _ in loaded]  # of each tar
    numbers, left, ended, images = {}, set(), 0, 0
    waiting = [number for number, tar in enumerate(loaded) if not tar.report]

    def add(number, part):
        parts[number].append(part)
        numbers[part.report] = number
        left.add(part.report)

    def what():
        first = [data.tars[number] for number in sorted(numbers[ref] for ref in left)[:3]]
        named = ", ".join(_place(data.source, tar) for tar in first) + ", ..." * (len(left) > 3)
        return f"Loading: {len(loaded) - ended} tars are still read ({named})"

    for number, tar in enumerate(loaded):
        if tar.report:
            add(number, tar)
    with terminal.bar(total=len(loaded), desc="Loading", unit="tar") as bar:
        for ref in tasks.wait(left, what):
            number, report = numbers[ref], ray.get(ref)
            images += report["images"]
            bar.set_postfix(images=images, refresh=False)
            if report["rest"] is not None:
                add(number, parts[number][-1].more(report["rest"]))
                continue
            while waiting and len(left) < tars_at_once():
                add(waiting[0], loaded[waiting.pop(0)].more())
            bar.update()
            ended += 1
            if bar.disable and ended * 10 // len(loaded) > (ended - 1) * 10 // len(loaded):
                say(f"Loading: {ended} of {len(loaded)} tars, {images} images")
    say_left_out(data, parts)
    return [part for of_tar in parts for part in of_tar]


def say_left_out(data, parts):
    """Name what was left out of the first few tars, from the reports of their parts; count the rest."""
    reports = [ray.get([part.report for part in of_tar]) for of_tar in parts]
    counts = [sum(report["left_out"] for report in of_tar) for of_tar in reports]
    spoilt = [number for number, count in enumerate(counts) if count]
    for number in spoilt[:MAX_NAMED]:
        named = [name for report in reports[number] for name in report["named"]][:MAX_NAMED]
        say(f"{_place(data.source, data.tars[number])}: {counts[number]} left out: {'; '.join(named)}")
    if more := spoilt[MAX_NAMED:]:
        say(f"{sum(counts[number] for number in more)} left out of {len(more)} more tars")


def load_tarfile(source, tar, start, size, stored):
    """What a load task makes of the part of a Tar that begins at a byte: images, names, a report.

    The n images are uint8 [n, height, width, 3] RGB or Jpegs, their names as `in_directory` has them.
    The report is a dict of `images` (n), `left_out` (a count), `named` (the first few), and `rest`, the
    byte at which the next part begins, or None.
    """
    cv2.setNumThreads(1)  # tasks run side by side
    with contextlib.closing(source.open(tar)) as file:
        images, paths, left_out, rest = decode_part(file, size, stored, start)
    if not paths and any(why == A_TAR for _, why in left_out):
        hint = "holds tars, no images: put it into a bucket with stage_imagenet.py"
        raise InputError(f"{_place(source, tar)}: {hint}")
    directory = tar.key.rpartition("/")[2].removesuffix(".tar")  # a tar of ImageNet is that of a class
    names = [in_directory(path, directory) for path in paths]
    named = [f"{one_line(name)[:100]}: {why}" for name, why in left_out[:MAX_NAMED]]
    report = {"images": len(names), "left_out": len(left_out), "named": named, "rest": rest}
    return images, names, report


def in_directory(path, outside=""):
    """A path's `directory/name`, by which an image and its label find each other.

    `outside` is the directory of a path that has none. Unicode is normalised (NFC), since file names
    from a Mac have accents as letters of their own.
    """
    *directories, name = re.split(r"[/\\]", unicodedata.normalize("NFC", path))
    return f"{([outside] + [d for d in directories if d not in ('', '.')])[-1]}/{name}"


def read_labels(source, key, num_classes):
    """The label file, lines of `directory/name.JPEG label`, as a dict name.JPEG -> int.

    If a name has different labels in several directories, the dict has SEVERAL for the name, and the
    label for each `directory/name.JPEG`. InputError with the line number for a malformed line, a label
    that is no integer in 0..num_classes-1, and a name that has two labels in one directory.
    """
    return parse_labels(source.read(key), num_classes, f"{source}/{one_line(key)}")


def parse_labels(data, num_classes, place):
    """`read_labels` on the file's bytes; `place` names it in errors."""
    try:
        lines = re.split("\r\n?|\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{place}, line {line}: not text; is it a label file?") from error
    by_name, by_path = {}, {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.replace("\t", " ").strip(" ").rpartition(" ")
        key, here = in_directory(path.rstrip(" ")), f"{place}, line {number}"
        name = key.partition("/")[2]
        if not name or SECOND_LABEL.search(path):
            raise InputError(f"{here}: not `directory/name.JPEG label`: {shorten(line)}")
        if not (re.fullmatch("[0-9]{1,9}", label) and int(label) < num_classes):
            raise InputError(f"{here}: label {shorten(label)} is no integer in 0..{num_classes - 1}")
        label = int(label)
        if by_path.setdefault(key, label) != label:
            raise InputError(f"{here}: {shorten(key.strip('/'))} already has label {by_path[key]}")
        if by_name.setdefault(name, label) != label:
            by_name[name] = SEVERAL
    if not by_name:
        raise InputError(f"{place}: holds no label; is it a label file?")
    several = [path for path in by_path if by_name[path.partition("/")[2]] == SEVERAL]
    return by_name | {path: by_path[path] for path in several}


def shorten(text):
    """At most 60 characters of a text, quoted, on one line."""
    return f"'{one_line(text)[:60]}'"
