"""What runs remotely: tasks on batches of images, the helper of a node, and the worker.

Everything random is drawn from a seed that is an argument: a task that runs again, to rebuild a lost
object, makes the same object.
"""

import hashlib
import math
import os
import platform
import re
import zlib
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import ray

from adding import sum_of_sets
from decoding import gathered, one_line
from imagenet import CROP_SIZE, PATIENCE, SEVERAL, report_loading
from s3 import InputError
from watching import Wait

# An actor holds its CPUs for life. A worker asks for two slices less than it uses, and a data task asks
# for one slice, so that data tasks always find room beside workers: to rebuild a lost block, too.
CPU_SLICE = 0.05

TASK_MEMORY = 10**9  # bytes of a data task: two batches of decoding.PART.images as pixels, and Python

VALIDATION_STEP = 50  # images of a validation request that go through the network at once

NO_LABEL = -1


# References to `count` images, uint8 [n, 256, 256, 3] or decoding.Jpegs of them, and to their labels
# int32 [n].
Batch = namedtuple("Batch", "images labels count")

# A data set that is being loaded, from the tars below a prefix and a label file in a bucket: an
# imagenet.Loaded for each tar, the reference of a LabelTable, fingerprints of all tars and labels.
DataSet = namedtuple("DataSet", "bucket prefix label_file loaded imagepairs source")

# Crops of images uint8 [n, 224, 224, 3], labels int32 [n], and where each crop lies in its image: int
# [n, 3] of (top, left, mirrored).
MiniBatch = namedtuple("MiniBatch", "pixels labels crops")


def generator(*key):
    """NumPy's generator for a key of integers and words, such as (seed, "crop", iteration, index)."""
    return np.random.default_rng([k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key])


def cpu_model():
    """The model of the CPU of the node that this runs on: on another one, the last bits may differ."""
    text, names = cpuinfo(), ("model name", "cpu family", "model")
    fields = [re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in names]
    return " / ".join(field[1] for field in fields if field) or platform.processor()


def multiplies_bfloat16():
    """Whether the CPU of the node that this runs on has instructions that multiply bfloat16."""
    words = cpuinfo().split()
    return "avx512_bf16" in words or "amx_bf16" in words


def is_fast_in_bfloat16():
    """Whether the CPU of the node that this runs on multiplies bfloat16 faster than float32.

    Intel's cores with AVX512_FP16 do so by AMX, which a hypervisor may hide: AVX512_BF16 did half as
    much a second as float32 on the one that was measured (benchmarks/README.md).
    """
    words = set(cpuinfo().split())
    made_for_amx = {"GenuineIntel", "avx512_fp16"} <= words
    return "amx_bf16" in words or ("avx512_bf16" in words and not made_for_amx)


