"""What the benchmarks share: figures, processes and their memory, an S3 server, the plainest network.

It puts the project's root on the path, so it is imported before the project's modules. It imports what
needs TensorFlow inside functions, because some processes of a benchmark do without it.
"""

import atexit
import contextlib
import os
import sys
import tarfile
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


# ---- photos, and driver.py in this process


def read_photos(folder):
    """The bytes of all files in the training tars of a folder that is laid out like the bucket."""
    photos = []
    for path in sorted(Path(folder, "ILSVRC2012_img_train").glob("*.tar")):
        with tarfile.open(path) as tar:
            photos += [tar.extractfile(member).read() for member in tar if member.isreg()]
    return photos


@contextlib.contextmanager
def loopback():
    """Point the environment at an S3 server on loopback and a Ray of its own; yields an S3 client."""
    with s3_server() as environment:
        os.environ.update(environment, RAY_ADDRESS="local")
        yield s3_client(environment)


def watch(then):
    """A results.Report that says nothing; after an iteration it calls `then` with a dict of phase ->
    seconds, and `then` may stand still."""
    from machinery.results import Report

    class Watch(Report):
        def say(self, line):
            pass

        def start(self, *_):
            self.resume()

        def iteration(self, *_):
            phases, self._seconds = self._seconds, {}
            then({name.removeprefix("seconds/"): seconds for name, seconds in phases.items()})
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
    from machinery.storage.tf1 import tf

    kind = tf.as_dtype(precision).as_numpy_dtype
    weights = alexnet.initial_weights(alexnet.LAYERS, NUM_CLASSES, "he", functions.generator(0))
    return alexnet.as_bits([weight.astype(kind) for weight in weights])


# Placeholders, variables and the mean loss of a network.
Network = namedtuple("Network", "images y_true variables loss")


def plain_network(precision):
    """A Network in the current graph, of float32 variables and products in a precision."""
    import alexnet
    from machinery.storage.tf1 import tf

    images = tf.placeholder(tf.float32, [None, 224, 224, 3])
    y_true = tf.placeholder(tf.float32, [None, NUM_CLASSES])
    shapes = alexnet.weight_shapes(alexnet.LAYERS, NUM_CLASSES)
    options = {"initializer": tf.zeros_initializer(), "use_resource": True}
    variables = [tf.get_variable(f"v{i}", shape, **options) for i, shape in enumerate(shapes)]

    def dropout(x, layer):
        return alexnet.seeded_dropout(x, KEEP_PROBABILITY, np.array([0, layer]))

    cast = [tf.cast(v, precision) for v in variables]
    logits = alexnet.forward(images, cast, alexnet.LAYERS, dropout)
    losses = tf.nn.softmax_cross_entropy_with_logits_v2(y_true, logits)
    return Network(images, y_true, variables, tf.reduce_mean(losses))


def open_session(network, threads):
    """A session of so many threads on the current graph, with the initial weights loaded."""
    from machinery.storage.tf1 import tf

    options = {"device_count": {"GPU": 0}, "inter_op_parallelism_threads": 1}
    session = tf.Session(config=tf.ConfigProto(intra_op_parallelism_threads=threads, **options))
    session.run(tf.global_variables_initializer())
    for variable, weight in zip(network.variables, initial_weights(), strict=True):
        variable.load(weight, session)
    return session
