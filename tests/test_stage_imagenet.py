"""stage_imagenet.py: every layout of ImageNet, small, into real S3 objects that the driver reads."""

import bz2
import gzip
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
from collections import Counter

import functions
import imagenet
import stage_imagenet
from machinery.storage import ilsvrc2012
from machinery.storage.images import decode_image
from tests.support import ROOT, draw_image, encode, jpeg, make_tar

import numpy as np
import pyarrow.parquet
import pytest
import ray
import scipy.io
from PIL import Image

TRAIN, VAL = "ILSVRC2012_img_train", "ILSVRC2012_img_val"
LABELS = {"n01440764": 0, "n01443537": 1, "n15075141": 999}  # Caffe's
DEVKIT_IDS = {"n15075141": 1, "n01440764": 2, "n01443537": 3, "n00001740": 1001}
VAL_WNIDS = ["n01443537", "n15075141", "n01440764", "n15075141", "n01443537"]
JPEG_START = b"\xff\xd8\xff"
VAL_NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 6)]


def tar_members(data):
    """Names and contents of a tar, in its order."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def objects(s3, bucket, prefix=""):
    """Every object below a prefix: a dict of key, less the prefix, -> bytes."""
    listed = s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    keys = [obj["Key"] for obj in listed]
    return {k.removeprefix(prefix): s3.get_object(Bucket=bucket, Key=k)["Body"].read() for k in keys}


def run(*args):
    return stage_imagenet.main([*map(str, args)])


@pytest.fixture(scope="module")
def train():
    """Three classes of four images: a dict of WNID -> name -> JPEG."""
    rng = np.random.default_rng(0)
    return {
        wnid: {f"{wnid}_{n}.JPEG": jpeg(draw_image(label, rng)) for n in (9, 10, 2, 1)}
        for wnid, label in LABELS.items()
    }


@pytest.fixture(scope="module")
def val():
    """Five validation images, a dict of name -> JPEG."""
    rng = np.random.default_rng(1)
    pairs = zip(VAL_NAMES, VAL_WNIDS, strict=True)
    return {name: jpeg(draw_image(LABELS[wnid], rng)) for name, wnid in pairs}


@pytest.fixture
def folder(tmp_path, train, val):
    """The images as torchvision lays them out."""
    root = tmp_path / "folder"
    files = {f"train/{wnid}/{name}": data for wnid in train for name, data in train[wnid].items()}
    files |= {f"val/{w}/{name}": val[name] for name, w in zip(VAL_NAMES, VAL_WNIDS, strict=True)}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture
def tars(tmp_path, train, val):
    """The images and their ground truth as the official archives."""
    root = tmp_path / "tars"
    root.mkdir()
    inner = {f"{wnid}.tar": make_tar(files) for wnid, files in reversed(train.items())}
    (root / f"{TRAIN}.tar").write_bytes(make_tar(inner))
    (root / f"{VAL}.tar").write_bytes(make_tar(dict(reversed(val.items()))))
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as devkit:
        devkit.add(make_devkit(tmp_path), "ILSVRC2012_devkit_t12")
    return root


def make_devkit(path):
    """A devkit like the official one: ids of its own order, and a synset above all classes."""
    data = path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    fields = [(f, object) for f in ("ILSVRC2012_ID", "WNID", "words", "num_children", "children")]
    rows = [(i, w, "a word", 0 if i <= 1000 else 3, []) for w, i in DEVKIT_IDS.items()]
    scipy.io.savemat(data / "meta.mat", {"synsets": np.array(rows, fields).reshape(-1, 1)})
    lines = [f"{DEVKIT_IDS[wnid]}\n" for wnid in VAL_WNIDS]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))
    return data.parent


def uploads(proxy):
    """The keys of what was uploaded since the last call, in order: put whole, or in parts."""
    names = []
    for request in proxy.requests:
        path, _, query = request.path.partition("?")
        whole = request.method == "PUT" and "uploadId" not in query
        completed = request.method == "POST" and query.startswith("uploadId")
        names += [path.split("/", 2)[2]] if (whole and request.key != ".check") or completed else []
    proxy.requests.clear()
    return names


# ---- what is put


def test_folder_becomes_sorted_tars_and_labels(s3, bucket, folder, train, val, capsys):
    for odd in NO_IMAGES:
        (folder / odd).parent.mkdir(exist_ok=True, parents=True)
        (folder / odd).write_bytes(b"no image")
    (folder / "train" / "n01440764" / "gone.JPEG").symlink_to("nowhere")
    assert run(folder, f"s3://{bucket}") == 0
    put = objects(s3, bucket)
    assert sorted(put) == [
        *(f"{TRAIN}/{wnid}.tar" for wnid in LABELS),
        f"{VAL}/000.tar",
        "train.txt",
        "val.txt",
    ]
    for wnid, files in train.items():
        assert list(tar_members(put[f"{TRAIN}/{wnid}.tar"]).items()) == sorted(files.items())
    members = tar_members(put[f"{VAL}/000.tar"])
    assert list(members.items()) == [(name, val[name]) for name in VAL_NAMES]
    lines = {f"{wnid}/{name} {LABELS[wnid]}" for wnid, files in train.items() for name in files}
    assert put["train.txt"].decode().splitlines() == sorted(lines)
    pairs = zip(VAL_NAMES, VAL_WNIDS, strict=True)
    lines = {f"{wnid}/{name} {LABELS[wnid]}" for name, wnid in pairs}
    assert put["val.txt"].decode().splitlines() == sorted(lines)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert line.startswith("8 files or folders are left out: n01440764/.DS_Store, ")
    assert "n01440764/gone.JPEG (a broken link)" in line


# What systems leave, and what is called an image and is none.
NO_IMAGES = [
    "train/n01440764/.DS_Store",
    "train/n01440764/Thumbs.db",
    "train/n01440764/x.JPEG",
    "train/@eaDir/a.JPEG",
    "train/__MACOSX/n01440764/._a.JPEG",
    "train/desktop.ini",
    "val/lost+found/a.JPEG",
]


def test_all_layouts_give_the_same_objects(s3, bucket, folder, tars, tmp_path):
    assert run(folder, f"s3://{bucket}/folder") == 0
    wanted = objects(s3, bucket, "folder/")

    assert run(tars, f"s3://{bucket}/tars/") == 0
    assert objects(s3, bucket, "tars/") == wanted

    # One after the other, under other names, the devkit unpacked.
    (tars / f"{TRAIN}.tar").rename(tmp_path / "a.tar")
    (tars / f"{VAL}.tar").rename(tmp_path / "b.tar")
    assert run(tmp_path / "a.tar", f"s3://{bucket}/each") == 0
    assert run(tmp_path / "b.tar", f"s3://{bucket}/each") == 0
    assert objects(s3, bucket, "each/") == wanted


def move(folder, layout):
    """Move train/ and val/ of a folder into another layout; returns its SOURCE."""
    there = folder.with_name(layout)
    if layout == "kaggle":
        there = folder.with_name("kaggle") / "ILSVRC" / "Data" / "CLS-LOC"
        shutil.copytree(folder / "train", there / "train")
        (there / "val").mkdir()
        for path in (folder / "val").glob("*/*"):
            shutil.copy(path, there / "val")
        shutil.copytree(there / "val", there / "test")
        rows = [f"{n[:-5]},{w} 1 2 3 4 " for n, w in zip(VAL_NAMES, VAL_WNIDS, strict=True)]
        text = "\n".join(["ImageId,PredictionString", *reversed(rows)])
        (folder.with_name("kaggle") / "LOC_val_solution.csv").write_text(text, "utf-8-sig")
        return folder.with_name("kaggle")
    if layout == "tiny":
        for wnid in LABELS:
            shutil.copytree(folder / "train" / wnid, there / "train" / wnid / "images")
            (there / "train" / wnid / f"{wnid}_boxes.txt").write_text("no image")
        (there / "val" / "images").mkdir(parents=True)
        for path in (folder / "val").glob("*/*"):
            shutil.copy(path, there / "val" / "images")
        rows = [f"{n}\t{w}\t0\t0\t9\t9" for n, w in zip(VAL_NAMES, VAL_WNIDS, strict=True)]
        (there / "val" / "val_annotations.txt").write_text("\n".join(rows))
    elif layout == "class tars":
        there.mkdir()
        for wnid in LABELS:
            with tarfile.open(there / f"{wnid}.tar", "w") as tar:
                for path in (folder / "train" / wnid).iterdir():
                    tar.add(path, f"./{path.name}")
        shutil.copytree(folder / "val", there / "val")
    elif layout == "a tar of folders":
        thumbnails = folder / "train" / "n01440764" / "@eaDir"  # of a NAS
        thumbnails.mkdir()
        shutil.copy(folder / "train" / "n01440764" / "n01440764_1.JPEG", thumbnails)
        with tarfile.open(there, "w") as tar:
            tar.add(folder, ".")
    return there


@pytest.mark.parametrize("layout", ["kaggle", "tiny", "class tars", "a tar of folders"])
def test_layouts_in_which_imagenet_is_handed_around(s3, bucket, folder, layout):
    assert run(folder, f"s3://{bucket}/folder") == 0
    source = move(folder, layout)
    assert run(source, f"s3://{bucket}/p") == 0
    assert objects(s3, bucket, "p/") == objects(s3, bucket, "folder/")
    if layout == "kaggle":  # and from further below
        assert run(source / "ILSVRC" / "Data" / "CLS-LOC", f"S3://{bucket}/q/") == 0
        assert objects(s3, bucket, "q/") == objects(s3, bucket, "folder/")


def test_validation_images_stay_what_they_are(s3, bucket, folder, tars, capsys):
    """Packed in class folders, beside the official training tar or alone; some in no class yet."""
    assert run(folder, f"s3://{bucket}/folder") == 0
    wanted = objects(s3, bucket, "folder/")
    with tarfile.open(tars / f"{VAL}.tar", "w") as tar:
        for path in (folder / "val").iterdir():
            tar.add(path, path.name)
    assert run(tars, f"s3://{bucket}/p") == 0
    assert objects(s3, bucket, "p/") == wanted
    (folder / "val" / "stray.JPEG").write_bytes(JPEG_START)
    capsys.readouterr()
    assert run(folder / "val", f"s3://{bucket}/q") == 0
    only = {key: data for key, data in wanted.items() if "train" not in key}
    assert objects(s3, bucket, "q/") == only
    loose = "1 files or folders are left out (1 of them are images in no class): val/stray.JPEG"
    assert loose in capsys.readouterr().out


def test_links_in_a_tar(s3, bucket, tmp_path, train, capsys):
    """A hard link is a second name of an image; a symbolic one is named."""
    hard, symbolic = tarfile.TarInfo(), tarfile.TarInfo()
    hard.type, hard.linkname = tarfile.LNKTYPE, "n01440764_1.JPEG"
    symbolic.type, symbolic.linkname = tarfile.SYMTYPE, "n01440764_1.JPEG"
    files = train["n01440764"] | {"second.JPEG": hard, "link.JPEG": symbolic}
    (tmp_path / "n01440764.tar").write_bytes(make_tar(files))
    assert run(tmp_path / "n01440764.tar", f"s3://{bucket}") == 0
    members = tar_members(objects(s3, bucket)[f"{TRAIN}/n01440764.tar"])
    assert members == train["n01440764"] | {"second.JPEG": train["n01440764"]["n01440764_1.JPEG"]}
    assert "left out: n01440764.tar/link.JPEG (a link)" in capsys.readouterr().out


def test_a_train_tar_that_was_packed_anew_on_a_mac(s3, bucket, tars, train, capsys):
    inner = {f"{w}.tar": make_tar({"._x.JPEG": b"\0\5\x16\7"} | files) for w, files in train.items()}
    inner |= {f"._{wnid}.tar": b"\0\5\x16\7" for wnid in train} | {".DS_Store": b"x"}
    assert run(tars, f"s3://{bucket}/p") == 0
    (tars / f"{TRAIN}.tar").write_bytes(make_tar(inner))
    assert run(tars, f"s3://{bucket}/q") == 0
    assert objects(s3, bucket, "q/") == objects(s3, bucket, "p/")
    left_out = f"7 files or folders are left out: {TRAIN}.tar/.DS_Store, "
    assert left_out in capsys.readouterr().out


def test_names_that_people_give_are_what_the_driver_reads(s3, bucket, one_ray, folder):
    """Spaces, accents, and one name in several classes, in train and in val."""
    image = (folder / "train" / "n01440764" / "n01440764_1.JPEG").read_bytes()
    for place in ("train", "val"):
        for number, wnid in enumerate(LABELS):
            (folder / place / wnid / "IMG 1 (1).JPEG").write_bytes(image)
            (folder / place / wnid / f"Ze\u0301bre\u202f{number}.jpg").write_bytes(image)
    assert run(folder, f"s3://{bucket}") == 0
    source = imagenet.source_of(bucket)
    for directory, label_file in ((TRAIN, "train.txt"), (VAL, "val.txt")):
        table = functions.label_table(imagenet.read_labels(source, label_file, 1000))
        data, found = imagenet.find(source, f"{directory}/", label_file), []
        loaded = imagenet.load_tarfiles_from_s3(source, data.tars, [8, 8])
        for tar in imagenet.report_loading(data, loaded):
            names = ray.get(tar.filenames)
            labels, report = functions.convert(names, table)
            assert report["unlabelled"] == 0 and report["doubtful"] == []
            found += [label for label, name in zip(labels, names, strict=True) if "IMG" in name]
        assert sorted(found) == sorted(LABELS.values())


def test_many_validation_images_become_several_tars(s3, bucket, tmp_path):
    """Of 2,000 each: they are loaded side by side."""
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 4003)]
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    for name in names:
        (tmp_path / "val" / "n01440764" / name).write_bytes(JPEG_START + name.encode())
    assert run(tmp_path, f"s3://{bucket}") == 0
    put = objects(s3, bucket)
    assert sorted(put) == [*(f"{VAL}/00{number}.tar" for number in range(3)), "val.txt"]
    members = [tar_members(put[f"{VAL}/00{number}.tar"]) for number in range(3)]
    assert [len(names) for names in members] == [2000, 2000, 2]
    assert [name for tar in members for name in tar] == names


def test_labels_are_caffes():
    labels = ilsvrc2012.caffe_labels()
    assert (labels["n01440764"], labels["n02119789"], labels["n15075141"]) == (0, 278, 999)
    assert sorted(labels) == list(labels) and list(labels.values()) == list(range(1000))


def test_ground_truth_of_each_validation_image(tars):
    assert ilsvrc2012.ground_truth([tars]) == dict(zip(VAL_NAMES, VAL_WNIDS, strict=True))


@pytest.mark.smoke
def test_driver_reads_what_is_put(s3, bucket, one_ray, tars, train, capsys):
    assert run(tars, f"s3://{bucket}/a b/p") == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"Now: python driver.py --s3-bucket {bucket} --key-prefix 'a b/p/'{TRAIN}/ "
        f"--label-file 'a b/p/'train.txt --val-prefix 'a b/p/'{VAL}/ --val-label-file 'a b/p/'val.txt"
    )
    source = imagenet.source_of(bucket)
    for directory, label_file, count, images in ((TRAIN, "train.txt", 3, 12), (VAL, "val.txt", 1, 5)):
        listed, others = imagenet.list_tars(source, f"a b/p/{directory}/")
        assert len(listed) == count and others == 0
        labels = imagenet.read_labels(source, f"a b/p/{label_file}", 1000)
        names = []
        for loaded in imagenet.load_tarfiles_from_s3(source, listed, [256, 256]):
            report = ray.get(loaded.report)
            assert report["left_out"] == 0
            assert ray.get(loaded.images).shape == (report["images"], 256, 256, 3)
            names += ray.get(loaded.filenames)
        assert len(names) == images and {name.partition("/")[2] for name in names} == set(labels)


# ---- the forms of today


def photos_in(folder):
    """The photos of a folder of torchvision's layout: a list of (split, WNID, name, JPEG)."""
    paths = sorted(folder.glob("*/*/*.JPEG"))
    return [(p.parents[1].name, p.parent.name, p.name, p.read_bytes()) for p in paths]


