"""What the benchmarks share: flags, figures, processes and their memory, photos, a watched driver.py.

It puts the project's root on the path, so it is imported before the project's modules. It imports what
needs TensorFlow inside functions, because some processes of a benchmark do without it.
"""

import argparse
import contextlib
import os
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import fill_bucket, s3_client, s3_server

os.environ["RAY_ADDRESS"] = "local"  # a Ray of its own, where a benchmark does not start a cluster

WORKERS = 2  # of one CPU each, or what a peer has in their place
PRECISIONS = "float32", "bfloat16"
TRAIN = "ILSVRC2012_img_train/"  # where a folder that is laid out like the bucket has its tars


def read_flags(doc, *positional, **defaults):
    """The flags of a command line; --help shows `doc`, the program's docstring, which explains them.

    A flag is of its default's type, or of a type that stands in its place; False is a switch. A tuple
    has the values to choose from, the default first. A list takes any number of values: some of its
    words, or integers.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    for name in positional:
        parser.add_argument(name)
    for name, default in defaults.items():
        kind = default if isinstance(default, type) else type(default)
        options = {"type": kind, "default": None if kind is default else default}
        if isinstance(default, list):
            words = default[:1] != [] and isinstance(default[0], str)
            options |= {"nargs": "*", "type": str if words else int}
            options |= {"choices": default} if words else {}
        elif isinstance(default, tuple):
            options = {"choices": default, "default": default[0]}
        elif default is False:
            options = {"action": "store_true"}
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


def take_turns(ways, repeats, warm_up=1):
    """Run all ways in turn, so that a change of the machine's speed affects all of them.

    Returns a dict of name -> list of what a way returned, without the first turns, which warm it up.
    """
    turns = [{name: way() for name, way in ways.items()} for _ in range(warm_up + repeats)]
    return {name: [turn[name] for turn in turns[warm_up:]] for name in ways}


def spread(values, digits=".3g"):
    """Median, least and most of some numbers."""
    low, middle, high = (format(f(values), digits) for f in (np.min, np.median, np.max))
    return f"{middle} [{low}..{high}]"


def run_apart(function, *arguments):
    """What a function returns in a new process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def private_memory(pid):
    """MB of memory that are a process's own, not the object store's; 0 if it has ended."""
    import psutil

    with contextlib.suppress(psutil.Error):
        own = [area for area in psutil.Process(pid).memory_maps() if "plasma" not in area.path]
        return sum(area.private_clean + area.private_dirty for area in own) / 1e6
    return 0


def read_photos(folder):
    """The bytes of all files in the training tars of a folder that is laid out like the bucket."""
    photos = []
    for path in sorted(Path(folder, TRAIN).glob("*.tar")):
        with tarfile.open(path) as tar:
            photos += [tar.extractfile(member).read() for member in tar if member.isreg()]
    return photos


@contextlib.contextmanager
def loopback():
    """Point the environment at an S3 server on loopback; yields an S3 client."""
    with s3_server() as environment:
        os.environ.update(environment)
        yield s3_client(environment)


@contextlib.contextmanager
def small_bucket(images_per_class=12):
    """An S3 server on loopback with pictures of ten classes; yields driver.py's flags for them."""
    with loopback() as s3:
        fill_bucket(s3, "small", images_per_class)
        yield ["--s3-bucket", "small"]


def watch(then):
    """A results.Report that says nothing; after an iteration it calls `then`, which may stand still,
    with the moments of its start and of the ends of its phases: a dict in their order."""
    from machinery.results import Report

    class Watch(Report):
        def say(self, line):
            pass

        def start(self, *_):
            self._moments = {"start": time.perf_counter()}

        def lap(self, phase):
            self._moments[phase] = time.perf_counter()

        def iteration(self, *_):
            then(self._moments)
            self.start()

    return Watch()


def phases(moments):
    """The seconds of each phase, of such moments: a dict."""
    return dict(zip(list(moments)[1:], np.diff([*moments.values()]), strict=True))
