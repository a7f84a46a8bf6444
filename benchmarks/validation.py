"""Validation, measured: all held-out images through the workers, beside bare forward passes.

    python benchmarks/validation.py [--images 2000] [--precision float32] [--repeats 7]

Ours is `functions.validate` by 2 workers of one CPU, from uint8 images in the object store to counts of
hits. The other is the network alone: 2 processes of one thread, with centred float32 images in memory.
Both take turns; prints medians and, in brackets, the least and the most.
"""

import argparse
import os
import time

from measuring import NUM_CLASSES, WORKERS, Peer, initial_weights, serve, spread, take_turns, verdict

import alexnet
import driver
import functions
from functions import VALIDATION_PIECE
from machinery.cluster import joining
from machinery.cluster.pool import Pool, Setup

import numpy as np
import ray

BATCHES = 4
GOAL = "<= 1.1"  # times the images over the forward rate


def forward(pipe, rank, precision):
    """A process that runs as many forward passes as the pipe asks for."""
    network = alexnet.AlexNet(threads=1, precision=precision)
    network.update_weights(initial_weights(precision))
    rng = np.random.default_rng(0)
    images = rng.normal(0, 58, (VALIDATION_PIECE, 224, 224, 3)).astype(np.float32)
    y_true = functions.one_hot(rng.integers(0, NUM_CLASSES, VALIDATION_PIECE), NUM_CLASSES)
    serve(pipe, lambda: network.count_hits(images, y_true))


def start_workers(precision):
    """Workers that are up and have weights."""
    os.environ["RAY_ADDRESS"] = "local"  # a Ray of its own
    joining.join(driver.runtime_env(), functions.Worker, num_cpus=WORKERS)
    network = {"threads": 1, "precision": precision}
    setup = Setup(WORKERS, {"cpus": 1, "gpus": 0}, network, 300, 100, can_grow=False)
    pool = Pool(setup, functions.Worker, functions.Helper)
    pool.wait()
    pool.update_weights(0, ray.put(initial_weights(precision)))
    return pool


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure validation beside bare forward passes.")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    count, steps = args.images // BATCHES, args.images // VALIDATION_PIECE // WORKERS
    if not steps:
        parser.error(f"--images must be {VALIDATION_PIECE * WORKERS} or more")
    peer, pool = Peer(forward, WORKERS, args.precision), start_workers(args.precision)
    rng, batches = np.random.default_rng(0), []
    for _ in range(BATCHES):
        images = ray.put(rng.integers(0, 256, (count, 256, 256, 3), np.uint8))
        batches.append(functions.Batch(images, ray.put(rng.integers(0, NUM_CLASSES, count)), count))
    mean = ray.put(np.full((256, 256, 3), 120, np.float32))

    def validation():
        start = time.perf_counter()
        functions.validate(pool, batches, mean)
        return count * BATCHES / (time.perf_counter() - start)

    def forward_passes():
        return VALIDATION_PIECE * WORKERS / peer.seconds(steps)

    speeds = take_turns({"validation": validation, "forward passes": forward_passes}, args.repeats)
    peer.end()
    for name, values in speeds.items():
        print(f"{name:15} {spread(values, '.1f')} images/s")
    ratios = np.divide(speeds["forward passes"], speeds["validation"])
    print(f"time ratio {spread(ratios, '.2f')}, goal {GOAL}: {verdict(ratios, GOAL)}")


if __name__ == "__main__":
    main()