def shards(photos):
    """Photos as people find them, dealt out to archives: (split, number, [(WNID, name, JPEG)])."""
    some = {split: [photo[1:] for photo in photos if photo[0] == split] for split in ("train", "val")}
    return [("train", n, some["train"][n::3]) for n in range(3)] + [("val", 0, some["val"][::-1])]


def with_class(name, wnid):
    """A photo's name at Hugging Face."""
    return f"{name.removesuffix('.JPEG')}_{wnid}.JPEG"


def new(path):
    """A path whose folder is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def archives(photos, there, suffix, pack=gzip.compress):
    """Hugging Face's archives, and that of the test set."""
    for split, n, part in shards(photos):
        name = f"train_images_{n}" if split == "train" else "val_images"
        tar = make_tar({with_class(name, wnid): data for wnid, name, data in part})
        new(there / f"{name}{suffix}").write_bytes(pack(tar))
    (there / f"test_images{suffix}").write_bytes(
        pack(make_tar({"ILSVRC2012_test_00000001.JPEG": b"x"}))
    )


def unpacked(photos, there, train="", val=""):
    """The photos of these archives in one folder, or in several."""
    for split, n, part in shards(photos):
        for wnid, name, data in part:
            place = there / (train.format(n) if split == "train" else val)
            new(place / with_class(name, wnid)).write_bytes(data)
    (there / "ILSVRC2012_test_00000001.JPEG").write_bytes(photos[0][-1])


