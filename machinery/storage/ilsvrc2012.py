"""ImageNet (ILSVRC-2012) as people have it on disk: its layouts, its classes, its ground truth.

An `Image` says where the bytes of a photo lie. Mostly that is where SOURCE has them. What compressed
archives and parquet files hold is copied to a temporary folder first: it is not sorted by class, and a
photo in there cannot be read without those before it. What is an image is told by its first bytes,
never by its name; all other files are listed, too, to be named.
"""

import bz2
import contextlib
import csv
import functools
import gzip
import io
import json
import lzma
import math
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from machinery.errors import MAX_NAMED, InputError, one_line
from machinery.storage.images import kind_of
from machinery.storage.terminal import bar, say

import numpy as np
import scipy.io

VAL_IMAGES = 2000  # images of one validation tar
TRAIN, VAL = "ILSVRC2012_img_train", "ILSVRC2012_img_val"
TRAIN_FOLDERS = ("train", TRAIN)
VAL_FOLDERS = ("val", VAL, "valid", "validation")
DEVKIT, KAGGLE_TRUTH = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv"
TINY_TRUTH = "val_annotations.txt"

# Below SOURCE, where people unpack ImageNet; Kaggle's archive has all of these folders.
ROOTS = ("", "ILSVRC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
DEPTH = 4  # levels of folders below SOURCE in which archives are found

KNOWN = (
    f"{TRAIN}.tar, {VAL}.tar, train/nXXXXXXXX/*.JPEG or val/nXXXXXXXX/*.JPEG, also below "
    "ILSVRC/Data/CLS-LOC/ (Kaggle), with images/ (Tiny ImageNet), in one tar, or as class tars; "
    "train_images_*.tar.gz, val_images.tar.gz, train-*.parquet, validation-*.parquet (Hugging Face); "
    "imagenet1k-train-*.tar (WebDataset); photos whose names have the class (nXXXXXXXX_1.JPEG)"
)

NO_CLASS = "(an image in no class)"
OF_TEST = "(the test set has no labels)"

WNID = re.compile(r"n\d{8}")
_CLASS_IN_NAME = re.compile(r"(?:^|_)(n\d{8})(?=[_.-]|$)")
# The name that ImageNet gave a photo; it can have the class behind, or another form of the suffix.
_OWN_NAME = re.compile(r"(n\d{8}_\d+|ILSVRC2012_(?:val|test)_\d{8})(?:_(n\d{8}))?\.(?i:jpe?g)")
_SPLIT = re.compile("(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])", re.IGNORECASE)

_ARCHIVE = re.compile(r"(?i)(.+?)\.(tar|tgz|tbz2?|txz|tar\.(?:gz|bz2|xz)|parquet)")
_NO_PHOTOS = re.compile("(?i)bbox|devkit|_t3|annotation")  # in the names of ImageNet's other archives
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by the first bytes
_PARQUET = b"PAR1"
_POINTER = b"version "  # what Git has instead of a large file
SOME_TIME = 10**9  # bytes that take some time to be copied, so that a line says what is done
PIECE = 2**20  # bytes of a compressed archive that are in memory at once
ROWS = 32  # rows of a parquet file that are in memory at once

# The columns of photos, of labels and of the photos' names: of each, the first that is there is taken.
_LABELS = ("label", "labels", "cls", "wnid", "synset", "class")
_COLUMNS = (
    ("image", "img", "jpg", "jpeg", "png", "webp", "photo"),
    _LABELS,
    ("__key__", "file_name", "filename"),
)

_NOTES = (".cls", ".json", ".txt")  # WebDataset's files beside an image
_NOTE_BYTES = 2**16  # the size of a larger one says that it is something else


class Image(NamedTuple):
    """Where the bytes of an image lie: in a file of its own, or somewhere within another file."""

    name: str  # in the tar that it goes into
    wnid: str  # "" where only the ground truth knows it
    path: Path
    offset: int = 0
    size: int = -1  # bytes; -1: to the end of the file

    @classmethod
    def named(cls, name, wnid, path, offset=0, size=-1):
        """The Image of a file of this name. If `wnid` is "", the class is that in the name.

        One of ImageNet's photos gets the name that ImageNet gave it: it is the same in all layouts.
        """
        wnid = wnid or class_in(name)
        own = _OWN_NAME.fullmatch(name)
        if own and own[2] in (None, wnid):
            name = f"{own[1]}.JPEG"
        return cls(name, wnid, path, offset, size)


class Listing(NamedTuple):
    """The images of a tar to be made, sorted by name, and texts that name what was left out."""

    images: list
    others: list


class Member(NamedTuple):
    """A regular file in a tar: its path, where it lies, and what it is.

    That is "image" or "tar" by its first bytes, and "note" for a file of WebDataset's beside an image.
    """

    name: str
    offset: int
    size: int
    kind: str


_NOTHING = Member("", 0, 0, "other")


@functools.cache
def caffe_labels():
    """Caffe's labels: a dict of WNID -> its rank among the sorted 1,000 of ILSVRC-2012."""
    wnids = Path(__file__).with_name("ilsvrc2012-wnids.txt").read_text().split()
    return {wnid: rank for rank, wnid in enumerate(sorted(wnids))}


def check_wnid(wnid, place):
    """InputError if a WNID, found at a place, is none of ILSVRC-2012's."""
    if wnid not in caffe_labels():
        raise InputError(f"{place}: {one_line(wnid)} is none of the 1,000 WNIDs of ILSVRC-2012")


def class_in(name):
    """The WNID in the name of a photo, the last one if there are several; "" if there is none."""
    return "".join(_CLASS_IN_NAME.findall(name)[-1:])


def split_of(name):
    """What the name of a file or folder says: "train", "val", "test", or "" if none or several."""
    splits = {split.lower() for split in _SPLIT.findall(name)}
    return splits.pop() if len(splits) == 1 else ""


class Found:
    """What is found of SOURCE so far: images of both splits, and texts that name what is left out."""

    def __init__(self, source, scratch):
        """Nothing is found yet. `scratch` is an empty folder for what has to be copied."""
        self.source, self.scratch = source, scratch
        self.listings = defaultdict(list)  # of train: WNID -> functions that give a Listing each
        self.images = defaultdict(list)  # of train, too: WNID -> Images
        self.val, self.truth = [], []  # Images, and the folders that may have their ground truth
        self.others = []
        self.copies = {}  # path of a copy -> that of its archive
        self.problems = {}  # split -> the InputError to raise if nothing of that split is found

    def missing(self):
        """The set of splits, "train" and "val", of which nothing is found."""
        there = {"train": self.listings or self.images, "val": self.val}
        return {split for split in there if not there[split]}

    def add(self, image, split, place):
        """Add an Image of "train" or "val", which was found at a place."""
        _check_name(image, place)
        if image.wnid:
            check_wnid(image.wnid, place)
        if split == "val":
            self.val.append(image)
        elif image.wnid:
            self.images[image.wnid].append(image)
        else:
            why = "its class is not in a folder's name, its own (nXXXXXXXX_1.JPEG) or a .cls beside it"
            raise InputError(f"{place}: {one_line(image.name)}: {why}")

    def tars(self):
        """The tars to make, as `find_tars` returns them."""
        tars = {}
        if wnids := self.listings.keys() | self.images.keys():
            tars["train"] = {f"{TRAIN}/{w}.tar": partial(self.class_listing, w) for w in sorted(wnids)}
        if self.val:
            tars["val"] = val_tars(self.val, [*dict.fromkeys(self.truth)], self.others)
        return tars

    def class_listing(self, wnid):
        """The Listing of a class of train, from all places where it was found."""
        listings = [listing() for listing in self.listings.get(wnid, [])]
        listings.append(Listing(self.images.get(wnid, []), []))
        images, others = without_doubles([image for each in listings for image in each.images])
        return Listing(images, [other for each in listings for other in each.others] + others)


def find_tars(source, scratch):
    """The tars to make of SOURCE, for "train", "val" or both, and texts that name what is left out.

    The tars are a dict of key -> function that gives a Listing. `scratch` is an empty folder for what
    has to be copied; it must stay until all tars are made. InputError where there is nothing to stage,
    a class is unknown or ground truth is missing.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if zipfile.is_zipfile(source):
        raise InputError(f"{source}: unpack it first; then SOURCE can have {KNOWN}")
    found = Found(source, scratch)
    if source.is_file():
        add_archives(found, [(source, split_at(source, source.parent))])
    else:
        search(found)
    if found.missing() == {"train", "val"}:
        raise InputError(_nothing(source))
    return found.tars(), found.others


def search(found):
    """Find both splits in a folder, each as official tar, or folders, or archives, or loose photos."""
    source = found.source
    official = [source / f"{name}.tar" for name in (TRAIN, VAL)]
    add_archives(found, [(tar, split_of(tar.name)) for tar in official if tar.is_file()])
    for root in ROOTS:
        if (source / root).is_dir():
            add_folders(found, source / root)
            tests = [name for name in _folders_in(source / root) if split_of(name) == "test"]
            found.others += [f"{name} {OF_TEST}" for name in tests]
    if found.missing():
        archives = find_archives(source)
        found.others += [f"{path.name} {OF_TEST}" for path, split in archives if split == "test"]
        add_archives(found, [archive for archive in archives if archive[1] in found.missing()])
        add_photos(found, found.missing())
        for folder in folders_below(source, 2):
            if found.missing() == {"train", "val"}:
                add_folders(found, folder)
        if found.missing() == {"train", "val"}:
            add_archives(found, [archive for archive in archives if not archive[1]])
    for split in found.missing() & found.problems.keys():
        raise found.problems[split]


def _nothing(source):
    """Why there is nothing to stage, with the names of what is there instead, and the known layouts."""
    if source.is_file():
        return f"{source}: holds no image"
    with os.scandir(source) as entries:
        names = sorted(f"{one_line(entry.name)}{'/' * entry.is_dir()}" for entry in entries)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    there = f"it holds {', '.join(names[:MAX_NAMED])}{more}" if names else "it is empty"
    return f"{source}: nothing to stage: {there}; SOURCE can have {KNOWN}"


def folders_below(path, depth):
    """Yield a folder and those below it, so many levels deep, without those of classes and systems."""
    yield path
    for name in _folders_in(path) if depth else []:
        if not (WNID.fullmatch(name) or is_of_the_system(name)):
            yield from folders_below(path / name, depth - 1)


def _folders_in(path):
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


# ---- archives


def find_archives(source):
    """The archives in a folder and below that can hold photos: a list of (path, split or "").

    Of an archive that lies there compressed and uncompressed, only the latter is taken.
    """
    taken = {}
    for folder in folders_below(source, DEPTH):
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _ARCHIVE.fullmatch(entry.name))
        for name in names:
            stem, form = _ARCHIVE.fullmatch(name).groups()
            usable = not is_of_the_system(name) and not _NO_PHOTOS.search(name)
            if usable and (folder / name).is_file():
                key = folder / stem, form.lower() == "parquet"
                if key not in taken or form.lower() == "tar":
                    taken[key] = folder / name
    files = {path.resolve(): path for path in taken.values()}  # each once, whatever links lead there
    return [(path, split_at(path, source)) for path in files.values()]


def split_at(path, source):
    """The split that a file in SOURCE is of, by its name or a folder's on the way to it, or ""."""
    stem, own = stem_of(path), source.absolute().name
    names = [stem, *path.relative_to(source).parts[-2::-1]]
    # The name of SOURCE says something only if it is nothing else: it can be a user's or a project's.
    names += [own] if own.lower() in (*TRAIN_FOLDERS, *VAL_FOLDERS, "test") else []
    return next(filter(None, map(split_of, names)), "train" if WNID.fullmatch(stem) else "")


def stem_of(path):
    """The name of an archive without its suffixes."""
    match = _ARCHIVE.fullmatch(path.name)
    return match[1] if match else path.stem


def add_archives(found, archives):
    """Add what archives hold, a list of (path, split or ""). Says how much has to be copied."""
    for path, split in archives:
        if split == "test":
            raise InputError(f"{path}: nothing to stage {OF_TEST}")
        if _start_of(path) == _POINTER:
            raise InputError(f"{path}: only a pointer to the file; get the file by `git lfs pull`")
    packed = [path for path, _ in archives if _start_of(path).startswith((*_OPENERS, _PARQUET))]
    if packed:
        folder, room = found.scratch.parent, shutil.disk_usage(found.scratch).free
        size = sum(path.stat().st_size for path in packed)
        if size > room:
            hint = f"{folder} has room for {room / 1e9:.1f} GB; set TMPDIR to a folder with more"
            raise InputError(f"{packed[0].parent}: {size / 1e9:.1f} GB have to be copied first: {hint}")
        if size > SOME_TIME:
            say(f"Copying the photos of {len(packed)} archives to {folder} first: {size / 1e9:.1f} GB")
    with bar(total=len(archives), desc="Reading", unit="archive") as progress:
        for path, split in archives:
            add = add_parquet if _start_of(path).startswith(_PARQUET) else add_tar
            add(found, path, split)
            progress.update()


def _start_of(path):
    with path.open("rb") as file:
        return file.read(8)


@contextlib.contextmanager
def new_file(found, path):
    """A new file to write what is copied of an archive, whose name it has without the suffixes."""
    folder = found.scratch / str(sum(1 for _ in found.scratch.iterdir()))
    try:
        folder.mkdir()
        with (folder / stem_of(path)).open("wb") as file:
            found.copies[Path(file.name)] = path
            yield file
    except OSError as error:
        hint = "set TMPDIR to a folder with more room"
        raise InputError(f"{found.scratch.parent}: {error.strerror}; {hint}") from error


def unpacked(path):
    """Yield what a compressed file holds, piece by piece."""
    start = _start_of(path)
    opener = next(_OPENERS[magic] for magic in _OPENERS if start.startswith(magic))
    try:
        with opener(path) as file:
            while piece := file.read(PIECE):
                yield piece
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        why = f"a damaged archive, or cut off ({one_line(error)})"
        raise InputError(f"{path}: {why}; copy or download it again") from error


def add_tar(found, path, split=""):
    """Add what a tar holds, which may be compressed: class tars, folders of images, or images."""
    place = path
    if _start_of(path).startswith((*_OPENERS,)):
        with new_file(found, path) as file:
            for piece in unpacked(path):
                file.write(piece)
        path = Path(file.name)
    members, others = tar_members(path, place=place)
    found.others += [f"{place.name}/{name}" for name in others]
    images = [member for member in members if member.kind == "image"]
    inner = sorted(member for member in members if member.kind == "tar")
    if inner:
        found.others += [f"{place.name}/{member.name} {NO_CLASS}" for member in images]
        for member in inner:
            add_inner_tar(found, path, member, split)
    elif images:
        notes = noted_classes(path, members, place)
        for member in images:
            add_member(found, path, member, split, notes.get(_sample(member.name), ""))
        found.truth += [place.parent, found.source]
    else:
        found.problems.setdefault(split, InputError(f"{place}: holds no image"))


def add_inner_tar(found, path, member, split):
    """Add a class tar that is a member of a tar."""
    wnid, place = Path(member.name).stem, found.copies.get(path, path)
    check_wnid(wnid, place)
    end, place = member.offset + member.size, f"{place}: {wnid}.tar"
    listing = partial(list_tar, path, wnid, member.offset, end, place)
    if (split_of(member.name) or split) == "val":
        images, others = listing()
        found.val += images
        found.others += others
    else:
        found.listings[wnid].append(listing)


def add_member(found, path, member, split, noted):
    """Add an image in a tar. Its class is that of a folder, or of its name, or else the `noted` one."""
    *folders, name = [part for part in member.name.split("/") if part != "."]
    archive = found.copies.get(path, path)
    if not folders and WNID.fullmatch(stem_of(archive)):  # a class tar on its own
        folders = [stem_of(archive)]
    wnid = next((folder for folder in reversed(folders) if WNID.fullmatch(folder)), "")
    wnid = wnid or class_in(name) or noted
    splits = [*map(split_of, reversed(folders)), split, split_of(name), "train" if wnid else "val"]
    split = next(filter(None, splits))
    if split == "test" or any(map(is_of_the_system, folders)):
        found.others.append(f"{archive.name}/{member.name}")
        return
    if noted not in ("", wnid):
        found.others.append(f"{archive.name}/{_sample(member.name)}.* (it says another class)")
    if split == "train" and folders:
        check_wnid(wnid or folders[-1], archive)
    found.add(Image.named(name, wnid, path, member.offset, member.size), split, archive)


def list_tar(path, wnid, start=0, end=math.inf, place=None):
    """The Listing of a class tar that lies at [start, end) of a file; `place` names it in errors."""
    place = place or path
    members, others = tar_members(path, start, end, place)
    images = [
        Image.named(m.name.rpartition("/")[2], wnid, path, m.offset, m.size)
        for m in members
        if m.kind == "image"
    ]
    return Listing(_sorted(images, place), [f"{wnid}.tar/{name}" for name in others])


def tar_members(path, start=0, end=math.inf, place=None):
    """The images and tars in a tar that lies at [start, end) of a file, and the names of all else.

    They are Members, whose offsets are the file's, with the notes beside images. Raises InputError,
    which names the place, unless the tar is whole up to its end-of-archive mark.
    """
    place, members, others, found = place or path, [], [], {}
    try:
        with path.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    archive.members = []  # or a million of them would take 2 GB
                    if member.isdir():
                        continue
                    one = _NOTHING
                    if member.isreg():
                        file.seek(member.offset_data)
                        kind = kind_of(file.read(min(member.size, tarfile.BLOCKSIZE)))
                        if kind == "other" and _is_note(member):
                            kind = "note"
                        one = Member(member.name, member.offset_data, member.size, kind)
                    elif member.islnk():  # a second name of a file that comes before it
                        found = found or {each.name: each for each in members}
                        one = found.get(member.linkname, _NOTHING)._replace(name=member.name)
                    if one.kind != "other":
                        members.append(one)
                    else:
                        others.append(f"{member.name}{' (a link)' if member.issym() else ''}")
            # tarfile takes a damaged header for the end, which is a block of zeros.
            file.seek(archive.offset)
            mark = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{place}: no whole, uncompressed tar ({one_line(error)})") from error
    if mark != bytes(tarfile.BLOCKSIZE) or archive.offset >= end:
        raise InputError(f"{place}: a damaged tar, or cut off; copy or download it again")
    samples = {_sample(member.name) for member in members if member.kind == "image"}
    others += [m.name for m in members if m.kind == "note" and _sample(m.name) not in samples]
    return [m for m in members if m.kind != "note" or _sample(m.name) in samples], others


def _is_note(member):
    return member.name.lower().endswith(_NOTES) and member.size <= _NOTE_BYTES


def _sample(name):
    """By what WebDataset's files find each other: a path up to the first dot in the file's name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def noted_classes(path, members, place):
    """The classes that notes in a tar say: a dict of `_sample` -> WNID.

    A .cls comes before a .json, whose label can be another's: it counts only where no path has a WNID.
    """
    classes, wnids = {}, sorted(caffe_labels())
    with path.open("rb") as file:
        for suffix in (".cls", ".json"):
            for note in members:
                sample, right = _sample(note.name), note.name.lower().endswith(suffix)
                needed = suffix == ".cls" or not (sample in classes or WNID.search(sample))
                if note.kind == "note" and right and needed:
                    file.seek(note.offset)
                    label = file.read(note.size).decode(errors="replace")
                    if suffix == ".json":
                        label = _label_in(label)
                    if wnid := wnid_of(label, wnids, f"{place}: {note.name}"):
                        classes[sample] = wnid
    return classes


def _label_in(text):
    """The label in a JSON text, or None."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return next((value[key] for key in _LABELS if key in value), None)
        return value
    return None


def wnid_of(label, wnids, place):
    """The WNID of a label: itself, or its number in a list of WNIDs. "" if it says nothing, as -1 does.

    InputError for a number that is too large.
    """
    label = str(label).strip()
    if WNID.fullmatch(label):
        return label
    if not re.fullmatch("[0-9]{1,9}", label):
        return ""
    if int(label) >= len(wnids):
        why = f"label {label} is none of 0..{len(wnids) - 1}, the ranks of the sorted WNIDs"
        raise InputError(f"{place}: {why}")
    return wnids[int(label)]


# ---- parquet


def add_parquet(found, path, split=""):
    """Add the photos of a parquet file, which are copied, some rows after the other."""
    split, unlabelled, contradicted = split or "train", 0, 0
    with new_file(found, path) as file:
        for number, (data, name, named, noted) in enumerate(parquet_rows(path)):
            unlabelled += not (named or noted)
            contradicted += "" not in (named, noted) and named != noted
            if data is None or kind_of(data[: tarfile.BLOCKSIZE]) != "image":
                found.others.append(f"{path.name}: row {number}")
            elif named or noted:
                name = name or f"{stem_of(path)}-{number:06d}"
                name = name if "." in name else f"{name}.JPEG"
                place = Path(file.name), file.tell(), len(data)
                found.add(Image.named(name, named or noted, *place), split, path)
                file.write(data)
    if unlabelled:
        found.others.append(f"{path.name}: {unlabelled} rows without a label")
        found.problems.setdefault(split, InputError(f"{path}: holds no photo that has a label"))
    if contradicted:
        found.others.append(f"{path.name}: {contradicted} labels (the photos' names say another class)")


def parquet_rows(path):
    """Yield for each row: the photo, its name, the class that its path says, and that of the label.

    The photo is a buffer of bytes or None, the others are "" where there is none. A few rows are in
    memory at once. InputError if the file cannot be read, or is none of ImageNet's.
    """
    # Arrow's other allocators keep pages that were used: 200 MB more of a file with pages of 100 MB.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "jemalloc")
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{path}: pyarrow is needed to read it: pip install pyarrow") from error
    try:
        # With a buffer of its own, a column of a row group is read piece by piece.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as file:
            columns, wnids = _columns(file.schema_arrow, path)
            for rows in file.iter_batches(ROWS, columns=columns, use_threads=False):
                yield from _rows(rows, columns, wnids, path)
    except (ArrowException, OSError) as error:
        why = f"a damaged parquet file, or cut off ({one_line(error)[:80]})"
        raise InputError(f"{path}: {why}; copy or download it again") from error


def _columns(schema, path):
    """The columns of photos, labels and perhaps names, and the WNIDs that the labels number.

    These are [] if the file says that it has other classes than ImageNet.
    """
    chosen = [next((name for name in some if name in schema.names), "") for some in _COLUMNS]
    if not all(chosen[:2]):
        there = one_line(", ".join(schema.names))[:100]
        raise InputError(f"{path}: has the columns {there}; image and label are needed")
    wnids = sorted(caffe_labels())
    with contextlib.suppress(ValueError, LookupError, TypeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = features[chosen[1]]["names"]
        if all(map(WNID.fullmatch, classes)):
            wnids = classes
        elif len(classes) != len(wnids):
            wnids = []
    return list(filter(None, chosen)), wnids


def _rows(rows, columns, wnids, path):
    """`parquet_rows` of some rows, a RecordBatch."""
    photos, labels = rows.column(columns[0]), rows.column(columns[1]).to_pylist()
    names = rows.column(columns[2]).to_pylist() if columns[2:] else [""] * len(labels)
    if hasattr(photos.type, "names"):  # a struct
        fields = dict(zip(photos.type.names, photos.flatten(), strict=True))
        photos = fields.get("bytes", [None] * len(labels))
        paths = fields["path"].to_pylist() if "path" in fields else names
        names = [path or name for path, name in zip(paths, names, strict=True)]
    if not all(hasattr(photo, "as_buffer") for photo in photos):
        raise InputError(f"{path}: column {columns[0]} has no bytes of photos")
    for photo, name, label in zip(photos, names, labels, strict=True):
        *folders, name = re.split(r"[/\\]", name or "")
        named = next(filter(WNID.fullmatch, reversed(folders)), "") or class_in(name)
        if not (named or wnids):
            raise InputError(f"{path}: its labels are those of other classes than ILSVRC-2012 has")
        noted = wnid_of(label, wnids, path) if wnids else ""
        data = photo.as_buffer()
        yield data and memoryview(data), name, named, noted


# ---- folders


def add_folders(found, root):
    """Add the class folders and class tars of train/ and val/ in a folder, or of itself.

    Also the photos of a val/ without class folders.
    """
    if "train" in found.missing():
        add_train(found, root)
    if "val" in found.missing():
        add_val(found, root)


def _places(root, names, split):
    """Folders that can be a split, the likelier ones first, as pairs (folders, strict).

    One folder of one of some names, in which all must be ImageNet's, or all those whose names tell the
    split: Kaggle's ImageNet-100 has train.X1 to train.X4.
    """
    folders = _folders_in(root)
    named = [folder for name in names for folder in folders if folder.lower() == name.lower()]
    others = [folder for folder in folders if folder not in named and not _NO_PHOTOS.search(folder)]
    parts = [folder for folder in others if split_of(folder) == split]
    return [*(([root / name], True) for name in named), ([root / name for name in parts], False)]


def add_train(found, root):
    """Add what is of train in a folder."""
    places = _places(root, TRAIN_FOLDERS, "train")
    if root.absolute().name not in VAL_FOLDERS:
        places.append(([root], False))
    for folders, strict in places:
        for folder in folders:
            listings, others = class_listings(folder, strict)
            for wnid, listing in listings.items():
                found.listings[wnid].append(listing)
            found.others += others if listings else []
            if strict and not listings:
                problem = InputError(f"{folder}: has no class folder nXXXXXXXX")
                found.problems.setdefault("train", problem)
        if "train" not in found.missing():
            return


def add_val(found, root):
    """Add what is of val in a folder."""
    places = _places(root, VAL_FOLDERS, "val")
    if root.absolute().name in VAL_FOLDERS:
        places.append(([root], True))
    for folders, strict in places:
        for folder in folders:
            listings, others = class_listings(folder, strict)
            there = [listing() for listing in listings.values()]
            found.others += others if listings else []
            if strict and not listings:  # the ground truth knows the classes
                try:
                    there = [list_folder(folder, "")]
                except InputError as problem:
                    found.problems.setdefault("val", problem)
            for images, others in there:
                found.val += images
                found.others += others
            found.truth += [folder, root, *root.absolute().parents[:3]]
        if "val" not in found.missing():
            return


def class_listings(path, strict):
    """A dict of WNID -> function that gives a Listing, of the class folders and class tars in a folder.

    And the names of what else is there. If `strict`, InputError for a folder that holds images and is
    that of no class.
    """
    listings, others = {}, []
    for entry in sorted(path.iterdir()):
        wnid, name = entry.name.removesuffix(".tar"), f"{path.name}/{entry.name}"
        folder, tar = entry.is_dir(), entry.is_file() and entry.name != wnid
        if WNID.fullmatch(wnid) and wnid not in listings and (folder or tar):
            check_wnid(wnid, path)
            listings[wnid] = partial(list_folder if folder else list_tar, entry, wnid)
        elif folder:
            known = entry.name == "images" or split_of(entry.name) or is_of_the_system(entry.name)
            if strict and not known:
                folders = [entry, *filter(Path.is_dir, [entry / "images"])]
                if any(_files_in(each, "")[0] for each in folders):
                    check_wnid(entry.name, path)
            others.append(name)
        else:
            loose = f" {NO_CLASS}" if _kind(entry) == "image" else ""
            others.append(f"{name}{_if_broken(entry)}{loose}")
    return listings, others


def is_of_the_system(name):
    """Whether a folder is one that systems make: Macs, Windows, NAS servers, or hidden ones."""
    known = ("__MACOSX", "lost+found", "System Volume Information")
    return name in known or name.startswith((".", "@", "#", "$"))


def list_folder(path, wnid):
    """The Listing of a folder; Tiny ImageNet has the images in a folder images/ in it."""
    images, others = _files_in(path, wnid)
    if (path / "images").is_dir():
        more, rest = _files_in(path / "images", wnid)
        others.remove(f"{path.name}/images")
        images, others = images + more, others + rest
    return Listing(_sorted(images, path), others)


def _files_in(path, wnid):
    """The images in a folder, and the names of all else."""
    images, others = [], []
    for entry in sorted(path.iterdir()):
        if _kind(entry) == "image":
            images.append(Image.named(entry.name, wnid, entry))
        else:
            others.append(f"{path.name}/{entry.name}{_if_broken(entry)}")
    return images, others


def _kind(entry):
    """What a file is by its first bytes; "other" for all that is no regular file."""
    if not entry.is_file():
        return "other"
    with entry.open("rb") as file:
        return kind_of(file.read(tarfile.BLOCKSIZE))


def _if_broken(entry):
    return " (a broken link)" if entry.is_symlink() and not entry.exists() else ""


# A name with one of these could not be read from a label file, which has one line a name.
_UNUSABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|^\\s|\\s$")


def _check_name(image, place):
    if _UNUSABLE.search(image.name):
        raise InputError(f"{place}: a label file can't have the name {one_line(repr(image.name))}")


def _sorted(images, place):
    if not images:
        raise InputError(f"{place}: holds no image")
    for image in images:
        _check_name(image, place)
    return sorted(images)


def add_photos(found, wanted):
    """Add photos that lie in any folder, and whose names tell the class, or that they are of val."""
    for folder in folders_below(found.source, DEPTH) if wanted else []:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
        rest, tests, there = [], 0, False
        for name in names:
            path = folder / name
            split = split_at(path, found.source) or ("train" if class_in(name) else "")
            photo = (class_in(name) or _OWN_NAME.fullmatch(name)) and _kind(path) == "image"
            tests += bool(photo) and split == "test"
            if photo and split in wanted:
                found.add(Image.named(name, "", path), split, folder)
                there = True
            elif not photo:
                rest.append(f"{folder.name}/{name}")
        found.others += rest if there else []
        found.others += [f"{folder.name}: {tests} photos {OF_TEST}"] if tests else []
        found.truth += [folder, found.source] if there else []


def without_doubles(images):
    """Images, sorted, without those that other places have as well, and texts that name these.

    Photos of one class and name from several places are one photo if they have the same bytes. If not,
    their names are taken for numbers that begin anew in each archive, and get the archive's name before
    them. InputError if that name is one of ImageNet's.
    """
    kept, first, others = [], {}, []
    for image in sorted(images):
        there = first.setdefault((image.wnid, image.name), image)
        if there is image or there.path == image.path:
            kept.append(image)
        elif _content(there) == _content(image):
            others.append(f"{image.path.name}: {image.name} (it is there twice)")
        elif _OWN_NAME.fullmatch(image.name):
            places = f"{there.path} and {image.path}"
            raise InputError(f"{places} have another photo {image.name} each; keep one of the two")
        else:
            kept.append(image._replace(name=f"{image.path.stem}_{image.name}"))
    return sorted(kept), others


def _content(image):
    with image.path.open("rb") as file:
        file.seek(image.offset)
        return file.read(image.size)


# ---- validation


def val_tars(images, folders, others):
    """The tars to make of the validation images, sorted by name.

    If some images have no class, one of `folders` has their ground truth. A name that several classes
    have gets its class before it. Texts that name what is left out are added to `others`.
    """
    if not all(image.wnid for image in images):
        truth = ground_truth(folders)
        unknown = sorted(i.name for i in images if not (i.wnid or i.name in truth))
        if unknown:
            raise InputError(f"{folders[0]}: the ground truth doesn't know {one_line(unknown[0])}")
        images = [image._replace(wnid=image.wnid or truth[image.name]) for image in images]
    images, twice = without_doubles(images)
    others += twice
    counts = Counter(image.name for image in images)
    images = sorted(
        image._replace(name=f"{image.wnid}/{image.name}") if counts[image.name] > 1 else image
        for image in images
    )
    starts = range(0, len(images), VAL_IMAGES)
    return {
        f"{VAL}/{number:03d}.tar": partial(Listing, images[start : start + VAL_IMAGES], [])
        for number, start in enumerate(starts)
    }


def ground_truth(folders):
    """The WNIDs of the validation images: a dict of name -> WNID.

    From the devkit, Kaggle's file or Tiny ImageNet's, in the first of the folders that has one. Raises
    InputError where none has, or an unreadable one.
    """
    names = {DEVKIT: _devkit_truth, f"{DEVKIT}.tar.gz": _devkit_truth}
    names |= {KAGGLE_TRUTH: _kaggle_truth, TINY_TRUTH: _tiny_truth}
    places = [folder / name for folder in folders for name in names]
    place = next((place for place in places if place.exists()), None)
    if not place:
        missing = "no ground truth of the validation images"
        hint = f"put {DEVKIT}.tar.gz here (or {KAGGLE_TRUTH} or {TINY_TRUTH})"
        raise InputError(f"{folders[0]}: {missing}; {hint}")
    try:
        truth = names[place.name](place)
    except Exception as error:  # a damaged file can raise anything from SciPy's reader
        reason = f"{type(error).__name__}: {one_line(error)[:80]}"
        raise InputError(f"{place}: no readable ground truth ({reason})") from error
    for wnid in set(truth.values()):
        check_wnid(wnid, place)
    return truth


def _devkit_truth(place):
    # The devkit numbers the classes in an order of its own; meta.mat says which id is which WNID.
    names = ["data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"]
    if place.is_dir():
        meta, ids = ((place / name).read_bytes() for name in names)
    else:
        with tarfile.open(place) as devkit:
            meta, ids = (devkit.extractfile(f"{DEVKIT}/{name}").read() for name in names)
    synsets = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    return {f"ILSVRC2012_val_{n:08d}.JPEG": wnids[int(line)] for n, line in enumerate(ids.split(), 1)}


def _kaggle_truth(place):
    rows = csv.DictReader(place.read_text("utf-8-sig").splitlines())
    return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}


def _tiny_truth(place):
    rows = [line.split("\t") for line in place.read_text("utf-8-sig").splitlines()]
    return {name: wnid for name, wnid, *_ in rows}
