"""Loading, measured: this project beside the write-up's way, ray.data and tf.data, on the same photos.

    python benchmarks/loading.py FOLDER [--repeats 5]

FOLDER is laid out like the bucket: tars of full-size photos below ILSVRC2012_img_train/ and train.txt.
An S3 server on loopback serves it over HTTP. What is compared takes turns, so that a change of the
machine's speed affects all of it. Prints medians and, in brackets, the least and the most; a ratio is
the median of the ratios of neighbouring measurements. The last table is about images stored as JPEGs.
"""

import contextlib
import io
import logging
import os
import tarfile
import time
from functools import partial
from pathlib import Path

import measuring
from measuring import TRAIN, private_memory, spread, take_turns

import driver
import imagenet
from machinery.cluster import joining, tasks
from machinery.storage.images import decode_image
from stage_imagenet import resize
from tests.support import make_tar, titled

import cv2
import numpy as np
import ray
import simplejpeg
from PIL import Image

CPUS = 2
SIZE = [256, 256]
PASS_IMAGES = 3000  # a pass reads the folder's tars in as many copies as make so many images
BIG_TAR_IMAGES = 1300  # in a tar of ImageNet
QUALITIES = 80, 85, 88, 90, 92, 95  # of JPEGs


# ---- the ways to load: each loads all tars and returns how many images it has loaded


def wait_for(loaded):
    """Wait for references of arrays in the object store and of their names; count them by the names."""
    ray.wait([images for images, *_ in loaded], num_returns=len(loaded), fetch_local=False)
    return sum(map(len, ray.get([names for _, names, *_ in loaded])))


def load_ours(source, tars):
    """As driver.py does."""
    loaded = imagenet.load_tarfiles_from_s3(source, tars, SIZE)
    return wait_for(imagenet.report_loading(imagenet.DataSet(source, "", "", tars), loaded))


def resize_as_written(data):
    """The write-up's way with one image: Pillow decodes, pastes and resizes it."""
    image = Image.open(io.BytesIO(data))
    rgb = Image.new("RGB", image.size)
    rgb.paste(image)
    return np.asarray(rgb.resize(SIZE[::-1], Image.Resampling.LANCZOS))


def read_tar(source, tar):
    """The names and bytes of a tar's members; it is downloaded into memory, as ours is."""
    with contextlib.closing(source.open(tar)) as file:
        data = io.BytesIO(file.read())
    with tarfile.open(fileobj=data) as members:
        for member in members:
            yield member.name, members.extractfile(member).read()


def load_tar_as_written(source, tar):
    """The write-up's way with one tar: one array an image, then all as one."""
    pairs = [(resize_as_written(data)[None], name) for name, data in read_tar(source, tar)]
    images, names = zip(*pairs, strict=True)
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
    s3 = pyarrow.fs.S3FileSystem(endpoint_override=host, scheme=scheme)
    paths = [f"{source.name}/{tar.key}" for tar in tars]
    # The fastest of what was tried: few large blocks, and the same num_cpus, which fuses the two steps.
    options = {"filesystem": s3, "decoder": None, "override_num_blocks": 4 * CPUS, "num_cpus": 0.5}
    photos = ray.data.read_webdataset(paths, **options)
    return photos.map_batches(decode_batch, batch_size=None, num_cpus=0.5).materialize().count()


def load_with_tf_data(source, tars, **resize):
    """tf.data: downloading beside decoding and resizing in parallel, into batches in memory."""
    import tensorflow as tf  # here, after alexnet, which keeps it quiet as it starts

    def members():
        for tar in tars:
            yield [data for _, data in read_tar(source, tar)]

    def decode(data):
        image = tf.io.decode_jpeg(data, 3, dct_method="INTEGER_FAST", fancy_upscaling=False)
        return tf.cast(tf.image.resize(image, SIZE, **resize) + 0.5, tf.uint8)

    photos = tf.data.Dataset.from_generator(members, output_signature=tf.TensorSpec([None], tf.string))
    photos = photos.prefetch(2).unbatch()
    photos = photos.map(decode, num_parallel_calls=CPUS, deterministic=False).batch(64).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = CPUS
    return sum(len(batch) for batch in photos.with_options(options).as_numpy_iterator())