def parquet(photos, there, path="data/{split}-{n:05d}-of-00003.parquet", columns=None, info=None):
    """Hugging Face's parquet files, in row groups of two photos, and that of the test set."""
    test = ("test", 0, [("", "ILSVRC2012_test_00000001.JPEG", photos[0][-1])])
    for split, n, part in [*shards(photos), test]:
        paths = [with_class(name, wnid) if wnid else name for wnid, name, _ in part]
        images = [{"bytes": p[-1], "path": path} for p, path in zip(part, paths, strict=True)]
        labels = [LABELS.get(wnid, -1) for wnid, _, _ in part]
        rows = columns(part, labels) if columns else {"image": images, "label": labels}
        table = pyarrow.table(rows).replace_schema_metadata(info)
        file = there / path.format(split={"val": "validation"}.get(split, split), n=n)
        pyarrow.parquet.write_table(table, new(file), row_group_size=2)


def without_path(part, labels):
    """Columns of parquet files that WebDataset's have become."""
    keys = [name.removesuffix(".JPEG") for _, name, _ in part]
    return {"jpg": [data for _, _, data in part], "cls": labels, "__key__": keys}


def without_names(part, labels):
    """Columns in which nothing but the label says the class: its number in LABELS."""
    wnids = list(LABELS)
    images = [{"bytes": data, "path": None} for _, _, data in part]
    return {"image": images, "label": [wnids.index(wnid) if wnid else -1 for wnid, _, _ in part]}


