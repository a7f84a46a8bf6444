"""ImageNet (ILSVRC-2012) as people have it on disk: its layouts, its classes, its ground truth.

Images are found, never unpacked: an `Image` says where its bytes lie.
"""

import csv
import functools
import io
import math
import os
import tarfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io

from imagenet import InputError, one_line

VAL_IMAGES = 2000  # images of one validation tar
TRAIN, VAL = "ILSVRC2012_img_train", "ILSVRC2012_img_val"
DEVKIT, KAGGLE_TRUTH = "ILSVRC2012_devkit_t12", "LOC_val_solution.csv"


class Image(NamedTuple):
    """Where the bytes of an image lie: in a file of its own, or somewhere within a tar."""

    name: str
    wnid: str  # "" where only the ground truth knows it
    path: Path
    offset: int = 0
    size: int = -1  # bytes; -1: to the end of the file


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
    """The tars to make of SOURCE, for "train", "val" or both: a dict of key -> function listing Images.

    Raises InputError where there is nothing to stage, a class is unknown or ground truth is missing.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    archives = [source] if source.is_file() else [source / f"{TRAIN}.tar", source / f"{VAL}.tar"]
    tars = {}
    for path in filter(Path.is_file, archives):
        members = tar_members(path)
        if any(member.name.endswith(".tar") for member in members):
            tars["train"] = train_tars(path, members)
        else:
            tars["val"] = val_tars(tar_images(path, members), path.parent)
    if "train" not in tars and (source / "train").is_dir():
        folders = class_folders(source / "train")
        if not folders:
            raise InputError(f"{source / 'train'}: has no class folder nXXXXXXXX")
        tars["train"] = {f"{TRAIN}/{f.name}.tar": partial(folder_images, f, f.name) for f in folders}
    if "val" not in tars and (source / "val").is_dir():
        folders = class_folders(source / "val")
        images = [image for f in folders for image in folder_images(f, f.name)]
        tars["val"] = val_tars(images or folder_images(source / "val"), source)
    if not tars:
        known = f"{TRAIN}.tar, {VAL}.tar, train/nXXXXXXXX/*.JPEG or val/nXXXXXXXX/*.JPEG"
        raise InputError(f"{source}: nothing to stage: no {known}")
    return tars


def class_folders(path):
    """The class folders in a folder, sorted."""
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    for folder in folders:
        check_wnid(folder.name, path)
    return folders


def train_tars(path, members):
    """The class tars to make of the tars that are members of a tar."""
    tars = {}
    for member in sorted(members, key=lambda member: member.name):
        wnid, end = Path(member.name).stem, member.offset_data + member.size
        check_wnid(wnid, path)
        tars[f"{TRAIN}/{wnid}.tar"] = partial(inner_images, path, member.offset_data, end, wnid)
    return tars


def val_tars(images, folder):
    """The tars to make of the validation images, sorted by name; the folder has their ground truth."""
    if not all(image.wnid for image in images):
        truth = ground_truth(folder)
        if unknown := [image.name for image in images if image.name not in truth]:
            raise InputError(f"{folder}: the ground truth doesn't know {one_line(unknown[0])}")
        images = [image._replace(wnid=truth[image.name]) for image in images]
    images = sorted(images)
    starts = range(0, len(images), VAL_IMAGES)
    return {
        f"{VAL}/{number:03d}.tar": partial(list, images[start : start + VAL_IMAGES])
        for number, start in enumerate(starts)
    }


def folder_images(path, wnid=""):
    """The images in a folder: all files but hidden ones, as the driver reads all of a tar."""
    files = [entry.name for entry in os.scandir(path) if entry.is_file()]
    return _sorted_images([Image(name, wnid, path / name) for name in files], path)


def tar_images(path, members, wnid=""):
    """The images that are members of a tar: all but hidden ones."""
    images = [Image(Path(m.name).name, wnid, path, m.offset_data, m.size) for m in members]
    return _sorted_images(images, f"{path}: {wnid}.tar" if wnid else path)


def inner_images(path, start, end, wnid):
    """The images of a class tar that lies at [start, end) of a file."""
    return tar_images(path, tar_members(path, start, end, f"{path}: {wnid}.tar"), wnid)


def _sorted_images(images, place):
    images = sorted(image for image in images if not image.name.startswith("."))
    if not images:
        raise InputError(f"{place}: holds no image")
    if bad := [image.name for image in images if not image.name.isprintable()]:
        raise InputError(f"{place}: a label file can't have the name {one_line(repr(bad[0]))}")
    return images


def tar_members(path, start=0, end=math.inf, place=None):
    """The regular files of a tar that lies at [start, end) of a file; offsets are that file's.

    Raises InputError, which names the place, unless the tar is whole up to its end-of-archive mark.
    """
    place = place or path
    try:
        with path.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                members = [member for member in archive if member.isreg()]
            # tarfile takes a damaged header for the end, which is a block of zeros.
            file.seek(archive.offset)
            mark = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{place}: no whole, uncompressed tar ({one_line(error)})") from error
    if mark != bytes(tarfile.BLOCKSIZE) or archive.offset >= end:
        raise InputError(f"{place}: a damaged tar, or cut off; copy or download it again")
    return members


def ground_truth(folder):
    """The WNIDs of the validation images: a dict of name -> WNID, from the devkit or Kaggle's file.

    Raises InputError where the folder has neither, or an unreadable one.
    """
    places = [folder / DEVKIT, folder / f"{DEVKIT}.tar.gz", folder / KAGGLE_TRUTH]
    place = next((place for place in places if place.exists()), None)
    if not place:
        missing = "no ground truth of the validation images"
        raise InputError(f"{folder}: {missing}; put {DEVKIT}.tar.gz here")
    try:
        truth = _kaggle_truth(place) if place.name == KAGGLE_TRUTH else _devkit_truth(place)
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
    rows = csv.DictReader(place.read_text().splitlines())
    return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}
