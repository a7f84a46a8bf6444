"""Loading, measured: this project beside the write-up's way, ray.data and tf.data, on the same photos.

    python benchmarks/loading.py FOLDER [--repeats 5]

FOLDER is laid out like the bucket: tars of full-size photos below ILSVRC2012_img_train/ and train.txt.
An S3 server on loopback serves it over HTTP. What is compared takes turns, so that a change of the
machine's speed affects all of it. Prints medians and, in brackets, the least and the most.
"""

import argparse
import contextlib
import io
import logging
import os
import tarfile
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import measuring
from measuring import spread, take_turns

import driver
import imagenet
from machinery.cluster import joining, tasks
from machinery.storage.images import decode_image
from stage_imagenet import resize
from tests.support import make_tar

import cv2
import numpy as np
import ray
from PIL import Image

CPUS = 2
SIZE = [256, 256]
PREFIX = "ILSVRC2012_img_train/"
PASS_IMAGES = 3000  # a pass reads the folder's tars in as many copies as make so many images
BIG_TAR_IMAGES = 1300  # in a tar of ImageNet

# A line of the table: ours and the other as lists of numbers in pairs, and what their ratio should be.
Row = namedtuple("Row", "measure ours other unit target")


# ---- the ways to load: each loads all tars and returns how many images it has loaded


def wait_for(loaded):
    """Wait for references of arrays in the object store and of their names; count them by the names."""
    ray.wait([images for images, *_ in loaded], num_returns=len(loaded), fetch_local=False)
    return sum(map(len, ray.get([names for _, names, *_ in loaded])))


def load_ours(source, tars):
    """As driver.py does."""
    return wait_for(imagenet.load_tarfiles_from_s3(source, tars, SIZE))


def resize_as_written(data):
    """The write-up's way with one image: Pillow decodes, pastes and resizes it."""
    image = Image.open(io.BytesIO(data))
    rgb = Image.new("RGB", image.size)
    rgb.paste(image)
    return np.asarray(rgb.resize(SIZE[::-1], Image.Resampling.LANCZOS))


def open_tar(source, tar):
    """A tar, downloaded into memory as ours."""
    with contextlib.closing(source.open(tar)) as file:
        return tarfile.open(fileobj=io.BytesIO(file.read()))


def load_tar_as_written(source, tar):
    """The write-up's way with one tar: one array an image, then all as one."""
    images, names = [], []
    with open_tar(source, tar) as members:
        for member in members:
            images.append(resize_as_written(members.extractfile(member).read())[None])
            names.append(member.name)
    return np.concatenate(images), names


def load_as_written(source, tars):
    """The write-up's way, in the same kind of tasks as ours."""
    options = {"num_returns": 2, "scheduling_strategy": "SPREAD"}
    return wait_for([tasks.start(load_tar_as_written, source, tar, **options) for tar in tars])


def decode_batch(batch):
    """ray.data's map function: our own decoder, so that only the pipelines differ."""
    return {"image": np.stack([decode_image(data, SIZE) for data in batch["JPEG"]])}


def load_with_ray_data(source, tars):
    """ray.data's WebDataset reader; tasks read and decode, two a CPU, as many at a time as ours."""
    import pyarrow.fs

    scheme, _, host = os.environ["AWS_ENDPOINT_URL"].partition("://")
    user = {"access_key": os.environ["AWS_ACCESS_KEY_ID"], "region": os.environ["AWS_DEFAULT_REGION"]}
    user["secret_key"] = os.environ["AWS_SECRET_ACCESS_KEY"]
    s3 = pyarrow.fs.S3FileSystem(**user, endpoint_override=host, scheme=scheme)
    paths = [f"{source.name}/{tar.key}" for tar in tars]
    # The fastest of what was tried: few large blocks, and the same num_cpus, which fuses the two steps.
    photos = ray.data.read_webdataset(
        paths, filesystem=s3, decoder=None, override_num_blocks=4 * CPUS, num_cpus=0.5
    )
    return photos.map_batches(decode_batch, batch_size=None, num_cpus=0.5).materialize().count()