def classes(*names):
    """What Hugging Face writes into a parquet file about the classes that its labels number."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def wds(photos, there, path="imagenet1k-{split}-{n:04d}.tar", sample="{stem}", end=".jpg", notes=None):
    """WebDataset's tars: a sample of each photo, with notes that are functions of its label."""
    notes = notes or {".cls": str, ".json": lambda label: json.dumps({"label": label, "width": 9})}
    for split, n, part in shards(photos):
        members = {}
        for wnid, name, data in part:
            stem = sample.format(stem=name.removesuffix(".JPEG"), wnid=wnid)
            members[f"{stem}{end}"] = data
            members |= {
                f"{stem}{suffix}": note(LABELS[wnid]).encode() for suffix, note in notes.items()
            }
        file = there / path.format(split={"val": "validation"}.get(split, split), n=n)
        new(file).write_bytes(make_tar(members))


TODAY = {
    "archives": (archives, ".tar.gz"),
    "archives, .tgz": (archives, ".TGZ"),
    "archives, gunzipped": (archives, ".tar", bytes),
    "archives, bzip2": (archives, ".tar.bz2", bz2.compress),
    "unpacked": (unpacked,),
    "unpacked into two": (unpacked, "train", "val"),
    "unpacked one by one": (unpacked, "data/train_images_{}", "data/val_images"),
    "parquet": (parquet,),
    "parquet in folders": (parquet, "default/{split}/{n:04d}.parquet"),
    "parquet of WebDataset": (parquet, "{split}-{n}.PARQUET", without_path),
    "WebDataset": (wds,),
    "WebDataset, one folder a split": (wds, "{split}/{n:06d}.tar", "{stem}", ".jpeg"),
    "WebDataset, .cls only": (wds, "imagenet-{split}-{n:06d}.tar", "./{stem}", ".JPG", {".cls": str}),
    "WebDataset, .json only": (wds, "shards/{split}-{n}.tar", "{stem}", ".jpg", {".json": str}),
    "WebDataset, folders": (wds, "{split}_{n}.tar", "{wnid}/{stem}", ".jpg", {".txt": str}),
}


@pytest.mark.parametrize("form", TODAY)
def test_forms_of_today_give_the_same_objects(s3, bucket, folder, form, capsys):
    assert run(folder, f"s3://{bucket}/folder") == 0
    make, *how = TODAY[form]
    source = folder.with_name("a test of train")  # no name of SOURCE itself says what it holds
    make(photos_in(folder), source, *how)
    capsys.readouterr()
    assert run(source, f"s3://{bucket}/p") == 0
    assert objects(s3, bucket, "p/") == objects(s3, bucket, "folder/")
    left_out = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(left_out) == (make is not wds)
    assert all("1 files or folders are left out" in line and "test" in line for line in left_out)


@pytest.mark.parametrize("form", ["archives", "parquet", "WebDataset"])
def test_forms_of_today_resized_and_nothing_stays(s3, bucket, folder, form, monkeypatch):
    make, *how = TODAY[form]
    make(photos_in(folder), folder.with_name("source"), *how)
    scratch = folder.with_name("scratch")
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert run(folder, f"s3://{bucket}/folder", "--resize", 256) == 0
    assert run(folder.with_name("source"), f"s3://{bucket}/p", "--resize", 256) == 0
    assert objects(s3, bucket, "p/") == objects(s3, bucket, "folder/")
    assert not [path for path in scratch.iterdir() if path.name.startswith("stage-imagenet")]


def labels_of(objects):
    """How often each label is in train.txt."""
    return Counter(line.split()[1] for line in objects["train.txt"].decode().splitlines())


def test_labels_of_a_subset_that_numbers_its_own_classes(s3, bucket, folder, tmp_path, capsys):
    """If the file says that these are other classes, no class is guessed."""
    photos = photos_in(folder)
    wnids, words = classes(*LABELS), classes("tench", "goldfish", "toilet tissue")
    parquet(photos, tmp_path / "a", columns=without_names, info=wnids)
    assert run(tmp_path / "a", f"s3://{bucket}/a") == 0
    put = objects(s3, bucket, "a/")
    assert labels_of(put) == {"0": 4, "1": 4, "999": 4}
    stored = {data for wnid in LABELS for data in tar_members(put[f"{TRAIN}/{wnid}.tar"]).values()}
    assert stored == {data for split, _, _, data in photos if split == "train"}
    parquet(photos, tmp_path / "b", columns=without_names, info=words)
    assert run(tmp_path / "b", f"s3://{bucket}/b") == 2
    assert "its labels are those of other classes than ILSVRC-2012 has" in capsys.readouterr().err
    parquet(photos, tmp_path / "c", info=words)  # the names of the photos say the class
    assert run(tmp_path / "c", f"s3://{bucket}/c") == 0
    assert run(folder, f"s3://{bucket}/folder") == 0
    assert objects(s3, bucket, "c/") == objects(s3, bucket, "folder/")


