"""Remote functions on batches, and the workers that compute gradients.

Everything random is drawn from a seed that is an argument: a task that runs again, to rebuild a lost
object, gives the same object.
"""

import itertools
import json
import math
import os
import time
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path

import cv2
import numpy as np
import ray
from ml_dtypes import bfloat16
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayTaskError,
)
from ray.experimental import get_object_locations
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imagenet import (
    IMAGE_SIZE,
    InputError,
    list_tars,
    load_tarfiles_from_s3,
    read_labels,
    report_loading,
)

# An actor holds its CPUs for life. It asks for a slice less than it uses, so that data tasks, which
# ask for a slice, always find room beside the workers, also to rebuild a lost block.
CPU_SLICE = 0.05
WORKER_SLICES = 2

CRASHES_IN_A_ROW = 3  # of one mini-batch, or of workers that start, before the run gives up

VALIDATION_PIECE = 200  # images of one validation request: small, so that all workers end together
VALIDATION_STEP = 50  # of them that go through the network at once

NO_LABEL = -1

BLOCK = 2**19  # floats that are computed on at once: a few such blocks stay in the cache

# References to images uint8 [n, 256, 256, 3] and labels int32 [n] in the object store; count is n.
Batch = namedtuple("Batch", "images labels count")


class WorkerError(Exception):
    """Workers that cannot start or do not stay up. The message is one line."""


def connect(**start_options):
    """Join the Ray cluster in RAY_ADDRESS or the one running here (True), or else start one (False).

    The runtime environment carries the project's modules to every node, and nothing else; none if this
    is a Ray job whose working directory brings them.
    """
    if ray.is_initialized():
        return True
    here = Path(__file__).resolve().parent
    modules = [str(here / f"{name}.py") for name in ("alexnet", "functions", "imagenet")]
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    brought = "working_dir" in job and here == Path.cwd()
    options = {"logging_level": "ERROR", "log_to_driver": False}
    options["runtime_env"] = {} if brought else {"py_modules": modules}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address != "local":  # Ray's word for a cluster of one's own
            ray.init("auto", **options)
            return True
    except ConnectionError as error:
        if address:
            hint = "check it, and that RAY_AUTH_MODE and the token are the cluster's"
            raise WorkerError(f"no Ray cluster answers at RAY_ADDRESS={address}: {hint}") from error
    ray.init("local", include_dashboard=False, **options, **start_options)
    return False


def generator(*key):
    """NumPy's generator for a key of integers and words, such as (seed, "crop", iteration, index)."""
    return np.random.default_rng([k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key])


