"""ImageNet (ILSVRC-2012) as people have it on disk: its layouts, its classes, its ground truth.

Images are found, never unpacked: an `Image` says where its bytes lie. What is an image is told by its
first bytes, never by its name; all other files are listed, too, to be named.
"""

import csv
import functools
import io
import math
import re
import tarfile
import zipfile
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from machinery.errors import InputError, one_line
from machinery.storage.images import kind_of

import numpy as np
import scipy.io

VAL_IMAGES = 2000  # images of one validation tar
TRAIN, VAL = "ILSVRC2012_img_train", "ILSVRC2012_img_val"
VAL_FOLDERS = ("val", VAL, "valid", "validation")
DEVKIT, KAGGLE_TRUTH = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv"
TINY_TRUTH = "val_annotations.txt"

# Below SOURCE, where people unpack ImageNet; Kaggle's archive has all of these folders.
ROOTS = ("", "ILSVRC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")

KNOWN = (
    f"{TRAIN}.tar, {VAL}.tar, train/nXXXXXXXX/*.JPEG or val/nXXXXXXXX/*.JPEG, also below "
    "ILSVRC/Data/CLS-LOC/ (Kaggle), with images/ (Tiny ImageNet), in one tar, or as class tars"
)

NO_CLASS = "(an image in no class)"

WNID = re.compile(r"n\d{8}")


class Image(NamedTuple):
    """Where the bytes of an image lie: in a file of its own, or somewhere within a tar."""

    name: str  # in the tar that it goes into
    wnid: str  # "" where only the ground truth knows it
    path: Path
    offset: int = 0
    size: int = -1  # bytes; -1: to the end of the file


class Listing(NamedTuple):
    """The images of a tar to be made, sorted by name, and texts that name what was left out."""

    images: list
    others: list


class Member(NamedTuple):
    """A regular file in a tar: its path, where it lies, and what it is by its first bytes."""

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


def find_tars(source):
    """The tars to make of SOURCE, for "train", "val" or both, and texts that name what is left out.

    The tars are a dict of key -> function that gives a Listing. InputError where there is nothing
    to stage, a class is unknown or ground truth is missing.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    tars, others = {}, []
    if zipfile.is_zipfile(source):
        raise InputError(f"{source}: unpack it first; then SOURCE can have {KNOWN}")
    if source.is_file():
        others += add_archive(tars, source)
    else:
        for name in (TRAIN, VAL):
            if (source / f"{name}.tar").is_file():
                others += add_archive(tars, source / f"{name}.tar")
        for root in (source / root for root in ROOTS):
            others += add_folders(tars, root)
    if not tars:
        raise InputError(f"{source}: nothing to stage: no {KNOWN}")
    return tars, others


# ---- tars


def add_archive(tars, path):
    """Add what a tar holds: class tars, folders of images, or images; returns what is left out."""
    members, others = tar_members(path)
    others = [f"{path.name}/{name}" for name in others]
    if inner := [member for member in members if member.kind == "tar"]:
        tars["train"] = inner_tars(path, inner)
        return others + [f"{path.name}/{m.name} {NO_CLASS}" for m in members if m.kind == "image"]
    classes, val = defaultdict(list), []
    for member in members:
        *folders, name = [part for part in member.name.split("/") if part != "."]
        if not folders and WNID.fullmatch(path.stem):  # a class tar on its own
            folders = [path.stem]
        wnid = next((folder for folder in reversed(folders) if WNID.fullmatch(folder)), "")
        image = Image(name, wnid, path, member.offset, member.size)
        if "test" in folders or any(map(is_of_the_system, folders)):
            others.append(f"{path.name}/{member.name}")
        elif {path.stem, *folders} & set(VAL_FOLDERS) or not (wnid or "train" in folders):
            val.append(image)
        else:
            check_wnid(wnid or folders[-1], path)
            classes[wnid].append(image)
    if classes:
        images = {wnid: _sorted(classes[wnid], path) for wnid in sorted(classes)}
        tars["train"] = {f"{TRAIN}/{w}.tar": partial(Listing, images[w], []) for w in images}
    if val or not classes:
        tars["val"] = val_tars(_sorted(val, path), [path.parent])
    return others


def inner_tars(path, members):
    """The class tars to make of the tars that are members of a tar."""
    tars = {}
    for member in sorted(members):
        wnid, end = Path(member.name).stem, member.offset + member.size
        check_wnid(wnid, path)
        tars[f"{TRAIN}/{wnid}.tar"] = partial(list_tar, path, wnid, member.offset, end)
    return tars


def list_tar(path, wnid, start=0, end=math.inf):
    """The Listing of a class tar that lies at [start, end) of a file."""
    place = f"{path}: {wnid}.tar" if start else path
    members, others = tar_members(path, start, end, place)
    images = [
        Image(m.name.rpartition("/")[2], wnid, path, m.offset, m.size)
        for m in members
        if m.kind == "image"
    ]
    return Listing(_sorted(images, place), [f"{wnid}.tar/{name}" for name in others])


def tar_members(path, start=0, end=math.inf, place=None):
    """The images and tars in a tar that lies at [start, end) of a file, and the names of all else.

    They are Members, whose offsets are the file's. Raises InputError, which names the place, unless the
    tar is whole up to its end-of-archive mark.
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
    return members, others


# ---- folders


def add_folders(tars, root):
    """Add what lies in train/ and val/ of a folder, or in itself; returns what is left out."""
    others, own = [], root.absolute().name
    places = [root / "train", root / TRAIN] + ([root] if own not in VAL_FOLDERS else [])
    for train in places:
        if "train" not in tars and train.is_dir():
            found, left_out = class_listings(train, strict=train != root)
            if not found and train != root:
                raise InputError(f"{train}: has no class folder nXXXXXXXX")
            if found:
                tars["train"] = {f"{TRAIN}/{wnid}.tar": found[wnid] for wnid in found}
                others += left_out
    places = [root / name for name in VAL_FOLDERS] + ([root] if own in VAL_FOLDERS else [])
    for val in places:
        if "val" not in tars and val.is_dir():
            found, left_out = class_listings(val, strict=True)
            listings = [listing() for listing in found.values()] or [list_folder(val, "")]
            others += left_out if found else []
            others += [name for listing in listings for name in listing.others]
            images = [image for listing in listings for image in listing.images]
            tars["val"] = val_tars(images, [val, root, *root.absolute().parents[:3]])
    return others


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
            if strict and entry.name != "images" and not is_of_the_system(entry.name):
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
            images.append(Image(entry.name, wnid, entry))
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


def _sorted(images, place):
    if not images:
        raise InputError(f"{place}: holds no image")
    if bad := [image.name for image in images if _UNUSABLE.search(image.name)]:
        raise InputError(f"{place}: a label file can't have the name {one_line(repr(bad[0]))}")
    return sorted(images)


# ---- validation


def val_tars(images, folders):
    """The tars to make of the validation images, sorted by name.

    If the images lie in no class folders, one of `folders` has their ground truth. A name that several
    classes have gets its class before it.
    """
    if not all(image.wnid for image in images):
        truth = ground_truth(folders)
        if unknown := [image.name for image in images if image.name not in truth]:
            raise InputError(f"{folders[0]}: the ground truth doesn't know {one_line(unknown[0])}")
        images = [image._replace(wnid=truth[image.name]) for image in images]
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