def test_samples_that_are_numbered_anew_in_each_archive(s3, bucket, folder, tmp_path):
    for number, (split, wnid, _, data) in enumerate(photos_in(folder)):
        if split == "train":
            place = tmp_path / "wds" / f"{number:03d}.tar"
            members = {
                "0000.jpg": data,
                "0000.cls": wnid.encode(),
                "0001.jpg": JPEG_START,
                "0001.cls": b"5",
            }
            new(place).write_bytes(make_tar(members))
    assert run(tmp_path / "wds", f"s3://{bucket}") == 0
    put = objects(s3, bucket)
    assert labels_of(put) == {"0": 4, "1": 4, "5": 1, "999": 4}
    stored = [data for wnid in LABELS for data in tar_members(put[f"{TRAIN}/{wnid}.tar"]).values()]
    assert sorted(stored) == sorted(data for split, _, _, data in photos_in(folder) if split == "train")


def test_what_is_odd_in_the_forms_of_today_is_named(s3, bucket, folder, tmp_path, capsys):
    photos = photos_in(folder)
    parquet(photos, tmp_path / "p")
    rows = {
        "image": [{"bytes": b"x", "path": "a.JPEG"}, {"bytes": photos[0][-1], "path": "b.JPEG"}, None]
    }
    pyarrow.parquet.write_table(
        pyarrow.table(rows | {"label": [1, -1, 1]}), tmp_path / "p" / "train_x.parquet"
    )
    assert run(tmp_path / "p", f"s3://{bucket}/p") == 0
    said = capsys.readouterr().out
    assert (
        "train_x.parquet: 1 rows without a label, train_x.parquet: row 0, train_x.parquet: row 2"
        in said
    )
    wds(photos, tmp_path / "w")
    odd = {"n01440764_7.jpg": JPEG_START, "n01440764_7.cls": b"3", "alone.json": b"", "a.txt": b""}
    (tmp_path / "w" / "train-x.tar").write_bytes(make_tar(odd))
    assert run(tmp_path / "w", f"s3://{bucket}/w") == 0
    said = capsys.readouterr().out
    assert "3 files or folders are left out: " in said
    assert "train-x.tar/n01440764_7.* (it says another class)" in said
    assert b"n01440764/n01440764_7.JPEG 0\n" in objects(s3, bucket, "w/")["train.txt"]


def test_photo_that_is_there_twice(s3, bucket, folder, tmp_path, capsys):
    archives(photos_in(folder), tmp_path / "a", ".tar.gz")
    gunzipped = gzip.decompress((tmp_path / "a" / "train_images_0.tar.gz").read_bytes())
    (tmp_path / "a" / "train_images_0.tar").write_bytes(gunzipped)
    (tmp_path / "a" / "train_more.tar").write_bytes(gunzipped)
    assert run(folder, f"s3://{bucket}/folder") == 0
    assert run(tmp_path / "a", f"s3://{bucket}/p") == 0
    assert objects(s3, bucket, "p/") == objects(s3, bucket, "folder/")
    assert "5 files or folders are left out: " in capsys.readouterr().out
    (tmp_path / "a" / "train_more.tar").write_bytes(make_tar({"n01440764_1.JPEG": JPEG_START}))
    assert run(tmp_path / "a", f"s3://{bucket}/q") == 2
    assert "have another photo n01440764_1.JPEG each; keep one of the two" in capsys.readouterr().err


# ---- in several runs


def test_archives_of_a_split_one_after_the_other(s3, bucket, folder, tmp_path, capsys):
    """Each run adds its photos to those of the runs before; each may be made again."""
    archives(photos_in(folder), tmp_path / "a", ".tar.gz")
    sources = sorted((tmp_path / "a").glob("train*"))
    for source in sources:
        assert run(source, f"s3://{bucket}") == 0
    put = objects(s3, bucket)
    for source in sources[::-1]:
        capsys.readouterr()
        assert run(source, f"s3://{bucket}") == 0
        assert "3 tars, 0 of them uploaded" in capsys.readouterr().out
        assert objects(s3, bucket) == put
    names = [f"{TRAIN}/{wnid}.tar" for wnid in LABELS]
    parts = [f"{TRAIN}/train_images_{n}/{wnid}.tar" for n in (1, 2) for wnid in LABELS]
    assert set(put) == {*names, *parts, "train.txt"}
    photos = [photo for photo in photos_in(folder) if photo[0] == "train"]
    stored = [data for key in names + parts for data in tar_members(put[key]).values()]
    assert sorted(stored) == sorted(data for _, _, _, data in photos)
    lines = {f"{wnid}/{name} {LABELS[wnid]}" for _, wnid, name, _ in photos}
    assert put["train.txt"].decode().splitlines() == sorted(lines)


def test_photos_of_another_run_are_not_lost(s3, bucket, folder, tmp_path, capsys):
    """Where the first and the second place of a class are taken, a third part is refused."""
    source, wnid = tmp_path / "source", "n01440764"
    for number in range(3):
        shutil.rmtree(source, ignore_errors=True)
        new(source / wnid / f"{wnid}_{number}.JPEG").write_bytes(JPEG_START)
        assert run(source, f"s3://{bucket}") == (2 if number == 2 else 0)
    error = capsys.readouterr().err
    assert f"s3://{bucket}/{TRAIN}/source/{wnid}.tar: has photos that would be lost; put all" in error
    lines = objects(s3, bucket)["train.txt"].decode().splitlines()
    assert lines == [f"{wnid}/{wnid}_0.JPEG 0", f"{wnid}/{wnid}_1.JPEG 0"]


def test_classes_of_several_runs_share_a_label_file(s3, bucket, folder, tars, tmp_path):
    """Classes, and parts of val; what is gone from the bucket is gone from its labels."""
    assert run(folder, f"s3://{bucket}/folder") == 0
    wanted = objects(s3, bucket, "folder/")
    for wnid in LABELS:
        shutil.copytree(folder / "train" / wnid, tmp_path / wnid / "train" / wnid)
        assert run(tmp_path / wnid, f"s3://{bucket}/p") == 0
    for number, path in enumerate((folder / "val").iterdir()):
        shutil.copytree(path, tmp_path / f"part{number}" / "val" / path.name)
        assert run(tmp_path / f"part{number}", f"s3://{bucket}/p") == 0
    put = objects(s3, bucket, "p/")
    assert [put[key] for key in ("train.txt", "val.txt")] == [wanted["train.txt"], wanted["val.txt"]]
    members = [tar_members(data) for key, data in put.items() if key.startswith(VAL)]
    assert [len(each) for each in members] and sum(map(len, members)) == len(VAL_NAMES)
    s3.delete_object(Bucket=bucket, Key=f"p/{TRAIN}/n01443537.tar")
    assert run(tmp_path / "n01440764", f"s3://{bucket}/p") == 0
    lines = objects(s3, bucket, "p/")["train.txt"].decode()
    assert "n01443537" not in lines and lines.count("\n") == 8


