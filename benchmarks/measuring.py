"""What the benchmarks share: figures, processes and their memory, an S3 server, the plainest network.

It puts the project's root on the path, so it is imported before the project's modules. It imports what
needs TensorFlow inside functions, because some processes of a benchmark do without it.
"""

import atexit
import contextlib
import os
import sys
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import s3_client, s3_server

WORKERS = 2  # of one CPU each, or what a peer has in their place
NUM_CLASSES, KEEP_PROBABILITY = 1000, 0.5
WARM_UP = 4  # steps of a peer before it is measured


# ---- figures


def take_turns(ways, repeats, warm_up=1):
    """Run all ways in turn, so that a change of the machine's speed affects all of them.

    Returns a dict of name -> list of what a way returned, without the first turns, which warm it up.
    """
    results = {name: [] for name in ways}
    for turn in range(warm_up + repeats):
        for name, way in ways.items():
            result = way()
            if turn >= warm_up:
                results[name].append(result)
    return results


def spread(values, digits=".3g"):
    """Median, least and most of some numbers."""
    low, middle, high = (format(f(values), digits) for f in (np.min, np.median, np.max))
    return f"{middle} [{low}..{high}]"


def verdict(ratios, target):
    """Whether the median of some ratios meets a target such as ">= 1.7"."""
    operator, bound = target.split()
    ratio = np.median(ratios)
    met = ratio <= float(bound) if operator == "<=" else ratio >= float(bound)
    return "met" if met else "MISSED"


# ---- processes


def run_apart(function, *arguments):
    """What a function returns in a new process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


class Peer:
    """Processes that do the same steps, and stand still until they are asked for some."""

    def __init__(self, function, count, *arguments):
        """Start so many processes of `function(pipe, rank, *arguments)`, each of which serves."""
        context, self._pipes = get_context("spawn"), []
        for rank in range(count):
            pipe, end = context.Pipe()
            context.Process(target=function, args=(end, rank, *arguments)).start()
            end.close()
            atexit.register(pipe.close)  # if this process fails, a peer that waits for it ends, too
            self._pipes.append(pipe)
        self._answers()

    def _answers(self):
        return [pipe.recv() for pipe in self._pipes]

    def seconds(self, steps):
        """Seconds that one step takes, of so many in a row."""
        for pipe in self._pipes:
            pipe.send(steps)
        return max(self._answers())

    def end(self):
        """End the processes; returns the last answer of the first."""
        for pipe in self._pipes:
            pipe.send(0)
        return self._answers()[0]


def serve(pipe, step):
    """Run as many steps as the pipe asks for, again and again; answers with the seconds of one."""
    for _ in range(WARM_UP):
        step()
    pipe.send(None)
    while count := pipe.recv():
        start = time.perf_counter()
        for _ in range(count):
            step()
        pipe.send((time.perf_counter() - start) / count)
    pipe.send(None)


def ask(question, gone):
    """What a psutil call on another process answers, or `gone`: it may have ended at any time."""
    try:
        return question()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a ZombieProcess is a NoSuchProcess, too
        return gone


def ray_workers(besides=()):
    """Ids of the Ray processes that this process has started, besides actors of some classes."""
    processes = ask(partial(psutil.Process().children, recursive=True), [])
    names = {process.pid: ask(process.name, "") for process in processes}
    others = tuple(f"ray::{name}" for name in besides)
    return [
        pid for pid, name in names.items() if name.startswith("ray::") and not name.startswith(others)
    ]


def private_memory(pid):
    """MB of memory that are a process's own, not the object store's; 0 if it has ended."""
    areas = ask(lambda: psutil.Process(pid).memory_maps(), [])
    own = [area for area in areas if "plasma" not in area.path]
    return sum(area.private_clean + area.private_dirty for area in own) / 1e6


# ---- driver.py in this process


@contextlib.contextmanager
def loopback():
    """Point the environment at an S3 server on loopback and a Ray of its own; yields an S3 client."""
    with s3_server() as environment:
        os.environ.update(environment, RAY_ADDRESS="local")
        yield s3_client(environment)


def watch(then):
    """A results.Report that says nothing; after an iteration it calls `then` with a dict of phase ->
    seconds, and `then` may stand still."""
    from results import Report

    class Watch(Report):
        phases = {}

        def say(self, line):
            pass

        def start(self, *_):
            self.resume()

        def resume(self):
            self.since = time.perf_counter()

        def lap(self, phase):
            now = time.perf_counter()
            self.phases[phase], self.since = now - self.since, now

        def iteration(self, *_):
            then(dict(self.phases))
            self.resume()

    return Watch()


def driver_network(**options):
    """The network that driver.py trains, as its constants say, with its initial weights."""
    import alexnet
    import driver
    import functions

    rule = driver.update_rule(WORKERS * driver.MINI_BATCH)
    network = alexnet.AlexNet(driver.LAYERS, driver.NUM_CLASSES, rule, **options)
    rng = functions.generator(driver.SEED, "initial weights")
    network.restore(network.initial_state(driver.INITIAL_WEIGHTS, rng))
    return network


# ---- the network of the peers


def initial_weights(precision="float32"):
    """What all networks begin with, as the driver sends it to workers."""
    import alexnet
    import functions

    kind = alexnet.tf.as_dtype(precision).as_numpy_dtype
    weights = alexnet.initial_weights(alexnet.LAYERS, NUM_CLASSES, "he", functions.generator(0))
    return alexnet.as_bits([weight.astype(kind) for weight in weights])


# Placeholders, variables and the mean loss of a network; `seed` decides its dropout.
Network = namedtuple("Network", "images y_true seed variables loss")


NORMALISED = 0, 1  # the layers whose output the paper normalises (section 3.5)


def forward(images, parameters, norm, dropout):
    """alexnet.forward as a user would write it, with the paper's normalisations if `norm`."""
    import alexnet
    from alexnet import tf

    precision, weights = parameters[0].dtype, iter(parameters)
    x = tf.cast(images / alexnet.PIXEL_STD, precision)
    for i, (kind, _, *options) in enumerate(alexnet.LAYERS):
        if kind == "conv":
            _, stride, *flags = options
            x = tf.nn.relu(tf.nn.conv2d(x, next(weights), stride, "SAME") + next(weights))
            if norm and i in NORMALISED:  # section 3.3, n = 5; the sum takes alpha, not alpha / n
                x = tf.cast(x, tf.float32)
                x = tf.nn.local_response_normalization(x, 2, bias=2.0, alpha=1e-4, beta=0.75)
                x = tf.cast(x, precision)
            if "pool" in flags:
                x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        else:
            x = tf.reshape(x, [-1, int(np.prod(x.shape[1:]))])
            x = dropout(tf.nn.relu(tf.matmul(x, next(weights)) + next(weights)), i)
    return tf.cast(tf.matmul(x, next(weights)), tf.float32) + tf.cast(next(weights), tf.float32)