def cpuinfo():
    """What Linux says of the CPUs of the node that this runs on; other systems say nothing."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def wait_for(refs, say, what):
    """Wait until all objects are there, and say every PATIENCE seconds how many are. Returns `refs`."""
    left, count, wait = refs, len(refs), Wait(say)
    while left:
        before = len(left)
        _, left = ray.wait(refs, num_returns=count, timeout=PATIENCE, fetch_local=False)
        if len(left) < before:
            wait.goes_on()
        if left:
            wait.is_long(f"{what}: {count - len(left)} of {count} tasks are done")
    return refs


# Where an actor is: its process, the model of its CPU, and whether that has instructions for bfloat16.
Place = namedtuple("Place", "pid cpu bfloat16")


def place():
    """The Place of the actor that calls this."""
    return Place(os.getpid(), cpu_model(), multiplies_bfloat16())


# ---- labels


class LabelTable:
    """A dict of name -> label as two sorted arrays, which tasks read in the object store, uncopied.

    A name is there as 96 bits of its hash. Two of ImageNet's 1.28 million names have the same ones with
    a probability of 1e-17.
    """

    def __init__(self, labels):
        """Take the dict of an imagenet.read_labels."""
        hashes, values = np.array([_hashed(name) for name in labels]), np.array([*labels.values()])
        order = np.argsort(hashes)
        self._hashes, self._labels = hashes[order], values[order]

    def get(self, name, default):
        """The label of a name, or a default where the table has none."""
        wanted = _hashed(name)
        place = np.searchsorted(self._hashes, wanted)
        found = place < len(self._hashes) and self._hashes[place] == wanted
        return self._labels[place] if found else default


def _hashed(name):
    return hashlib.blake2b(name.encode(), digest_size=12).hexdigest().encode()


def convert(filenames, imagepairs):
    """Labels int32 [n] of n file names, NO_LABEL where a LabelTable has none, and a small report.

    A file name is `directory/name`; the directory counts where the name alone has several labels. The
    report has `images` (labelled), `unlabelled` and `named` (the first few of those), and `doubtful`
    (the first few names whose directory has no label, while others have).
    """
    names = [filename.partition("/")[2] for filename in filenames]
    labels = np.array([imagepairs.get(name, NO_LABEL) for name in names], np.int32)
    for place in np.flatnonzero(labels == SEVERAL):
        labels[place] = imagepairs.get(filenames[place], SEVERAL)
    missing = [name for name, label in zip(names, labels, strict=True) if label == NO_LABEL]
    report = {
        "images": len(filenames) - len(missing),
        "unlabelled": len(missing),
        "named": [ascii(name[:100]) for name in missing[:5]],
        "doubtful": [filenames[place] for place in np.flatnonzero(labels == SEVERAL)[:5]],
    }
    return labels, report


def match(data, say, tasks):
    """Match each array of images with its array of labels: wait for a DataSet, return its batches.

    Images without a label are dropped, and batches without an image. InputError if nothing is left.
    `tasks` are the cluster's DataTasks, here and below.
    """
    loaded = report_loading(data.bucket, data.loaded, say)
    converted = [
        tasks.start(convert, part.filenames, data.imagepairs, num_returns=2) for part in loaded
    ]
    batches = []
    reports = ray.get(wait_for([report for _, report in converted], say, "Labels"))
    if doubtful := [name for report in reports for name in report["doubtful"]]:
        why = f"has no line for {one_line(doubtful[0])}, and several labels for that name elsewhere"
        raise InputError(f"s3://{data.bucket}/{one_line(data.label_file)}: {why}")
    for part, (labels, _), report in zip(loaded, converted, reports, strict=True):
        images = part.images
        if report["unlabelled"] and report["images"]:
            images, labels = tasks.start(drop_unlabelled, images, labels, num_returns=2)
        if report["images"]:
            batches.append(Batch(images, labels, report["images"]))
    missing = sum(report["unlabelled"] for report in reports)
    if missing:
        named = [name for report in reports for name in report["named"]][:5]
        say(f"{missing} images have no label and are left out: {', '.join(named)}")
    if not batches:
        place, labels = f"s3://{data.bucket}/{one_line(data.prefix)}*", one_line(data.label_file)
        raise InputError(f"{place}: no image is readable and has a label in {labels}: check both")
    say(f"{sum(batch.count for batch in batches)} images in {len(batches)} batches")
    return batches


def drop_unlabelled(images, labels):
    """The images and labels of a batch without the images that have no label."""
    labelled = np.flatnonzero(labels != NO_LABEL)
    return gathered([images], labelled), labels[labelled]


def one_hot(labels, num_classes):
    """Integer labels [n] as float32 [n, num_classes]: one 1 a row."""
    vectors = np.zeros((len(labels), num_classes), np.float32)
    vectors[np.arange(len(labels)), labels] = 1
    return vectors


# ---- shuffle and mean image


def shuffle(batches, rounds, seed, say, tasks):
    """Mix a list of batches in so many rounds, waiting for each.

    This replaces what the list holds: another reference to the batches would keep each of them twice.
    """
    if 2**rounds < len(batches):
        enough = math.ceil(math.log2(len(batches)))
        hint = f"SHUFFLE_ROUNDS = {enough} would mix all {len(batches)}"
        say(f"{rounds} shuffle rounds mix the images of {2**rounds} tars: {hint}")
    for number in range(rounds):
        batches[:] = shuffle_round(batches, seed, number, tasks)
        wait_for([batch.labels for batch in batches], say, f"Shuffle round {number + 1}")
        say(f"Shuffle round {number + 1} of {rounds} done")


def shuffle_round(batches, seed, number, tasks):
    """Permute the batches and mix them two by two, disjointly; an odd one out waits for the next round.

    Round 0 permutes at random. A later one deals the list into two, so that two batches that were just
    mixed with each other meet new ones, and after r rounds a batch has images of 2^r. The write-up
    permutes at random each time, where partners meet again, and pairs the permuted list with the
    original one, where a batch stands in two pairs: images are lost and doubled. Returns the new list,
    as long as before.
    """
    if number == 0:
        permuted = [batches[i] for i in generator(seed, "permute").permutation(len(batches))]
    else:
        permuted = batches[::2] + batches[1::2]
    mixed = permuted[len(permuted) // 2 * 2 :]
    for pair in range(len(permuted) // 2):
        a, b = permuted[2 * pair : 2 * pair + 2]
        arguments = a.images, a.labels, b.images, b.labels, (seed, "mix", number, pair)
        xa, ya, xb, yb = tasks.start(shuffle_pair, *arguments, num_returns=4)
        mixed += [Batch(xa, ya, a.count), Batch(xb, yb, b.count)]
    return mixed


def shuffle_pair(images_a, labels_a, images_b, labels_b, key):
    """Two batches, mixed: every image is in exactly one of them; their sizes stay."""
    n = len(labels_a)
    order = generator(*key).permutation(n + len(labels_b))
    labels, images = np.concatenate([labels_a, labels_b])[order], [images_a, images_b]
    return gathered(images, order[:n]), labels[:n], gathered(images, order[n:]), labels[n:]


def mean_image(batches, say, tasks):
    """The mean of all images, float32 [256, 256, 3] (paper, section 2)."""
    sums = [tasks.start(sum_images, batch.images) for batch in batches]
    while len(sums) > 1:  # integers: any order of additions gives the same sum
        pairs = [sums[i : i + 2] for i in range(0, len(sums), 2)]
        sums = [tasks.start(add, *pair) if len(pair) == 2 else pair[0] for pair in pairs]
    [total] = ray.get(wait_for(sums, say, "Mean image"))
    return (total / sum(batch.count for batch in batches)).astype(np.float32)


def sum_images(images):
    """The sum over a batch's images: int64 [256, 256, 3]."""
    total = np.zeros(images.shape[1:], np.int64)
    for image in images:
        total += image
    return total