def test_label_file_that_contradicts_is_refused(s3, bucket, folder, capsys):
    for text, why in [
        (
            b"n01443537/a.JPEG 1\nn15075141/b.JPEG 1000\n",
            "line 2: n15075141/b.JPEG 1000 is no label of",
        ),
        (b"\xff\xd8\xff", "line 1: \\ufffd"),
        (b"n01440764_1.JPEG 7\n", "n01440764_1.JPEG has label 7, but 0 in SOURCE; move it away"),
    ]:
        s3.put_object(Bucket=bucket, Key="train.txt", Body=text)
        s3.put_object(Bucket=bucket, Key=f"{TRAIN}/n000.tar", Body=b"")
        assert run(folder, f"s3://{bucket}") == 2
        error = capsys.readouterr().err
        assert f"error: s3://{bucket}/train.txt" in error and why in error and error.count("\n") == 1
        assert objects(s3, bucket)["train.txt"] == text
    s3.put_object(Bucket=bucket, Key="train.txt", Body=b"n01440764_1.JPEG 0\nx/c d.JPEG\t5\n")
    assert run(folder, f"s3://{bucket}") == 0
    lines = objects(s3, bucket)["train.txt"].decode().splitlines()
    assert lines[-1] == "x/c d.JPEG 5" and len(lines) == 14


# ---- once more


def test_second_run_puts_only_what_differs(s3, bucket, proxy, folder, capsys):
    assert run(folder, f"s3://{bucket}/p") == 0
    first = uploads(proxy)
    assert first[-2:] == ["p/train.txt", "p/val.txt"] and len(first) == 6
    assert run(folder, f"s3://{bucket}/p") == 0
    assert uploads(proxy) == []
    assert "train: 12 images in 3 tars, 0 of them uploaded" in capsys.readouterr().out

    # A changed image, of the same length, age and name.
    changed = folder / "train" / "n01443537" / "n01443537_9.JPEG"
    changed.write_bytes(changed.read_bytes()[:-3] + b"\0\xff\xd9")
    assert run(folder, f"s3://{bucket}/p") == 0
    assert uploads(proxy) == [f"p/{TRAIN}/n01443537.tar"]
    put = objects(s3, bucket, "p/")
    tar = tar_members(put[f"{TRAIN}/n01443537.tar"])
    assert tar["n01443537_9.JPEG"] == changed.read_bytes()

    # A tar that is gone, one that another program replaced, and an image fewer in a third.
    s3.delete_object(Bucket=bucket, Key=f"p/{TRAIN}/n01443537.tar")
    s3.put_object(Bucket=bucket, Key=f"p/{VAL}/000.tar", Body=put[f"{VAL}/000.tar"][:1024])
    (folder / "train" / "n15075141" / "n15075141_9.JPEG").unlink()
    assert run(folder, f"s3://{bucket}/p") == 0
    *some, last = uploads(proxy)
    tars = [f"{TRAIN}/n01443537.tar", f"{TRAIN}/n15075141.tar", f"{VAL}/000.tar"]
    assert sorted(some) == [f"p/{tar}" for tar in tars] and last == "p/train.txt"
    again = objects(s3, bucket, "p/")
    unchanged = set(put) - {f"{TRAIN}/n15075141.tar", "train.txt"}
    assert all(again[key] == put[key] for key in unchanged)


def test_reports_tars_of_another_source(s3, bucket, folder, capsys):
    assert run(folder, f"s3://{bucket}") == 0
    shutil.rmtree(folder / "train" / "n01443537")
    assert run(folder, f"s3://{bucket}") == 0
    note = f"Not of {folder}, but there: {TRAIN}/n01443537.tar, 1 in all"
    assert note in capsys.readouterr().out.splitlines()


# ---- stopped halfway


@pytest.fixture
def large(tmp_path):
    """A source of one class of 160 MiB, more than an upload reads ahead; its images are not decoded."""
    path = tmp_path / "large" / "train" / "n01440764"
    path.mkdir(parents=True)
    for number in range(20):
        with (path / f"n01440764_{number:02}.JPEG").open("wb") as file:
            file.write(JPEG_START)
            file.truncate(8 * 2**20)
    return path.parents[1]


def is_untouched(s3, bucket):
    """Whether a bucket holds neither an object nor an upload that was left halfway."""
    return not objects(s3, bucket) and "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


