"""Validation, measured: all held-out images through the workers, beside bare forward passes.

    python benchmarks/validation.py [--images 2000] [--precision float32] [--repeats 7]

Ours is `Workers.validate` of 2 workers of one CPU, from uint8 images in the object store to counts of
hits. The other is the network alone: 2 processes of one thread, with centred float32 images in memory.
Both take turns; prints medians and, in brackets, the least and the most.
"""

import argparse
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import ray

import alexnet
import functions
from functions import VALIDATION_STEP

WORKERS, NUM_CLASSES, BATCHES = 2, 1000, 4
GOAL = 1.1  # times the images over the forward rate


def initial_weights(precision):
    """A network's weights in a precision."""
    network = alexnet.AlexNet()
    rng = functions.generator(0)
    network.initialize(alexnet.initial_weights(alexnet.LAYERS, NUM_CLASSES, "he", rng))
    return network.weights(precision)


def forward(pipe, precision):
    """A process that runs as many forward passes as the pipe asks for."""
    alexnet.keep_memory()
    network = alexnet.AlexNet(threads=1, precision=precision)
    network.update_weights(initial_weights(precision))
    rng = np.random.default_rng(0)
    images = rng.normal(0, 58, (VALIDATION_STEP, 224, 224, 3)).astype(np.float32)
    y_true = functions.one_hot(rng.integers(0, NUM_CLASSES, VALIDATION_STEP), NUM_CLASSES)
    network.count_hits(images, y_true)
    pipe.send(None)
    while steps := pipe.recv():
        start = time.perf_counter()
        for _ in range(steps):
            network.count_hits(images, y_true)
        pipe.send(time.perf_counter() - start)


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure validation beside bare forward passes.")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    context, pipes = get_context("spawn"), []
    for _ in range(WORKERS):
        pipe, end = context.Pipe()
        context.Process(target=forward, args=(end, args.precision), daemon=True).start()
        pipe.recv()
        pipes.append(pipe)

    os.environ["RAY_ADDRESS"] = "local"  # a Ray of its own
    functions.connect(num_cpus=WORKERS)
    network = {"num_classes": NUM_CLASSES, "threads": 1, "precision": args.precision}
    share = {"cpus": 1, "gpus": 0}
    workers = functions.Workers(WORKERS, share, network, functions.Helpers(), timeout=300)
    workers.wait(100)
    rng, count = np.random.default_rng(0), args.images // BATCHES
    batches = []
    for _ in range(BATCHES):
        images = ray.put(rng.integers(0, 256, (count, 256, 256, 3), np.uint8))
        batches.append(functions.Batch(images, ray.put(rng.integers(0, NUM_CLASSES, count)), count))
    mean = ray.put(np.full((256, 256, 3), 120, np.float32))
    workers.update_weights(0, ray.put(initial_weights(args.precision)))
    workers.validate(batches, mean)

    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        workers.validate(batches, mean)
        ours = time.perf_counter() - start
        for pipe in pipes:
            pipe.send(args.images // VALIDATION_STEP // WORKERS)
        seconds.append((ours, max(pipe.recv() for pipe in pipes)))
    for pipe in pipes:
        pipe.send(0)
    ours, bare = np.array(seconds).T
    for name, values in ("validation", args.images / ours), ("forward passes", args.images / bare):
        print(f"{name:15} {np.median(values):6.1f} [{values.min():.1f}..{values.max():.1f}] images/s")
    ratio = ours / bare
    met = "met" if np.median(ratio) <= GOAL else "MISSED"
    print(
        f"time ratio {np.median(ratio):.2f} [{ratio.min():.2f}..{ratio.max():.2f}], goal {GOAL}: {met}"
    )


if __name__ == "__main__":
    main()