def data_task_options():
    """Ray options of a data task: a slice of a CPU, and memory for at most two tasks a CPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = [n["memory"] / n["CPU"] / 2 for n in nodes if n.get("CPU") and n.get("memory")]
    return {"num_cpus": CPU_SLICE, "memory": int(min(shares, default=0))}


# ---- labels


@ray.remote(num_returns=2)
def convert(filenames, imagepairs):
    """Labels int32 [n] of n file names, NO_LABEL where the dict has none, and a small report.

    The report has `images` (labelled), `unlabelled` and `named` (the first few of those).
    """
    labels = np.array([imagepairs.get(name, NO_LABEL) for name in filenames], np.int32)
    missing = [name for name, label in zip(filenames, labels, strict=True) if label == NO_LABEL]
    report = {
        "images": len(filenames) - len(missing),
        "unlabelled": len(missing),
        "named": [ascii(name[:100]) for name in missing[:5]],
    }
    return labels, report


def match(bucket, loaded, converted, check, **options):
    """Wait for images and their labels, from what loads and converts them; a list of batches.

    Images without a label are dropped, and batches without an image; InputError, which says what to
    `check`, if nothing is left.
    """
    report_loading(bucket, [report for _, _, report in loaded])
    batches = []
    reports = ray.get([report for _, report in converted])
    for (images, _, _), (labels, _), report in zip(loaded, converted, reports, strict=True):
        if report["unlabelled"] and report["images"]:
            drop = drop_unlabelled.options(num_returns=2, **options)
            images, labels = drop.remote(images, labels)
        if report["images"]:
            batches.append(Batch(images, labels, report["images"]))
    missing = sum(report["unlabelled"] for report in reports)
    if missing:
        named = [name for report in reports for name in report["named"]][:5]
        print(f"{missing} images have no label and are left out: {', '.join(named)}")
    if not batches:
        raise InputError(f"s3://{bucket}: no image is readable and has a label: check {check}")
    print(f"{sum(batch.count for batch in batches)} images in {len(batches)} batches")
    return batches


@ray.remote
def drop_unlabelled(images, labels):
    """The batch without the images that have no label."""
    keep = labels != NO_LABEL
    return images[keep], labels[keep]


def one_hot(labels, num_classes):
    """Integer labels [n] as float32 [n, num_classes]: one 1 a row."""
    vectors = np.zeros((len(labels), num_classes), np.float32)
    vectors[np.arange(len(labels)), labels] = 1
    return vectors


def load_held_out(bucket, prefix, label_file, num_classes, **options):
    """Start to load the tars and labels of a held-out set; returns what `match` waits for."""
    tars, _ = list_tars(bucket, prefix)
    print(f"s3://{bucket}/{prefix}*: {len(tars)} held-out tars")
    pairs = ray.put(read_labels(bucket, label_file, num_classes))
    loaded = load_tarfiles_from_s3(bucket, tars, [256, 256], **options)
    return loaded, [convert.options(**options).remote(names, pairs) for _, names, _ in loaded]


# ---- shuffle and mean image


def shuffle_round(batches, seed, number, **options):
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
    mix = shuffle_pair.options(num_returns=4, **options)
    mixed = permuted[len(permuted) // 2 * 2 :]
    for pair in range(len(permuted) // 2):
        a, b = permuted[2 * pair : 2 * pair + 2]
        xa, ya, xb, yb = mix.remote(a.images, a.labels, b.images, b.labels, (seed, "mix", number, pair))
        mixed += [Batch(xa, ya, a.count), Batch(xb, yb, b.count)]
    return mixed


@ray.remote
def shuffle_pair(images_a, labels_a, images_b, labels_b, key):
    """Two batches, mixed: every image is in exactly one of them; their sizes stay."""
    n = len(labels_a)
    order = generator(*key).permutation(n + len(labels_b))
    labels = np.concatenate([labels_a, labels_b])[order]
    mixed = [np.empty_like(images_a), np.empty_like(images_b)]
    for place, source in enumerate(order):
        image = images_a[source] if source < n else images_b[source - n]
        mixed[place >= n][place - n if place >= n else place] = image
    return mixed[0], labels[:n], mixed[1], labels[n:]


def mean_image(batches, **options):
    """A reference to the mean of all images, float32 [256, 256, 3] (paper, section 2)."""
    sums = [sum_images.options(**options).remote(batch.images) for batch in batches]
    while len(sums) > 1:  # integers: any order of additions gives the same sum
        pairs = [sums[i : i + 2] for i in range(0, len(sums), 2)]
        sums = [add.options(**options).remote(*p) if len(p) == 2 else p[0] for p in pairs]
    return divide.options(**options).remote(sums[0], sum(batch.count for batch in batches))


@ray.remote
def sum_images(images):
    """The sum over a batch's images: int64 [256, 256, 3]."""
    return images.sum(axis=0, dtype=np.int64)


@ray.remote
def add(a, b):
    """The sum of two arrays."""
    return a + b


@ray.remote
def divide(total, count):
    """The mean of `count` things, float32, from their sum."""
    return (total / count).astype(np.float32)


# ---- beside the workers, on every node


@ray.remote(num_cpus=CPU_SLICE, max_restarts=-1, max_task_retries=-1)
class Helper:
    """Does a node's small jobs of every iteration in one warm process; Ray ends idle tasks' processes.

    It keeps nothing between calls, so that Ray may restart it and repeat any call.
    """

    def draw_minibatch(self, images, labels, count, key=None):
        """Draw `count` images of a batch, cropped to 224x224.

        With a key for `generator`: random images, crops and mirrors, for training. Without: the centre
        crops of images spread evenly over the batch, for an accuracy. Returns crops uint8
        [count, 224, 224, 3], labels [count], crops [count, 3] of (top, left, mirrored).
        """
        margins = np.array(images.shape[1:3]) - IMAGE_SIZE
        if key is None:
            chosen = np.linspace(0, len(labels) - 1, min(count, len(labels))).round().astype(int)
            crops = centre_crops(images, len(chosen))
        else:
            rng = generator(*key)
            chosen = rng.integers(0, len(labels), count)
            crops = rng.integers(0, [*(margins + 1), 2], (count, 3))
        pixels = [crop_image(images[i], crop) for i, crop in zip(chosen, crops, strict=True)]
        return np.stack(pixels), labels[chosen], crops

    def fetch(self, refs, *before):
        """Copy objects to this node, once the calls `before` are done."""
        ray.get(refs)

    def add_gradients(self, a, b):
        """The sums of two lists of arrays, variable by variable, in float32."""
        return [as_float32(x) + as_float32(y) for x, y in zip(a, b, strict=True)]