def add(a, b):
    """The sum of two arrays."""
    return a + b


# ---- mini-batches


def random_batches(batches, keys):
    """One of the batches for each key, as likely as it is large: every image is equally likely."""
    sizes = np.array([batch.count for batch in batches])
    shares = sizes / sizes.sum()
    return [batches[generator(*key).choice(len(batches), p=shares)] for key in keys]


def centre_minibatch(images, labels, chosen):
    """A MiniBatch of the centre crops of chosen images [n] of a batch, for an accuracy."""
    top, left = (np.array(images.shape[1:3]) - CROP_SIZE) // 2
    return crop_images(images, labels, chosen, np.tile([top, left, 0], (len(chosen), 1)))


def crop_images(images, labels, chosen, crops):
    """A MiniBatch of chosen images [n] of a batch, and of their labels, with these crops int [n, 3]."""
    pixels = [crop_image(images[i], *crop) for i, crop in zip(chosen, crops, strict=True)]
    return MiniBatch(np.stack(pixels), labels[chosen], crops)


def crop_image(image, top, left, mirrored):
    """224x224 pixels of an image [256, 256, 3], a view unless they are mirrored."""
    image = image[top : top + CROP_SIZE, left : left + CROP_SIZE]
    return cv2.flip(image, 1) if mirrored else image


def subtract_mean(minibatch, mean):
    """Pixels of a MiniBatch minus the same crops of the mean image: float32 [n, 224, 224, 3]."""
    centred = aligned_empty(minibatch.pixels.shape)
    for out, image, crop in zip(centred, minibatch.pixels, minibatch.crops, strict=True):
        np.subtract(image, crop_image(mean, *crop), out=out)
    return centred


# ---- arrays


def aligned_empty(shape):
    """A float32 array that starts at a multiple of 64 bytes: TensorFlow copies what does not.

    This saves 17 ms of an iteration of 585 (bfloat16, `benchmarks/step.py` with and without it).
    """
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