def test_source_that_changes_meanwhile_leaves_no_tar(s3, bucket, proxy, large, capsys):
    last = large / "train" / "n01440764" / "n01440764_19.JPEG"
    # The upload begins before all images are read for it, and after all were read once.
    proxy.faults["POST", "n01440764.tar"] = iter([lambda: last.write_bytes(b"something else")])
    assert run(large, f"s3://{bucket}") == 2
    error = capsys.readouterr().err
    assert "changed while it was read; start again" in error and error.count("\n") == 1
    assert last.read_bytes() == b"something else" and uploads(proxy) == []
    assert is_untouched(s3, bucket)
    assert run(large, f"s3://{bucket}") == 0  # from now on it stays the same
    assert uploads(proxy) == [f"{TRAIN}/n01440764.tar", "train.txt"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_tar(s3, bucket, proxy, large, signum):
    """It comes with the first part, and no part is quick: most of the source is not read by then."""
    command = [sys.executable, ROOT / "stage_imagenet.py", large, f"s3://{bucket}"]
    sent = []

    def interrupt():
        sent.append(None)
        if len(sent) == 1:
            process.send_signal(signum)
        time.sleep(1.5)

    proxy.faults["PUT", "n01440764.tar"] = itertools.repeat(interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.wait(60) == 130
        assert process.stderr.read() == "Interrupted; the same command goes on from here\n"
    assert 0 < len(sent) < 20, "the upload had begun, and its thread heard of the interrupt"
    assert uploads(proxy) == [] and is_untouched(s3, bucket)


def test_failure_of_one_tar_puts_no_label_file(s3, bucket, tars, capsys):
    path = tars / f"{TRAIN}.tar"
    data = bytearray(path.read_bytes())
    data[data.rindex(b"n15075141_10.JPEG")] = 0  # the header's checksum is wrong now
    path.write_bytes(data)
    assert run(tars, f"s3://{bucket}") == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: {path}: n15075141.tar: a damaged tar, or cut off; copy or download it again\n"
    )
    # What was uploaded beside it is whole and stays.
    assert set(objects(s3, bucket)) <= {f"{TRAIN}/n01440764.tar", f"{TRAIN}/n01443537.tar"}


def peak_of_staging(source, bucket):
    """The most bytes that Python holds at once while a source is staged."""
    tracemalloc.start()
    try:
        assert run(source, f"s3://{bucket}") == 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded(s3, bucket, tmp_path):
    """A class tar within a tar, both much larger than what may be in memory."""
    inner, image = tmp_path / "n01440764.tar", JPEG_START + bytes(2**20)
    with tarfile.open(inner, "w") as tar:
        for number in range(300):
            info = tarfile.TarInfo(f"n01440764_{number}.JPEG")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    with tarfile.open(tmp_path / f"{TRAIN}.tar", "w") as tar:
        tar.add(inner, inner.name)
    inner.unlink()
    peak = peak_of_staging(tmp_path, bucket)
    assert peak < 150 * 2**20, f"{peak / 2**20:.0f} MiB"
    assert s3.head_object(Bucket=bucket, Key=f"{TRAIN}/n01440764.tar")["ContentLength"] > 300 * 2**20


def test_a_shard_is_not_in_memory(s3, bucket, tmp_path):
    """Neither a compressed archive nor a parquet file, both larger than what may be in memory."""
    rng, count = np.random.default_rng(0), 200
    images = (JPEG_START + rng.bytes(2**20) for _ in range(2 * count))
    names = [f"n01440764_{number}.JPEG" for number in range(2 * count)]
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "train_images_0.tar.gz", "w:gz", compresslevel=1) as tar:
        for name, image in zip(names[:count], images, strict=False):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    kinds = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"image": kinds, "label": pyarrow.int64()})
    with pyarrow.parquet.ParquetWriter(tmp_path / "data" / "train-0.parquet", schema) as file:
        for name, image in zip(names[count:], images, strict=True):
            rows = {"image": [{"bytes": image, "path": name}], "label": [0]}
            file.write_table(pyarrow.table(rows, schema))
    peak = peak_of_staging(tmp_path, bucket)
    peak += pyarrow.default_memory_pool().max_memory()
    assert peak < 250 * 2**20, f"{peak / 2**20:.0f} MiB"
    assert s3.head_object(Bucket=bucket, Key=f"{TRAIN}/n01440764.tar")["ContentLength"] > 400 * 2**20


# ---- resized


def test_resize(s3, bucket, proxy, folder, train):
    odd = folder / "train" / "n01443537" / "n01443537_odd.JPEG"
    odd.write_bytes(JPEG_START + b"no image")
    cmyk = Image.new("CMYK", (300, 200), (0, 200, 200, 0))
    (odd.parent / "n01443537_cmyk.JPEG").write_bytes(encode(cmyk, "JPEG"))
    small = odd.with_name("n01443537_small.JPEG")
    small.write_bytes(encode(Image.new("RGB", (256, 256), (0, 90, 200)), "JPEG"))
    assert run(folder, f"s3://{bucket}", "--resize", 256) == 0
    put = objects(s3, bucket)
    for wnid, files in train.items():
        resized = tar_members(put[f"{TRAIN}/{wnid}.tar"])
        for name, data in files.items():
            with Image.open(io.BytesIO(resized[name])) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))
            was, now = (decode_image(d, [256, 256]).astype(int) for d in (data, resized[name]))
            assert np.abs(was - now).mean() < 12, "another picture"
    resized = tar_members(put[f"{TRAIN}/n01443537.tar"])
    assert resized[odd.name] == odd.read_bytes()  # the driver reports it
    assert resized[small.name] == small.read_bytes()
    with Image.open(io.BytesIO(resized["n01443537_cmyk.JPEG"])) as image:
        assert (image.mode, image.size) == ("RGB", (256, 256))
    assert f"n01443537/{odd.name} 1".encode() in put["train.txt"].splitlines()

    uploads(proxy)
    assert run(folder, f"s3://{bucket}", "--resize", 256) == 0
    assert uploads(proxy) == []
    assert run(folder, f"s3://{bucket}") == 0  # the same images, not resized: other tars, same labels
    again = uploads(proxy)
    assert len(again) == 4 and all(key.endswith(".tar") for key in again)


# ---- what can't be staged


def truncated(tars):
    path = tars / f"{TRAIN}.tar"
    path.write_bytes(path.read_bytes()[:-30000])
    return tars


def cut_at_a_member(tars):
    path = tars / f"{TRAIN}.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[:offset])
    return path


def a_zip(tars):
    path = tars / "imagenet-object-localization-challenge.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_1.JPEG", JPEG_START)
    return path


def without_ground_truth(tars):
    (tars / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    return tars


def damaged_ground_truth(tars):
    path = tars / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(path.read_bytes()[:200])
    return tars


def short_ground_truth(tars):
    (tars / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    data = make_devkit(tars) / "data"
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
    return tars


def unknown_wnid(tars):
    (tars / f"{TRAIN}.tar").write_bytes(make_tar({"n00000001.tar": make_tar({"a": b""})}))
    return tars


def compressed(tars):
    path = tars / f"{TRAIN}.tar"
    with tarfile.open(path, "w:gz"):
        pass
    return path


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncated, f"{TRAIN}.tar: no whole, uncompressed tar (unexpected end of data)"),
        (cut_at_a_member, f"{TRAIN}.tar: a damaged tar, or cut off; copy or download it again"),
        (compressed, f"{TRAIN}.tar: holds no image"),
        (a_zip, ".zip: unpack it first; then SOURCE can have ILSVRC2012_img_train.tar, "),
        (without_ground_truth, "put ILSVRC2012_devkit_t12.tar.gz here"),
        (damaged_ground_truth, "ILSVRC2012_devkit_t12.tar.gz: no readable ground truth (EOFError"),
        (short_ground_truth, "the ground truth doesn't know ILSVRC2012_val_00000003.JPEG"),
        (unknown_wnid, "n00000001 is none of the 1,000 WNIDs of ILSVRC-2012"),
        (lambda tars: tars / "nowhere", "nowhere: no such file or folder"),
        (lambda tars: tars.parent / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12: nothing to stage"),
    ],
)
def test_unusable_source_is_a_one_line_error(s3, bucket, tars, capsys, spoil, message):
    assert run(spoil(tars), f"s3://{bucket}") == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert out == "" and is_untouched(s3, bucket)


