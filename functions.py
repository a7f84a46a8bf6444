"""What runs remotely, and what asks for it: labels, shuffle, mean image, mini-batches, the workers.

Everything random is drawn from a seed that is an argument: a task that runs again makes the same data.
"""

import contextlib
import hashlib
import operator
import re
import zlib
from collections import Counter, namedtuple

import imagenet
from machinery.cluster import tasks
from machinery.cluster.adding import aligned_empty, sum_of_sets
from machinery.cluster.helpers import Drawn
from machinery.cluster.nodes import ACTOR, Actor
from machinery.cluster.pool import Request
from machinery.errors import InputError, one_line, say
from machinery.storage.images import CROP_SIZE, IMAGE_SIZE, gathered

import cv2
import numpy as np
import ray

MARGIN = IMAGE_SIZE - CROP_SIZE  # pixels that a crop leaves out of an image, in each direction
VALIDATION_PIECE = 50  # images of one validation request, which go through the network at once
NO_LABEL = -1
MANY_UNLABELLED = 0.05  # share of images; more are hardly left out on purpose
SUFFIX = re.compile(r"\.(jpe?g|png|gif|bmp|webp)$", re.IGNORECASE)  # of an image's name

# References to `count` images, uint8 [n, 256, 256, 3] or Jpegs of them, and to labels int32 [n].
Batch = namedtuple("Batch", "images labels count")

# An imagenet.DataSet that is being loaded: an imagenet.Loaded for each tar, the reference of a
# `label_table`, fingerprints of all tars and labels.
Loading = namedtuple("Loading", "data loaded imagepairs fingerprints")

# Crops uint8 [n, 224, 224, 3], labels int32 [n], and int [n, 3] of each crop's (top, left, mirrored).
MiniBatch = namedtuple("MiniBatch", "pixels labels crops")


def generator(*key):
    """NumPy's generator for a key of integers and words, such as (seed, "crop", iteration, index)."""
    return np.random.default_rng([k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key])


# ---- labels


def label_table(labels):
    """The dict of `imagenet.read_labels` as sorted hashes of its names and their labels, two arrays.

    Tasks read arrays in the object store, uncopied. A hash has 96 bits: two of 1.28 million names have
    the same one with a probability of 1e-17. A suffix counts only if names differ by it alone.
    """
    stems = [SUFFIX.sub("", name) for name in labels]
    times = Counter(stems)
    names = [s if times[s] == 1 else name for s, name in zip(stems, labels, strict=True)]
    hashes, values = np.array([_hashed(name) for name in names]), np.array([*labels.values()])
    order = np.argsort(hashes)
    return hashes[order], values[order]


def label_of(name, imagepairs, default):
    """The label of a name, or a default where the table has none."""
    hashes, labels = imagepairs
    for wanted in (_hashed(name), _hashed(SUFFIX.sub("", name))):
        place = np.searchsorted(hashes, wanted)
        if place < len(hashes) and hashes[place] == wanted:
            return labels[place]
    return default


def _hashed(name):
    return hashlib.blake2b(name.encode(), digest_size=12).hexdigest().encode()


def convert(filenames, imagepairs):
    """Labels int32 [n] of n file names, NO_LABEL where a `label_table` has none, and a small report.

    A file name is `directory/name`; the directory counts where the name alone has several labels. The
    report has `images` (labelled), `unlabelled` and `named` (the first few of those), and `doubtful`
    (the first few names whose directory has no label, while others have).
    """
    names = [filename.partition("/")[2] for filename in filenames]
    labels = np.array([label_of(name, imagepairs, NO_LABEL) for name in names], np.int32)
    for number in np.flatnonzero(labels == imagenet.SEVERAL):
        labels[number] = label_of(filenames[number], imagepairs, imagenet.SEVERAL)
    missing = [name for name, label in zip(names, labels, strict=True) if label == NO_LABEL]
    report = {
        "images": len(filenames) - len(missing),
        "unlabelled": len(missing),
        "named": [ascii(name[:100]) for name in missing[:5]],
        "doubtful": [filenames[number] for number in np.flatnonzero(labels == imagenet.SEVERAL)[:5]],
    }
    return labels, report


def match(loading):
    """Match each array of images with its array of labels: wait for a Loading, return its batches.

    Images without a label are dropped; InputError if none is left. `loading.loaded` is emptied here, or
    it would keep every batch twice.
    """
    data, table, batches = loading.data, loading.imagepairs, []
    if not data.tars:
        return batches
    loaded = imagenet.report_loading(data, loading.loaded)
    loading.loaded.clear()
    converted = [tasks.start(convert, part.filenames, table, num_returns=2) for part in loaded]
    reports = ray.get(tasks.wait_for([report for _, report in converted], "Labels"))
    if doubtful := [name for report in reports for name in report["doubtful"]]:
        why = f"has no line for {one_line(doubtful[0])}, and several labels for that name elsewhere"
        raise InputError(f"{data.source}/{one_line(data.label_file)}: {why}")
    for part, (labels, _), report in zip(loaded, converted, reports, strict=True):
        images = part.images
        if report["unlabelled"] and report["images"]:
            images, labels = tasks.start(drop_unlabelled, images, labels, num_returns=2)
        if report["images"]:
            batches.append(Batch(images, labels, report["images"]))
    if missing := sum(report["unlabelled"] for report in reports):
        named = [name for report in reports for name in report["named"]][:5]
        share = missing / sum(report["unlabelled"] + report["images"] for report in reports)
        if share > MANY_UNLABELLED:
            hint = f"is {data.source}/{one_line(data.label_file)} the label file of all these tars?"
            say(f"WARNING: {share:.0%} of the images have no label: {hint}")
        say(f"{missing} images have no label and are left out: {', '.join(named)}")
    if not batches:
        where, labels = f"{data.source}/{one_line(data.prefix)}*", one_line(data.label_file)
        raise InputError(f"{where}: no image is readable and has a label in {labels}: check both")
    say(f"{sum(batch.count for batch in batches)} images in {len(batches)} batches")
    return batches


