"""What an iteration of driver.py is made of, part by part: the parts add up to the iteration.

    python benchmarks/parts.py [--precision float32] [--mini-batch 20] [--iterations 40]

2 workers of one CPU, as driver.py has them, note when their calls begin and end. The parts are those of
iterations without an accuracy. Prints milliseconds: medians and, in brackets, the least and the most.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path

from measuring import WORKERS, loopback, run_apart, spread

from tests.support import drive, fill_bucket

import numpy as np

WARM_UP = 10  # iterations


def noting(folder):
    """functions.Worker, which also notes each gradient: iteration, and moments of its parts."""
    import functions
    from machinery.cluster.nodes import ACTOR

    import ray

    @ray.remote(**ACTOR)
    class Worker(functions.Worker.__ray_metadata__.modified_class):
        def __init__(self, network):
            super().__init__(network)
            self.loaded, self.notes = (0, 0), (folder / str(os.getpid())).open("w", buffering=1)

        def update_weights(self, iteration, weightrefs, passed_on=()):
            start = time.perf_counter()
            if self.iteration != iteration:
                super().update_weights(iteration, weightrefs, passed_on)
                self.loaded = start, time.perf_counter()

        def compute_grad(self, iteration, *arguments):
            moments, compute = [time.perf_counter()], self.network.compute_grad

            def timed(*inputs):
                moments.append(time.perf_counter())
                result = compute(*inputs)
                moments.append(time.perf_counter())
                return result

            self.network.compute_grad = timed
            result = super().compute_grad(iteration, *arguments)
            self.network.compute_grad = compute
            print(json.dumps([iteration, *self.loaded, *moments]), file=self.notes)
            return result

    return Worker


def train(args, folder):
    """Run driver.py; the moments at which an iteration and its phases end: a list of dicts."""
    import driver
    from machinery.results import Report

    driver.NUM_WORKERS, driver.MINI_BATCH, driver.PRECISION = WORKERS, args.mini_batch, args.precision
    iterations = [{}]

    class Moments(Report):
        def say(self, line):
            pass

        def lap(self, phase):
            iterations[-1][phase] = time.perf_counter()

        def iteration(self, *_):
            if len(iterations) == WARM_UP + args.iterations:
                os.kill(os.getpid(), signal.SIGINT)  # it stops after this step
            iterations.append({"start": time.perf_counter()})

    with loopback() as s3:
        fill_bucket(s3, "parts", images_per_class=12)
        drive(["--s3-bucket", "parts"], report=Moments(), actor=noting(folder))
    return iterations


def parts(driver, notes):
    """The parts of an iteration, in seconds: of its moments, and of those of its workers [n, 5]."""
    loads, loaded, called, begun, computed = notes.T
    return {
        "broadcast: weights into the object store": driver["broadcast"] - driver["start"],
        "workers begin: calls, and loading the weights": called.mean() - driver["broadcast"],
        "   of it loading": (loaded - loads).mean(),
        "the mean image is subtracted": (begun - called).mean(),
        "the network's gradients, in its session": (computed - begun).mean(),
        "the mean worker waits for the last one": (computed.max() - computed).mean(),
        "gradients into the object store, answers": driver["compute"] - computed.max(),
        "gather: mean, decay and norm": driver["gather"] - driver["compute"],
        "apply: the optimizer": driver["apply"] - driver["gather"],
    }


def measure(args):
    """The parts of each iteration that has no accuracy, and the seconds of each one that has."""
    import driver

    with tempfile.TemporaryDirectory() as folder:
        iterations = train(args, Path(folder))
        lines = [line for path in Path(folder).iterdir() for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    measured, with_accuracy = [], []
    for number in range(WARM_UP, WARM_UP + args.iterations):
        moments = iterations[number]
        if number % driver.ACCURACY_EVERY:
            notes = np.array([row[1:] for row in rows if row[0] == number])
            measured.append(parts(moments, notes))
        else:
            with_accuracy.append(moments["apply"] - moments["start"])
    return measured, with_accuracy


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--mini-batch", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    measured, with_accuracy = run_apart(measure, args)
    for name in measured[0]:
        values = 1000 * np.array([iteration[name] for iteration in measured])
        print(f"{name:48} {spread(values, '.0f')}")
    whole = [sum(v for name, v in i.items() if not name.startswith(" ")) for i in measured]
    print(f"{'the iteration':48} {spread(1000 * np.array(whole), '.0f')}")
    print(f"{'an iteration with an accuracy':48} {spread(1000 * np.array(with_accuracy), '.0f')}")


if __name__ == "__main__":
    main()
