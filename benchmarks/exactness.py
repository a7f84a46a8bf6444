"""What exactness costs: images a second of a gradient with and without it, side by side.

    python benchmarks/exactness.py [--repeats 9]

With: the dropout mask from a fed seed, and every gradient checked to be finite, as the mean is.
Without: TensorFlow's own dropout, which counts session runs, and no check. One thread, as a worker of
one CPU has; mini-batches of 20. Adding gradients in a fixed order, carrying references of weights and
drawing from seeds are the same work either way.
"""

import argparse
import time

import numpy as np
from measuring import NUM_CLASSES, open_session, plain_network, spread, take_turns

import functions
from alexnet import tf

MINI_BATCH = 20


def gradient_of(exact, images, y_true):
    """A function that computes a gradient, and returns the seconds that it took."""
    with tf.Graph().as_default():
        network = plain_network("float32", seeded=exact)
        fetched = [tf.gradients(network.loss, network.variables), network.loss]
        session = open_session(network, threads=1)
    feed = {network.images: images, network.y_true: y_true}
    rng = np.random.default_rng(0)

    def seconds():
        seed = {network.seed: rng.integers(2**31, size=2)} if exact else {}
        start = time.perf_counter()
        gradients, _ = session.run(fetched, feed | seed)
        if exact and not np.isfinite([np.dot(g.ravel(), g.ravel()) for g in gradients]).all():
            raise ValueError("not finite")
        return time.perf_counter() - start

    return seconds


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    images = rng.normal(scale=58, size=(MINI_BATCH, 224, 224, 3)).astype(np.float32)
    y_true = functions.one_hot(rng.integers(0, NUM_CLASSES, MINI_BATCH), NUM_CLASSES)
    ways = {name: gradient_of(name == "with", images, y_true) for name in ("with", "without")}
    times = {name: np.array(taken) for name, taken in take_turns(ways, repeats, warm_up=2).items()}
    for name, taken in times.items():
        print(f"{name:8} {spread(MINI_BATCH / taken, '.1f')} images/s")
    ratio = times["without"] / times["with"]
    print(f"with / without: {spread(ratio, '.3f')} (median of {repeats} pairs)")


if __name__ == "__main__":
    main()