def drop_unlabelled(images, labels):
    """The images and labels of a batch without the images that have no label."""
    labelled = np.flatnonzero(labels != NO_LABEL)
    return gathered([images], labelled), labels[labelled]


def one_hot(labels, num_classes):
    """Integer labels [n] as float32 [n, num_classes]: one 1 a row."""
    return (labels[:, None] == np.arange(num_classes)).astype(np.float32)


# ---- shuffle and mean image


def shuffle(batches, rounds, seed):
    """Mix a list of batches in place: another reference to them would keep each of them twice."""
    enough = (len(batches) - 1).bit_length()  # from here on, 2^rounds are all of them
    if rounds < enough:
        hint = f"SHUFFLE_ROUNDS = {enough} would mix all {len(batches)}"
        say(f"{rounds} shuffle rounds mix the images of {2**rounds} tars: {hint}")
    for number in range(rounds):
        batches[:] = shuffle_round(batches, seed, number)
        tasks.wait_for([batch.labels for batch in batches], f"Shuffle round {number + 1}")
        say(f"Shuffle round {number + 1} of {rounds} done")


def shuffle_round(batches, seed, number):
    """The batches, permuted and mixed two by two; an odd one out waits for the next round.

    Round 0 permutes at random. A later one deals the list into two, so that two batches that were just
    mixed with each other meet new ones, and after r rounds a batch has images of 2^r.
    """
    if number == 0:
        permuted = [batches[i] for i in generator(seed, "permute").permutation(len(batches))]
    else:
        permuted = batches[::2] + batches[1::2]
    mixed = permuted[len(permuted) // 2 * 2 :]
    for pair, (a, b) in enumerate(zip(permuted[::2], permuted[1::2], strict=False)):
        refs, key = (a.images, a.labels, b.images, b.labels), (seed, "mix", number, pair)
        xa, ya, xb, yb = tasks.start(shuffle_pair, *refs, key, num_returns=4)
        mixed += [Batch(xa, ya, a.count), Batch(xb, yb, b.count)]
    return mixed


def shuffle_pair(images_a, labels_a, images_b, labels_b, key):
    """Two batches, mixed: every image is in exactly one of them; their sizes stay."""
    n = len(labels_a)
    order = generator(*key).permutation(n + len(labels_b))
    labels, images = np.concatenate([labels_a, labels_b])[order], [images_a, images_b]
    return gathered(images, order[:n]), labels[:n], gathered(images, order[n:]), labels[n:]


def mean_image(batches):
    """The mean of all images, float32 [256, 256, 3] (paper, section 2)."""
    sums = [tasks.start(sum_images, batch.images) for batch in batches]
    while len(sums) > 1:  # integers: any order of additions gives the same sum
        sums = [*sums[2:], tasks.start(operator.add, *sums[:2])]
    [total] = ray.get(tasks.wait_for(sums, "Mean image"))
    return (total / sum(batch.count for batch in batches)).astype(np.float32)


def sum_images(images):
    """The sum over a batch's images: int64 [256, 256, 3]."""
    total = np.zeros(images.shape[1:], np.int64)
    for image in images:
        total += image
    return total


# ---- mini-batches, and what the driver asks workers for


def random_batches(batches, keys):
    """One of the batches for each key, as likely as it is large: every image is equally likely."""
    sizes = np.array([batch.count for batch in batches])
    shares = sizes / sizes.sum()
    return [batches[generator(*key).choice(len(batches), p=shares)] for key in keys]


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


def draw_minibatches(helpers, batches, count, seed, size, iteration):
    """An iteration's Drawn mini-batches: random crops of random images (paper, section 4.1)."""
    chosen = random_batches(batches, [(seed, "batch", iteration, i) for i in range(count)])
    drawn = []
    for index, (batch, helper) in enumerate(zip(chosen, helpers.holding(chosen), strict=True)):
        rng = generator(seed, "crop", iteration, index)
        images = rng.integers(0, batch.count, size)
        crops = rng.integers(0, [MARGIN + 1, MARGIN + 1, 2], (size, 3))
        drawn.append(Drawn(helpers, batch, images, crops))
        drawn[-1].ref(helper)  # now, ahead of time
    return drawn


def draw_centres(helpers, batch, chosen):
    """A Drawn mini-batch of the centre crops of chosen images [n] of a batch, for an accuracy."""
    crops = np.tile([MARGIN // 2, MARGIN // 2, 0], (len(chosen), 1))
    return Drawn(helpers, batch, chosen, crops)


def draw_sample(helpers, batches, parts, seed, size, iteration):
    """Up to `size` images, spread evenly over a random batch, in up to `parts` Drawn mini-batches."""
    [batch] = random_batches(batches, [(seed, "accuracy", iteration)])
    chosen = np.linspace(0, batch.count - 1, min(size, batch.count)).round().astype(int)
    parts = min(parts, len(chosen))
    return [draw_centres(helpers, batch, chosen[part::parts]) for part in range(parts)]


def compute_grad(pool, minibatches, sample, mean, keep_probability, seed):
    """The losses of Drawn mini-batches, and the top-1 accuracy on a sample, None without one.

    Gradients stay where they were computed, see `Pool.mean_gradients`. The sample is also Drawn.
    """
    gradients = []
    for index, minibatch in enumerate(minibatches):
        dropout_seed = generator(seed, "dropout", pool.iteration, index).integers(2**31, size=2)
        arguments = keep_probability, dropout_seed.tolist()
        gradients.append(Request("compute_grad", minibatch, [mean], arguments, returns=2))
    accuracies = [Request("print_accuracy", part, [mean]) for part in sample]
    pool.run(gradients + accuracies)
    counts = sum(request.value for request in accuracies)
    top1 = counts[0] / counts[2] if accuracies else None
    return [request.value for request in gradients], top1


def validate(pool, batches, mean):
    """Top-1 and top-5 accuracy on all images of some batches, with the weights that workers have."""
    requests = []
    for batch in batches:
        for start in range(0, batch.count, VALIDATION_PIECE):
            chosen = np.arange(start, min(start + VALIDATION_PIECE, batch.count))
            drawn = draw_centres(pool.helpers, batch, chosen)
            requests.append(Request("print_accuracy", drawn, [mean]))
    *hits, images = sum(request.value for request in pool.run(requests))
    return np.divide(hits, images)  # exact, however images are split


# ---- actors


# One byte of memory: an actor that asks for nothing may start on another node than its strategy says.
@ray.remote(num_cpus=0, memory=1, max_restarts=-1, max_task_retries=-1, **ACTOR)
class Helper(Actor):
    """Does a node's small jobs of every iteration in one warm process; Ray ends idle tasks' processes.

    It keeps nothing between calls, so that Ray may restart it and repeat any call.
    """

    def draw(self, refs, chosen, crops):
        """The MiniBatch that `crop_images` makes of a batch, whose images and labels are `refs`."""
        images, labels = ray.get(refs)
        with self.at_work():
            return crop_images(images, labels, chosen, crops)

    def fetch(self, refs, before):
        """Copy objects to this node, once calls elsewhere, whose results are `before`, have done so."""
        ray.wait(before, num_returns=len(before))  # Ray does not wait for none
        ray.get(refs)

    def add_gradients(self, tree, indexes, refs):
        """The sum of sets of gradients, which have indexes in a tree: see `sum_of_sets`."""
        sets = ray.get(refs)
        with self.at_work():
            return sum_of_sets(tree, dict(zip(indexes, sets, strict=True)))


@ray.remote(**ACTOR)
class Worker(Actor):
    """An actor: one network in its own session, in its own process, for as long as the run lasts.

    `refs` are of weights, a MiniBatch and the mean image: so it never computes on other weights.
    """

    def __init__(self, network):
        import alexnet  # here, so that data tasks and helpers start without TensorFlow

        self.network = alexnet.AlexNet(**network)
        self.iteration = None

    def update_weights(self, iteration, weightrefs, passed_on=()):
        """Load an iteration's weights unless they are loaded; wait for references `passed_on` first."""
        if self.iteration != iteration:
            ray.wait(list(passed_on))
            [weights] = ray.get(weightrefs)
            with self.at_work():
                self.network.update_weights(weights)
            self.iteration = iteration

    def compute_grad(self, iteration, refs, keep_probability, dropout_seed):
        """The 16 gradients of a MiniBatch's mean loss, and that loss: see `AlexNet.compute_grad`."""
        with self._inputs(iteration, refs) as (images, y_true):
            return self.network.compute_grad(images, y_true, keep_probability, dropout_seed)

    def print_accuracy(self, iteration, refs):
        """How many of a MiniBatch's images are right, top-1 and top-5, and how many it has: int [3]."""
        with self._inputs(iteration, refs) as (images, y_true):
            return np.array([*self.network.count_hits(images, y_true), len(images)])

    @contextlib.contextmanager
    def _inputs(self, iteration, refs):
        """What the network takes, which is at work within."""
        weightref, *others = refs
        self.update_weights(iteration, [weightref])
        minibatch, mean = ray.get(others)
        with self.at_work():
            y_true = one_hot(minibatch.labels, self.network.num_classes)
            yield subtract_mean(minibatch, mean), y_true