def test_parquet_needs_pyarrow(s3, bucket, folder, monkeypatch, capsys):
    """Like a machine on which it is not installed."""
    parquet(photos_in(folder), folder.with_name("source"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(folder.with_name("source"), f"s3://{bucket}") == 2
    error = capsys.readouterr().err
    assert "train-00000-of-00003.parquet: pyarrow is needed to read it: pip install pyarrow" in error
    assert error.count("\n") == 1 and is_untouched(s3, bucket)


def cut_archive(source, photos):
    archives(photos, source, ".tar.gz")
    path = source / "train_images_1.tar.gz"
    path.write_bytes(path.read_bytes()[:-2000])


def damaged_archive(source, photos):
    archives(photos, source, ".tar.gz")
    path = source / "train_images_1.tar.gz"
    path.write_bytes(path.read_bytes()[:500] + bytes(1000) + path.read_bytes()[1500:])


def cut_parquet(source, photos):
    parquet(photos, source)
    path = source / "data" / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-9])


def damaged_parquet(source, photos):
    parquet(photos, source)
    path = source / "data" / "train-00001-of-00003.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:30] + b"\xff" * 300 + data[330:])


def other_columns(source, photos):
    parquet(photos, source, columns=lambda part, labels: {"text": ["a"] * len(part), "label": labels})


def other_numbers(source, photos):
    wds(photos, source, sample="{stem}", notes={".cls": lambda label: str(label + 1)})


def only_test_set(source, photos):
    new(source / "test_images.tar.gz").write_bytes(gzip.compress(make_tar({"a.JPEG": JPEG_START})))


def no_class(source, photos):
    new(source / "train-0.tar").write_bytes(make_tar({"0001.jpg": JPEG_START, "0001.json": b"{}"}))


def something_else(source, photos):
    for name in ("notes.txt", "Annotations/a.xml", "devkit.tar.gz", "x.zip", "logs/b/c", "d", "e"):
        new(source / name).write_bytes(b"x")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (cut_archive, "train_images_1.tar.gz: a damaged archive, or cut off (Compressed file ended"),
        (damaged_archive, "train_images_1.tar.gz: a damaged archive, or cut off ("),
        (cut_parquet, "train-00001-of-00003.parquet: a damaged parquet file, or cut off ("),
        (damaged_parquet, "train-00001-of-00003.parquet: a damaged parquet file, or cut off ("),
        (other_columns, "parquet: has the columns text, label; image and label are needed"),
        (other_numbers, "15075141_10.cls: label 1000 is none of 0..999, the ranks of the sorted WNIDs"),
        (only_test_set, "source: nothing to stage: it holds test_images.tar.gz; SOURCE can have "),
        (no_class, "train-0.tar: 0001.jpg: its class is not in a folder's name, its own ("),
        (
            something_else,
            "source: nothing to stage: it holds Annotations/, d, devkit.tar.gz, e, logs/ and 2 more; "
            "SOURCE can have ILSVRC2012_img_train.tar, ",
        ),
        (
            lambda source, photos: source.mkdir(),
            "source: nothing to stage: it is empty; SOURCE can have ",
        ),
    ],
)
def test_unusable_form_of_today_is_a_one_line_error(s3, bucket, folder, capsys, spoil, message):
    source = folder.with_name("source")
    spoil(source, photos_in(folder))
    assert run(source, f"s3://{bucket}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert is_untouched(s3, bucket)


@pytest.mark.parametrize(
    "path, message",
    [
        ("train/n00000001/a.JPEG", "train: n00000001 is none of the 1,000 WNIDs of ILSVRC-2012"),
        ("train/a\nb/a.JPEG", "train: a b is none of the 1,000 WNIDs of ILSVRC-2012"),
        ("train/n02119789/", "n02119789: holds no image"),
        ("train/n01440764/a\nb.JPEG", r"a label file can't have the name 'a\nb.JPEG'"),
    ],
)
def test_unusable_folder_is_a_one_line_error(s3, bucket, folder, capsys, path, message):
    (folder / path).parent.mkdir(exist_ok=True)
    if path.endswith("/"):
        (folder / path).mkdir()
    else:
        (folder / path).write_bytes(JPEG_START)
    assert run(folder, f"s3://{bucket}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not {"train.txt", "val.txt"} & set(objects(s3, bucket))


def test_train_without_class_folders(s3, bucket, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.JPEG").write_bytes(b"x")
    assert run(tmp_path, f"s3://{bucket}") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/train: has no class folder nXXXXXXXX\n"


def test_no_such_bucket(s3, folder, capsys):
    assert run(folder, "s3://nowhere/p") == 2
    place, error = "s3://nowhere/p/.check", capsys.readouterr().err
    assert (
        error.startswith(f"error: {place}: no such bucket; check its name") and error.count("\n") == 1
    )


def test_bucket_that_cannot_be_written(s3, bucket, proxy, folder, capsys):
    proxy.always["PUT"] = "403"
    assert run(folder, f"s3://{bucket}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: s3://{bucket}/.check: access denied") and error.count("\n") == 1
    assert uploads(proxy) == [] and is_untouched(s3, bucket)


@pytest.mark.parametrize(
    "options",
    [["bucket"], ["s3://"], ["s3:///p"], ["s3://b", "--resize", "0"], ["s3://b", "--resize", "x"]],
)
def test_unusable_command_line(folder, capsys, options):
    with pytest.raises(SystemExit) as ended:
        run(folder, *options)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