def load_with_tf_data(source, tars, **resize):
    """tf.data: downloading beside decoding and resizing in parallel, into batches in memory."""
    import tensorflow as tf  # here, after alexnet, which keeps it quiet as it starts

    def members():
        for tar in tars:
            with open_tar(source, tar) as files:
                yield [files.extractfile(member).read() for member in files]

    def decode(data):
        image = tf.io.decode_jpeg(data, 3, dct_method="INTEGER_FAST", fancy_upscaling=False)
        return tf.cast(tf.image.resize(image, SIZE, **resize) + 0.5, tf.uint8)

    photos = tf.data.Dataset.from_generator(members, output_signature=tf.TensorSpec([None], tf.string))
    photos = photos.prefetch(2).unbatch()
    photos = photos.map(decode, num_parallel_calls=CPUS, deterministic=False).batch(64).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = CPUS
    return sum(len(batch) for batch in photos.with_options(options).as_numpy_iterator())


# ---- measurements


def copies_of(photos):
    """How often a pass reads the photos."""
    return -(-PASS_IMAGES // len(photos))


def put_copies(s3, key, tar, photos):
    """Put as many copies of a tar into the bucket as a pass reads; their keys start so."""
    for copy in range(copies_of(photos)):
        s3.put_object(Bucket="benchmark", Key=f"{key}{copy}.tar", Body=tar)


def speed(load, source, tars, images):
    """Images a second and core of a way to load; RuntimeError if it does not load them all."""
    start = time.perf_counter()
    loaded = load(source, tars)
    seconds = time.perf_counter() - start
    if loaded != images:
        raise RuntimeError(f"{load} has loaded {loaded} of {images} images")
    return images / seconds / CPUS


def speeds(source, photos, repeats):
    """Our images a second and core, from S3 into memory, against other ways to load."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces every run
    others = {
        "the write-up's way": (load_as_written, ">= 1.7"),
        "ray.data": (load_with_ray_data, "> 1"),
        "tf.data, bilinear": (partial(load_with_tf_data, antialias=True), "> 1"),
        "tf.data, area": (partial(load_with_tf_data, method="area"), "> 1"),
    }
    what = source, imagenet.list_tars(source, PREFIX)[0], copies_of(photos) * len(photos)
    ways = {name: partial(speed, load, *what) for name, (load, _) in others.items()}
    results = take_turns({"ours": partial(speed, load_ours, *what), **ways}, repeats)
    return [
        Row(f"S3 to memory, against {name}", results["ours"], results[name], "images/s/core", target)
        for name, (_, target) in others.items()
    ]


def resized(s3, source, photos, repeats):
    """The same photos, resized as stage_imagenet.py --resize 256 does, against as they are."""
    kinds, ways = {"resized": [resize(photo, SIZE[0]) for photo in photos], "full": photos}, {}
    for name, kind in kinds.items():
        put_copies(
            s3, f"{name}/", make_tar({f"{i}.JPEG": photo for i, photo in enumerate(kind)}), photos
        )
        tars, _ = imagenet.list_tars(source, f"{name}/")
        ways[name] = partial(speed, load_ours, source, tars, copies_of(photos) * len(photos))
    results, sizes = take_turns(ways, repeats), {k: [len(b"".join(v)) / 1e6] for k, v in kinds.items()}
    return [
        Row("staged with --resize 256, size", sizes["resized"], sizes["full"], "MB", "<= 1"),
        Row("and speed", results["resized"], results["full"], "images/s/core", "> 1"),
    ]


def load_and_time(source, tar):
    """Do what our load task does, the copy in the object store too; returns images and CPU-seconds."""
    start = time.process_time()
    images, *_ = imagenet.load_tarfile(source, tar, 0, tuple(SIZE), "pixels")
    ray.put(images)
    return len(images), time.process_time() - start


def overhead(source, photos, repeats):
    """What a load task does per CPU-second, against a bare loop of our decoder over bytes in memory."""
    tars, _ = imagenet.list_tars(source, PREFIX)
    cv2.setNumThreads(1)  # as in a load task

    def in_tasks():
        images, seconds = zip(
            *ray.get([tasks.start(load_and_time, source, tar) for tar in tars]), strict=True
        )
        return sum(images) / sum(seconds)

    def loop():
        start = time.process_time()
        for data in photos:
            decode_image(data, SIZE)
        return len(photos) / (time.process_time() - start)

    results = take_turns({"tasks": in_tasks, "loop": loop}, repeats)
    measure = "load tasks, against a loop over bytes in memory"
    return Row(measure, results["tasks"], results["loop"], "images/CPU-s", ">= 0.9")


def quality(photos):
    """The mean absolute difference from the write-up's pixels, over all images."""
    pairs = ((decode_image(data, SIZE), resize_as_written(data)) for data in photos)
    differences = [np.abs(ours.astype(int) - other).mean() for ours, other in pairs]
    return Row("difference from Lanczos", [np.mean(differences)], [2.5], "grey levels", "<= 1")


@ray.remote
def idle():
    """A task that does nothing. Returns its process's id."""
    return os.getpid()


def peak_memory(source, tars):
    """MB that the task that loads a tar takes at its peak, above a worker that has done nothing."""
    with joining.join(driver.runtime_env(), None, num_cpus=1):
        tasks.limit(driver.TASK_TIMEOUT)
        start = 0
        while not start:  # the worker may end before it is looked at
            start = peak = measuring.private_memory(ray.get(idle.remote()))
        [tar] = imagenet.load_tarfiles_from_s3(source, tars, SIZE)
        while not ray.wait([tar.images], timeout=0.01, fetch_local=False)[0]:
            peak = max(peak, *map(measuring.private_memory, measuring.ray_workers()))
    return peak - start


def memory(s3, source, photos, repeats):
    """The peak memory of one task that loads a tar of ImageNet's size."""
    tar = make_tar({f"{i}.JPEG": photos[i % len(photos)] for i in range(BIG_TAR_IMAGES)})
    s3.put_object(Bucket=source.name, Key="big.tar", Body=tar)
    allowed = (BIG_TAR_IMAGES * np.prod([*SIZE, 3]) + len(tar)) / 1e6 + 100
    tars, _ = imagenet.list_tars(source, "big.tar")
    peaks = [peak_memory(source, tars) for _ in range(repeats)]
    measure = f"peak of loading {BIG_TAR_IMAGES} images, against array, tar and 100 MB"
    return Row(measure, peaks, [allowed] * repeats, "MB", "<= 1")


# ---- the table


def print_cells(*cells):
    """Print a line of the table."""
    print("{:<76} {:>20} {:>20} {:<13} {:>5} {:>6} {}".format(*cells).rstrip(), flush=True)


def report(*rows):
    """Print rows; a ratio is the median of the ratios of neighbouring measurements."""
    for row in rows:
        ratios = np.divide(row.ours, row.other)
        cells = row.measure, spread(row.ours), spread(row.other), row.unit, f"{np.median(ratios):.2f}"
        print_cells(*cells, row.target, measuring.verdict(ratios, row.target))


def main():
    """Measure and print everything."""
    parser = argparse.ArgumentParser(description="Measure loading beside other ways to do it.")
    parser.add_argument("folder", type=Path, help="folder laid out like the bucket")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each kind (default: 5)")
    args = parser.parse_args()
    photos = measuring.read_photos(args.folder)
    if not photos:
        parser.error(f"{args.folder / PREFIX} holds no tar with images")
    with measuring.loopback() as s3:
        s3.create_bucket(Bucket="benchmark")
        source = imagenet.source_of("benchmark")
        for path in sorted((args.folder / PREFIX).glob("*.tar")):
            put_copies(s3, f"{PREFIX}{path.stem}-", path.read_bytes(), photos)
        print_cells("", "ours", "other", "unit", "ratio", "target", "")
        # Ray ends processes that are idle for a second; here they stay, to be warm.
        warm = {"idle_worker_killing_time_threshold_ms": 3_600_000}
        with joining.join(driver.runtime_env(), None, num_cpus=CPUS, _system_config=warm):
            tasks.limit(driver.TASK_TIMEOUT)
            report(*speeds(source, photos, args.repeats))
            report(overhead(source, photos, args.repeats))
            report(*resized(s3, source, photos, args.repeats))
        report(quality(photos))
        report(memory(s3, source, photos, args.repeats))


if __name__ == "__main__":
    main()