def plain_network(precision, norm=False, seeded=True):
    """A Network in the current graph, of float32 variables and products in a precision.

    Unless it is `seeded`, its dropout is TensorFlow's own, which counts session runs.
    """
    import alexnet
    from alexnet import tf

    images = tf.placeholder(tf.float32, [None, 224, 224, 3])
    y_true = tf.placeholder(tf.float32, [None, NUM_CLASSES])
    seed = tf.placeholder_with_default(np.zeros(2, np.int64), [2])
    shapes = alexnet.weight_shapes(alexnet.LAYERS, NUM_CLASSES)
    options = {"initializer": tf.zeros_initializer(), "use_resource": True}
    variables = [tf.get_variable(f"v{i}", shape, **options) for i, shape in enumerate(shapes)]

    def dropout(x, layer):
        if seeded:
            return alexnet.seeded_dropout(x, KEEP_PROBABILITY, seed + np.array([0, layer]))
        return tf.nn.dropout(x, rate=1 - KEEP_PROBABILITY)

    cast = [tf.cast(v, precision) for v in variables]
    logits = forward(images, cast, norm, dropout)
    losses = tf.nn.softmax_cross_entropy_with_logits_v2(y_true, logits)
    return Network(images, y_true, seed, variables, tf.reduce_mean(losses))


def open_session(network, threads):
    """A session of so many threads on the current graph, with the initial weights loaded."""
    from alexnet import tf

    options = {"device_count": {"GPU": 0}, "inter_op_parallelism_threads": 1}
    session = tf.Session(config=tf.ConfigProto(intra_op_parallelism_threads=threads, **options))
    session.run(tf.global_variables_initializer())
    for variable, weight in zip(network.variables, initial_weights(), strict=True):
        variable.load(weight, session)
    return session