class Helpers:
    """One Helper on each node that needs one, so that large objects are used where they lie."""

    def __init__(self):
        self.here = ray.get_runtime_context().get_node_id()
        self._on = {}  # node id -> Helper

    def at(self, refs):
        """For each object, the helper on a node that holds it, or on this one if that is not known."""
        places = get_object_locations(refs)
        return [self.on((*places[ref]["node_ids"], self.here)[0]) for ref in refs]

    def on(self, node):
        """The helper on a node."""
        if node not in self._on:
            there = NodeAffinitySchedulingStrategy(node, soft=True)
            self._on[node] = Helper.options(scheduling_strategy=there).remote()
        return self._on[node]

    def draw_minibatches(self, batches, size, count, seed, iteration):
        """References to an iteration's `count` mini-batches, each `size` images of a random batch."""
        chosen = [random_batch(batches, seed, "batch", iteration, index) for index in range(count)]
        helpers = self.at([batch.images for batch in chosen])
        return [
            helper.draw_minibatch.remote(
                batch.images, batch.labels, size, (seed, "crop", iteration, index)
            )
            for index, (helper, batch) in enumerate(zip(helpers, chosen, strict=True))
        ]

    def draw_sample(self, batches, size, seed, iteration):
        """A reference to at most `size` images of a random batch, for an accuracy."""
        batch = random_batch(batches, seed, "accuracy", iteration)
        (helper,) = self.at([batch.images])
        return helper.draw_minibatch.remote(batch.images, batch.labels, size)

    def pass_on(self, ref, nodes):
        """Copy an object from here to other nodes, in rounds: in each, as many as have it by then.

        Ray copies from any node that has it, so that about one copy a round leaves this node, not one
        a node. Returns a dict: node -> reference that resolves once it is there; None for this node.
        """
        there, before = {self.here: None}, []
        rest = [node for node in nodes if node != self.here]
        while rest:
            now, rest = rest[: len(there)], rest[len(there) :]
            before = [self.on(node).fetch.remote([ref], *before) for node in now]
            there |= zip(now, before, strict=True)
        return there

    def add_gradients(self, gradients, nodes):
        """Sets of gradients, added up to two or one, as values; from references and where they lie.

        Sets are added two by two in the order of the list, a fixed tree: the same floats wherever they
        lie. Each sum is formed where its second part lies, and one set at most comes from elsewhere to
        this node, if the sets of this node come first.
        """
        sets = list(zip(gradients, nodes, strict=True))
        while len(sets) > 2 or (len(sets) == 2 and self.here not in (sets[0][1], sets[1][1])):
            pairs = [sets[i : i + 2] for i in range(0, len(sets), 2)]
            sets = [self._add(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return ray.get([gradients for gradients, _ in sets])

    def _add(self, first, second):
        (a, _), (b, node) = first, second
        return self.on(node).add_gradients.remote(a, b), node


def mean_of(sets, count, weights, decay, means):
    """Write the mean of `count` gradients plus weight decay into arrays; its norm, a float.

    The norm is not finite if any value is not. `sets` are the gradients' sum, or two parts of it, which
    gives the same bits. All are lists of arrays, one a variable: `means` float32, the others too or
    bfloat16's bits. The kernels, which have more than one dimension, decay: by what the workers had as
    weights. Goes through memory once, block by block.
    """
    rows = [[array.reshape(1, -1) for array in arrays] for arrays in (means, weights, *sets)]
    decays = [decay if weight.ndim > 1 else 0 for weight in weights]

    def one_block(variable, start):
        block = slice(start, start + BLOCK)  # of rows: OpenCV takes four values alone for a colour
        mean, weight, *parts = (as_float32(arrays[variable][:, block]) for arrays in rows)
        total = reduce(partial(np.add, out=mean), parts)
        cv2.addWeighted(total, 1 / count, weight, decays[variable], 0, dst=mean)
        return cv2.norm(mean, cv2.NORM_L2SQR)

    places = [(i, start) for i, mean in enumerate(rows[0]) for start in range(0, mean.size, BLOCK)]
    cpus = os.cpu_count()
    shares = [places[len(places) * i // cpus : len(places) * (i + 1) // cpus] for i in range(cpus)]
    with ThreadPoolExecutor(cpus) as threads:
        squares = threads.map(lambda share: [one_block(*place) for place in share], shares)
        return math.sqrt(sum(itertools.chain(*squares)))  # in the order of the blocks


def aligned_empty(shape):
    """A float32 array that starts at a multiple of 64 bytes: TensorFlow copies what it is fed else."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def all_finite(arrays):
    """Whether no array holds a NaN or an infinity."""
    return all(np.isfinite(as_float32(array)).all() for array in arrays)


def as_float32(array):
    """A float32 array itself; one of bfloat16's bits, uint16, exactly as float32."""
    return array.view(bfloat16).astype(np.float32) if array.dtype == np.uint16 else array


def random_batch(batches, *key):
    """One of the batches, as likely as it is large, so that every image is equally likely."""
    sizes = np.array([batch.count for batch in batches])
    return batches[generator(*key).choice(len(batches), p=sizes / sizes.sum())]


def crop_image(image, crop):
    """224x224 pixels of an image [256, 256, 3], which `crop`, (top, left, mirrored), chooses."""
    top, left, mirrored = crop
    image = image[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    return cv2.flip(image, 1) if mirrored else image


def centre_crops(images, count):
    """The crop at the centre of images [n, height, width, 3], `count` times: int [count, 3]."""
    _, height, width, _ = images.shape
    return np.tile([(height - IMAGE_SIZE) // 2, (width - IMAGE_SIZE) // 2, 0], (count, 1))


def subtract_mean(pixels, crops, mean):
    """Crops minus the same crops of the mean image: float32 [n, 224, 224, 3]."""
    centred = aligned_empty(pixels.shape)
    for out, image, crop in zip(centred, pixels, crops, strict=True):
        np.subtract(image, crop_image(mean, crop), out=out)
    return centred


# ---- workers


@ray.remote
class Worker:
    """An actor: one network in its own session, in its own process, for as long as the run lasts.

    Every request carries the reference of the weights that it is about, so a worker that was restarted,
    and missed `update_weights`, loads them first: it never computes on other weights.
    """

    def __init__(self, network):
        import alexnet  # here, so that data tasks start without TensorFlow

        alexnet.keep_memory()
        self.network = alexnet.AlexNet(**network)
        self.num_classes = network["num_classes"]
        self.iteration = None

    def node(self):
        """The id of the node, once the network is built."""
        return ray.get_runtime_context().get_node_id()

    def update_weights(self, iteration, weightrefs, there=None):
        """Load an iteration's weights, if it has not: TensorFlow uses the object store's in place.

        `weightrefs` is a list that holds their reference: Ray fetches a bare one before it calls.
        `there` is what it waits for instead, until they have been passed on to this node.
        """
        if self.iteration != iteration:
            [weights] = ray.get(weightrefs)
            self.network.update_weights(weights)
            self.iteration = iteration

    def compute_grad(self, iteration, weightrefs, minibatch, mean, keep, dropout_seed):
        """The 16 gradients of a mini-batch's mean loss, and that loss: see `AlexNet.compute_grad`."""
        self.update_weights(iteration, weightrefs)
        pixels, labels, crops = minibatch
        images = subtract_mean(pixels, crops, mean)
        y_true = one_hot(labels, self.num_classes)
        return self.network.compute_grad(images, y_true, keep, dropout_seed)

    def print_accuracy(self, iteration, weightrefs, minibatch, mean):
        """The share of a mini-batch's images whose top-1 class is right."""
        self.update_weights(iteration, weightrefs)
        pixels, labels, crops = minibatch
        images = subtract_mean(pixels, crops, mean)
        return self.network.compute_accuracy(images, one_hot(labels, self.num_classes))

    def count_hits(self, iteration, weightrefs, images, labels, start, stop, mean):
        """How many of a batch's images `start` to `stop` are right, top-1 and top-5: int [2]."""
        self.update_weights(iteration, weightrefs)
        hits = np.zeros(2, int)
        for first in range(start, stop, VALIDATION_STEP):
            chosen = np.arange(first, min(first + VALIDATION_STEP, stop))
            crops = centre_crops(images, len(chosen))
            pixels = [crop_image(images[i], crop) for i, crop in zip(chosen, crops, strict=True)]
            y_true = one_hot(labels[chosen], self.num_classes)
            hits += self.network.count_hits(subtract_mean(np.stack(pixels), crops, mean), y_true)
        return hits


class Workers:
    """The workers of a run: starts them, shares out an iteration's requests, replaces the lost.

    An iteration is a fixed list of requests, each complete in itself. Any worker can take any of them,
    so which worker does, and how many there are, never changes a result.
    """

    def __init__(self, count, share, network, helpers, timeout, cluster_can_grow=False, report=print):
        """Start `count` workers, return at once; WorkerError if the cluster neither has room nor grows.

        `share` has the `cpus` and `gpus` of a worker, `network` AlexNet's arguments; `helpers` add the
        gradients; `timeout` bounds the seconds of one request; `report` prints a line.
        """
        self.count, self._share, self._network, self._helpers = count, share, network, helpers
        self._timeout, self._report = timeout, report
        self._weights = None  # iteration, a list with the reference of its weights
        self._aside = []  # requests to run beside the next gradients
        self.accuracy = None  # the newest that print_accuracy has measured
        self._requests, self._results = [], []  # those of this iteration's gradients
        self._up = {}  # number -> worker that is up
        self._nodes = {}  # number -> the node it is, or was, on
        self._means = []  # arrays of the mean gradients
        self._starting = {}  # reference that resolves once it is up -> number, worker
        self._failed_starts = 0
        if (lack := self._lack()) and not cluster_can_grow:
            raise WorkerError(f"{lack}: lower NUM_WORKERS or add nodes")
        for number in range(count):
            self._start(number)

    def __del__(self):
        """Leave no worker on a shared cluster; Ray alone lets one that still starts live on."""
        if ray.is_initialized():
            for worker in [*self._up.values(), *(worker for _, worker in self._starting.values())]:
                ray.kill(worker)

    def _lack(self):
        """What to say where the cluster has not room for all workers; nothing where it has."""
        room = room_for_workers(**self._share)
        each = "{cpus} CPUs and {gpus} GPUs".format(**self._share)
        asked = f"{self.count} workers of {each} each were asked for"
        return f"{asked}, the cluster has room for {room}" if room < self.count else ""

    def _start(self, number):
        worker = Worker.options(
            num_cpus=self._share["cpus"] - WORKER_SLICES * CPU_SLICE,
            num_gpus=self._share["gpus"],
            scheduling_strategy="SPREAD",
        ).remote(self._network)
        self._starting[worker.node.remote()] = number, worker

    def _admit(self, timeout):
        """Take in the workers that have started, or do so within `timeout` seconds."""
        if not self._starting:
            return
        for ref in ray.wait(list(self._starting), timeout=timeout)[0]:
            number, worker = self._starting.pop(ref)
            try:
                self._nodes[number] = ray.get(ref)
            except RayActorError as error:
                self._failed_starts += 1
                if self._failed_starts == CRASHES_IN_A_ROW:
                    raise WorkerError(f"workers do not start: {first_line(error)}") from error
                self._start(number)
            else:
                self._failed_starts = 0
                self._up[number] = worker
                if self._weights:
                    self._report(f"worker {number} is back: {len(self._up)} of {self.count} are up")

    def wait(self, seconds):
        """Wait until all workers are up, at most `seconds`; WorkerError if they are not by then."""
        deadline, announced = time.monotonic() + seconds, False
        while self._starting:
            self._admit(timeout=1)
            lack = self._lack()
            if self._starting and time.monotonic() > deadline:
                up = f"only {len(self._up)} of {self.count} workers are up after {seconds} s"
                raise WorkerError(f"{lack or up}: lower NUM_WORKERS or add nodes")
            if lack and not announced:
                self._report(f"{lack}: waiting up to {seconds} s for more nodes")
                announced = True

    def update_weights(self, iteration, weightref):
        """Tell every worker to load an iteration's weights, which the next requests are about."""
        self._admit(timeout=0)
        self._weights = iteration, [weightref]
        there = self._helpers.pass_on(weightref, sorted({self._nodes[number] for number in self._up}))
        for number, worker in self._up.items():
            worker.update_weights.remote(*self._weights, there[self._nodes[number]])

    def print_accuracy(self, minibatch, mean):
        """Have one worker measure the accuracy of the weights just loaded, beside the next gradients.

        Once those are computed, it is printed, and `accuracy` holds it.
        """
        self._aside = [("print_accuracy", 1, (minibatch, mean))]

    def validate(self, batches, mean):
        """Top-1 and top-5 accuracy on all images of some batches, with the weights just loaded.

        The hits are counted, so that the result is exact, however the images are split.
        """
        pieces = [
            (batch, start, min(start + VALIDATION_PIECE, batch.count))
            for batch in batches
            for start in range(0, batch.count, VALIDATION_PIECE)
        ]
        results = self._run(
            [
                ("count_hits", 1, (batch.images, batch.labels, start, stop, mean))
                for batch, start, stop in pieces
            ]
        )
        return sum(hits for hits, *_ in results) / sum(batch.count for batch in batches)

    def compute_grad(self, minibatches, mean, keep, seed):
        """The losses of all mini-batches, all finite; their gradients stay where they were computed."""
        iteration, _ = self._weights
        requests = [
            ("compute_grad", 2, (minibatch, mean, keep, dropout_seed(seed, iteration, index)))
            for index, minibatch in enumerate(minibatches)
        ]
        results = self._run(self._aside + requests)
        for accuracy, *_ in results[: len(self._aside)]:
            self._report(f"Iteration {iteration}: accuracy = {accuracy:.1%}")
            self.accuracy = accuracy
        self._requests, self._results, self._aside = requests, results[len(self._aside) :], []
        losses = [loss for loss, *_ in self._results]
        self._check(np.isfinite(losses), "loss")
        return losses

    def mean_gradients(self, weight_decay):
        """The mean of the gradients just computed, plus weight decay, and its norm.

        The mean is a list of 16 float32 arrays, finite; the next call uses them again. Gradients that a
        node took along when it died are computed again.
        """
        iteration, weightrefs = self._weights
        for _ in range(CRASHES_IN_A_ROW):
            try:
                gradients = [refs[0] for *_, refs in self._results]
                nodes = [self._nodes[number] for _, number, _ in self._results]
                sets = self._helpers.add_gradients(gradients, nodes)
                [weights] = ray.get(weightrefs)
                self._means = self._means or [aligned_empty(weight.shape) for weight in weights]
                norm = mean_of(sets, len(gradients), weights, weight_decay, self._means)
                if not math.isfinite(norm):
                    self._check([all_finite(ray.get(ref)) for ref in gradients], "gradient")
                    raise WorkerError(f"iteration {iteration}: the gradients' sum is not finite")
                self._results = []  # their references would keep the gradients in the object store
                return self._means, norm
            except (ObjectLostError, RayActorError, RayTaskError) as error:
                lost = getattr(error, "cause", error)
                if not isinstance(lost, ObjectLostError | RayActorError):
                    raise
                self._report(f"gradients are lost ({first_line(lost)}): they are computed again")
                self._results = self._run(self._requests)
        raise WorkerError(f"gradients were lost {CRASHES_IN_A_ROW} times in a row: {first_line(lost)}")

    def _check(self, finite, what):
        """WorkerError if one of this iteration's mini-batches has given something not finite."""
        for index, (_, number, _) in enumerate(self._results):
            if not finite[index]:
                raise WorkerError(
                    f"iteration {self._weights[0]}: the {what} of mini-batch {index} is not finite, "
                    f"on worker {number}: lower LEARNING_RATE"
                )

    def _run(self, requests):
        """Share out requests, each to the first free worker; their results in order.

        A request is (method, number of returns, arguments). A result is (the method's last return
        value, the worker's number, references of the values before). A request whose worker dies or
        hangs goes to another one.
        """
        iteration, weightrefs = self._weights
        waiting = deque(range(len(requests)))
        crashes = [0] * len(requests)
        results = [None] * len(requests)
        running = {}  # reference of a request's last return -> its number, worker number, deadline
        rest = {}  # number of a request -> references of its returns before the last
        while waiting or running:
            self._admit(timeout=0 if self._up else self._timeout)
            if not self._up:
                raise WorkerError(f"iteration {iteration}: no worker left, and none could start")
            busy = {number for _, number, _ in running.values()}
            for number in [n for n in self._by_node() if n not in busy][: len(waiting)]:
                request = waiting.popleft()
                method, returns, arguments = requests[request]
                call = getattr(self._up[number], method).options(num_returns=returns)
                refs = call.remote(iteration, weightrefs, *arguments)
                *rest[request], last = refs if returns > 1 else [refs]
                running[last] = request, number, time.monotonic() + self._timeout
            next_deadline = min(deadline for *_, deadline in running.values())
            done, _ = ray.wait(list(running), timeout=max(0, next_deadline - time.monotonic()))
            late = [ref for ref in running if ref not in done and running[ref][2] < time.monotonic()]
            for ref in done + late:
                request, number, _ = running.pop(ref)
                try:
                    results[request] = ray.get(ref, timeout=0), number, rest[request]
                except (RayActorError, GetTimeoutError) as error:
                    crashes[request] += 1
                    why = f"no answer in {self._timeout} s" if ref in late else first_line(error)
                    if crashes[request] == CRASHES_IN_A_ROW:
                        name = f"iteration {iteration}, {requests[request][0]} {request}"
                        raise WorkerError(
                            f"{name}: {CRASHES_IN_A_ROW} workers failed: {why}"
                        ) from error
                    waiting.appendleft(request)
                    self._replace(number, why)
        return results

    def _by_node(self):
        """Numbers of the workers that are up, those of this node first, then node by node."""
        nodes = self._nodes
        return sorted(self._up, key=lambda n: (nodes[n] != self._helpers.here, nodes[n], n))

    def _replace(self, number, why):
        worker = self._up.pop(number)
        ray.kill(worker)
        self._report(f"worker {number} is lost ({why}): {len(self._up)} of {self.count} go on")
        self._start(number)


class Stopwatch:
    """Seconds of the phases of an iteration, a dict."""

    def __init__(self):
        """Start the first phase."""
        self.seconds, self._since = {}, time.perf_counter()

    def lap(self, phase):
        """End a phase, which begins the next one."""
        now = time.perf_counter()
        self.seconds[f"seconds/{phase}"], self._since = now - self._since, now


def dropout_seed(seed, iteration, index):
    """Two integers that decide the dropout masks of a mini-batch."""
    return generator(seed, "dropout", iteration, index).integers(2**31, size=2).tolist()


def room_for_workers(cpus, gpus):
    """How many workers of so many CPUs and GPUs the nodes of the cluster hold together."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    by_cpu = [int(node.get("CPU", 0) // cpus) for node in nodes]
    by_gpu = [
        int(node.get("GPU", 0) // gpus) if gpus else n for node, n in zip(nodes, by_cpu, strict=True)
    ]
    return sum(map(min, by_cpu, by_gpu))


def fastest_precision(gpus):
    """The precision in which the cluster's workers are fastest, "bfloat16" or "float32".

    bfloat16 where every node's CPU multiplies in it; on GPUs, float32.
    """
    if gpus:
        return "float32"
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    ask = [
        multiplies_bfloat16.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True))
        for node in others
    ]
    answers = [multiplies_bfloat16._function(), *ray.get([question.remote() for question in ask])]
    return "bfloat16" if all(answers) else "float32"


@ray.remote(num_cpus=0)
def multiplies_bfloat16():
    """Whether this node's CPU has instructions that multiply bfloat16."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else ()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def announce_memory(images):
    """Say what the decoded images take of memory, and of disk if the object stores are too small."""
    store = ray.cluster_resources().get("object_store_memory", 0)
    pixels = images * 256 * 256 * 3
    text = f"About {images} images: {pixels / 1e9:.1f} GB decoded"
    text += f", the object stores hold {store / 1e9:.1f} GB"
    if pixels > store:
        text += f": {(pixels - store) / 1e9:.1f} GB goes to disk (Ray spills it), and is slower"
    print(text)


def explain(error):
    """The one line that a user needs of an error: its own, or that of the remote cause."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, OutOfDiskError | ObjectStoreFullError):
        return (
            "a node's object store and disk are full: free the disk that Ray spills to, "
            "add nodes, or train on fewer tars (--key-prefix)"
        )
    if isinstance(cause, InputError | WorkerError):
        return str(cause)
    raise error


def first_line(error):
    """The first line of an error's message that says something."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