# ---- measurements: each prints rows of the table


def row(measure, ours, other, unit):
    """Print a row: two lists of numbers, in pairs of neighbours."""
    ratio = np.median(np.divide(ours, other))
    print(f"{measure:<76} {spread(ours):>20} {spread(other):>20} {unit:<13} {ratio:5.2f}", flush=True)


def put_copies(s3, prefix, tar, photos):
    """Put as many copies of a tar into the bucket as a pass reads; returns how many."""
    copies = -(-PASS_IMAGES // len(photos))
    for copy in range(copies):
        s3.put_object(Bucket="benchmark", Key=f"{prefix}{copy}.tar", Body=tar)
    return copies


def speed(load, source, prefix, images):
    """Images a second and core of a way to load; RuntimeError if it does not load them all."""
    tars, _ = imagenet.list_tars(source, prefix)
    start = time.perf_counter()
    loaded = load(source, tars)
    seconds = time.perf_counter() - start
    if loaded != images:
        raise RuntimeError(f"{load} has loaded {loaded} of {images} images")
    return images / seconds / CPUS


def speeds(source, images, repeats):
    """From S3 into memory, against other ways to load."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces every run
    ways = {
        "ours": load_ours,
        "the write-up's way": load_as_written,
        "ray.data": load_with_ray_data,
        "tf.data, bilinear": partial(load_with_tf_data, antialias=True),
        "tf.data, area": partial(load_with_tf_data, method="area"),
    }
    ways = {name: partial(speed, load, source, TRAIN, images) for name, load in ways.items()}
    results = take_turns(ways, repeats)
    ours = results.pop("ours")
    for name, other in results.items():
        row(f"S3 to memory, against {name}", ours, other, "images/s/core")


def resized(s3, source, photos, repeats):
    """The same photos, resized as stage_imagenet.py --resize 256 does, against as they are."""
    sizes, ways = [], {}
    for name, some in ("resized", [resize(photo, SIZE[0]) for photo in photos]), ("full", photos):
        tar = make_tar({f"{i}.JPEG": photo for i, photo in enumerate(some)})
        images = put_copies(s3, f"{name}/", tar, photos) * len(photos)
        ways[name] = partial(speed, load_ours, source, f"{name}/", images)
        sizes.append([sum(map(len, some)) / 1e6])
    row("staged with --resize 256, size", *sizes, "MB")
    row("and speed", *take_turns(ways, repeats).values(), "images/s/core")


def load_and_time(source, tar):
    """Do what our load task does, the copy in the object store too; returns images and CPU-seconds."""
    start = time.process_time()
    images, *_ = imagenet.load_tarfile(source, tar, 0, tuple(SIZE), "pixels")
    ray.put(images)
    return len(images), time.process_time() - start


def overhead(source, photos, repeats):
    """What a load task does per CPU-second, against a bare loop of our decoder over bytes in memory."""
    tars, _ = imagenet.list_tars(source, TRAIN)
    cv2.setNumThreads(1)  # as in a load task

    def in_tasks():
        timed = ray.get([tasks.start(load_and_time, source, tar) for tar in tars])
        return np.divide(*np.sum(timed, axis=0))

    def loop():
        start = time.process_time()
        for data in photos:
            decode_image(data, SIZE)
        return len(photos) / (time.process_time() - start)

    results = take_turns({"tasks": in_tasks, "loop": loop}, repeats)
    row("load tasks, against a loop over bytes in memory", *results.values(), "images/CPU-s")


def difference(images, others):
    """The mean absolute difference of images from others, in grey levels."""
    pairs = zip(images, others, strict=True)
    return np.mean([np.abs(image.astype(int) - other).mean() for image, other in pairs])


def timed(function, values):
    """What a function makes of each value, and the milliseconds of CPU time that one takes."""
    start = time.process_time()
    made = [function(value) for value in values]
    return made, 1e3 * (time.process_time() - start) / len(values)


def quality(photos):
    """How far images are from the write-up's, beside the goal; and what storing them as JPEGs costs."""
    images = [decode_image(photo, SIZE) for photo in photos]
    as_written = map(resize_as_written, photos)
    row("difference from Lanczos", [difference(images, as_written)], [2.5], "grey levels")
    print("JPEGs: quality, kB, mean difference in grey levels, CPU ms to encode, to decode")
    for quality in QUALITIES:
        jpegs, encode = timed(lambda x, q=quality: simplejpeg.encode_jpeg(x, q, "RGB", "420"), images)
        pixels, decode = timed(lambda x: simplejpeg.decode_jpeg(x, "RGB"), jpegs)
        size, lost = np.mean([*map(len, jpegs)]) / 1e3, difference(images, pixels)
        print(f"{quality:7} {size:6.1f} {lost:6.2f} {encode:6.2f} {decode:6.2f}", flush=True)


def peak_memory(source, tars):
    """MB that the task that loads a tar takes at its peak, above a worker that has done nothing."""
    with joining.join(driver.runtime_env(), None, num_cpus=1):
        tasks.limits.update(task=driver.TASK_TIMEOUT, wait=driver.WORKER_WAIT)
        start = 0
        while not start:  # the worker may end before it is looked at
            start = peak = private_memory(ray.get(tasks.start(os.getpid)))
        [tar] = imagenet.load_tarfiles_from_s3(source, tars, SIZE)
        while not ray.wait([tar.images], timeout=0.01, fetch_local=False)[0]:
            below = titled(os.getpid(), "ray::")
            peak = max([peak, *(private_memory(each.pid) for each in below)])
    return peak - start


def memory(s3, source, photos, repeats):
    """The peak memory of one task that loads a tar of ImageNet's size."""
    tar = make_tar({f"{i}.JPEG": photos[i % len(photos)] for i in range(BIG_TAR_IMAGES)})
    s3.put_object(Bucket=source.name, Key="big.tar", Body=tar)
    allowed = (BIG_TAR_IMAGES * np.prod([*SIZE, 3]) + len(tar)) / 1e6 + 100
    tars, _ = imagenet.list_tars(source, "big.tar")
    peaks = [peak_memory(source, tars) for _ in range(repeats)]
    row("peak of loading a tar, against array, tar and 100 MB", peaks, [allowed] * repeats, "MB")


def main():
    """Measure and print everything."""
    args = measuring.read_flags(__doc__, "folder", repeats=5)
    photos = measuring.read_photos(args.folder)
    with measuring.loopback() as s3:
        s3.create_bucket(Bucket="benchmark")
        source = imagenet.source_of("benchmark")
        for path in sorted(Path(args.folder, TRAIN).glob("*.tar")):
            copies = put_copies(s3, f"{TRAIN}{path.stem}-", path.read_bytes(), photos)
        print(f"{'':76} {'ours':>20} {'other':>20} {'unit':<13} ratio")
        # Ray ends processes that are idle for a second; here they stay, to be warm.
        warm = {"idle_worker_killing_time_threshold_ms": 3_600_000}
        with joining.join(driver.runtime_env(), None, num_cpus=CPUS, _system_config=warm):
            tasks.limits.update(task=driver.TASK_TIMEOUT, wait=driver.WORKER_WAIT)
            speeds(source, copies * len(photos), args.repeats)
            overhead(source, photos, args.repeats)
            resized(s3, source, photos, args.repeats)
        memory(s3, source, photos, args.repeats)
        quality(photos)


if __name__ == "__main__":
    main()
