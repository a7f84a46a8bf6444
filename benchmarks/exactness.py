"""What exactness costs: images a second of a gradient with and without it, side by side.

    python benchmarks/exactness.py [--repeats 9]

With: the dropout mask from a fed seed, and every gradient checked to be finite, as the mean is.
Without: TensorFlow's own dropout, which counts session runs, and no check. One thread, as a worker of
one CPU has; mini-batches of 20. Adding gradients in a fixed order, carrying references of weights and
drawing from seeds are the same work either way.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import alexnet
import functions

MINI_BATCH = 20


class Inexact(alexnet.AlexNet):
    """AlexNet with TensorFlow's own dropout."""

    def _dropout(self, x, layer):
        return alexnet.tf.nn.dropout(x, rate=1 - self.keep)


def seconds(network, images, y_true, exact, step):
    """Seconds that one gradient takes, with or without exactness."""
    start = time.perf_counter()
    gradients, _ = network.compute_grad(images, y_true, 0.5, [0, step])
    if exact and not np.isfinite([np.dot(g.ravel(), g.ravel()) for g in gradients]).all():
        raise ValueError("not finite")
    return time.perf_counter() - start


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    images = rng.normal(scale=58, size=(MINI_BATCH, 224, 224, 3)).astype(np.float32)
    y_true = functions.one_hot(rng.integers(0, 1000, MINI_BATCH), 1000)
    weights = alexnet.initial_weights(alexnet.LAYERS, 1000, "he", rng)
    networks = {True: alexnet.AlexNet(threads=1), False: Inexact(threads=1)}
    for network in networks.values():
        network.update_weights(weights)
    times = {True: [], False: []}
    for step in range(repeats + 2):
        for exact, network in networks.items():
            took = seconds(network, images, y_true, exact, step)
            if step >= 2:  # warm
                times[exact].append(took)
    for exact, name in ((True, "with"), (False, "without")):
        speeds = sorted(MINI_BATCH / took for took in times[exact])
        median = statistics.median(speeds)
        print(f"{name:8} {median:6.1f} images/s (from {speeds[0]:.1f} to {speeds[-1]:.1f})")
    ratios = [without / took for took, without in zip(times[True], times[False], strict=True)]
    print(f"with / without: {statistics.median(ratios):.3f} (median of {repeats} pairs)")


if __name__ == "__main__":
    main()