# ---- actors


# The byte of memory matters: Ray may start an actor that asks for nothing on another node than told.
@ray.remote(num_cpus=0, memory=1, max_restarts=-1, max_task_retries=-1)
class Helper:
    """Does a node's small jobs of every iteration in one warm process; Ray ends idle tasks' processes.

    It keeps nothing between calls, so that Ray may restart it and repeat any call.
    """

    def draw_minibatch(self, images, labels, count, key):
        """A MiniBatch of `count` random images of a batch, cropped and mirrored at random."""
        rng, margins = generator(*key), np.array(images.shape[1:3]) - CROP_SIZE
        chosen = rng.integers(0, len(labels), count)
        crops = rng.integers(0, [*(margins + 1), 2], (count, 3))
        return crop_images(images, labels, chosen, crops)

    def draw_sample(self, images, labels, count, part, parts):
        """A part of at most `count` images that are spread evenly over a batch: a MiniBatch.

        `part` is its number, from 0 on, among so many `parts`.
        """
        chosen = np.linspace(0, len(labels) - 1, min(count, len(labels))).round().astype(int)
        return centre_minibatch(images, labels, chosen[part::parts])

    def draw_piece(self, images, labels, start, stop):
        """A MiniBatch of the images `start` to `stop` of a batch."""
        return centre_minibatch(images, labels, np.arange(start, stop))

    def pid(self):
        """The id of this process."""
        return os.getpid()

    def fetch(self, refs, *before):
        """Copy objects to this node. Ray calls this once the results of calls `before` are there."""
        ray.get(refs)

    def add_gradients(self, tree, indexes, *sets):
        """The sum of sets of gradients, which have indexes in a tree: see `sum_of_sets`."""
        return sum_of_sets(tree, dict(zip(indexes, sets, strict=True)))


@ray.remote
class Worker:
    """An actor: one network in its own session, in its own process, for as long as the run lasts.

    Every request carries the reference of the weights that it is about. A worker that was restarted has
    missed `update_weights`, and loads them first: it never computes on other weights.
    """

    def __init__(self, network):
        import alexnet  # here, so that data tasks and helpers start without TensorFlow

        self.network = alexnet.AlexNet(**network)
        self.iteration = None

    def place(self):
        """The Place that this worker has, once the network is built."""
        return place()

    def update_weights(self, iteration, weightrefs, passed_on=None):
        """Load an iteration's weights, unless they are loaded already.

        `weightrefs` is a list with their reference, since Ray fetches the object of a bare reference
        before each call, even if it is not needed. `passed_on` is a bare one: this call begins once
        the weights are on this node. TensorFlow reads them in the object store, without a copy.
        """
        if self.iteration != iteration:
            [weights] = ray.get(weightrefs)
            self.network.update_weights(weights)
            self.iteration = iteration

    def compute_grad(self, iteration, weightrefs, minibatch, mean, keep_probability, dropout_seed):
        """The 16 gradients of a MiniBatch's mean loss, and that loss: see `AlexNet.compute_grad`."""
        self.update_weights(iteration, weightrefs)
        images, y_true = self._inputs(minibatch, mean)
        return self.network.compute_grad(images, y_true, keep_probability, dropout_seed)

    def print_accuracy(self, iteration, weightrefs, minibatch, mean):
        """How many images of a MiniBatch are right, top-1, and how many there are: int [2].

        The driver prints the share of all workers' images.
        """
        self.update_weights(iteration, weightrefs)
        right, _ = self.network.count_hits(*self._inputs(minibatch, mean))
        return np.array([right, len(minibatch.labels)])

    def count_hits(self, iteration, weightrefs, minibatch, mean):
        """How many of a MiniBatch's images are right, top-1 and top-5: int [2]."""
        self.update_weights(iteration, weightrefs)
        hits = np.zeros(2, int)
        for first in range(0, len(minibatch.labels), VALIDATION_STEP):
            step = MiniBatch(*(part[first : first + VALIDATION_STEP] for part in minibatch))
            hits += self.network.count_hits(*self._inputs(step, mean))
        return hits

    def _inputs(self, minibatch, mean):
        return subtract_mean(minibatch, mean), one_hot(minibatch.labels, self.network.num_classes)
