"""driver.py with the thin network as a program: NAME=VALUE sets a constant, then come the flags."""

import ast
import hashlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import ray
from conftest import THIN

import driver
import functions


def fingerprint(images, labels):
    """A fingerprint of a multiset of images, each with its label."""
    pairs = [
        (hashlib.sha256(image.tobytes()).hexdigest(), int(y))
        for image, y in zip(images, labels, strict=True)
    ]
    return hashlib.sha256(repr(sorted(pairs)).encode()).hexdigest()


def print_fingerprint(self, batches, size, count, seed, iteration):
    """Helpers.draw_minibatches, which prints what the object store holds every 10 iterations."""
    if iteration % 10 == 0:
        images = [image for batch in batches for image in ray.get(batch.images)]
        labels = [label for batch in batches for label in ray.get(batch.labels)]
        print(f"{len(images)} images: {fingerprint(images, labels)}")
    return draw_minibatches(self, batches, size, count, seed, iteration)


def update_all_weights(self, iteration, weightref):
    """Workers.update_weights, which waits until all workers are up once, at iteration ALL_UP_AT."""
    while iteration == driver.ALL_UP_AT and self._starting:
        self._admit(timeout=60)
    update_weights(self, iteration, weightref)


draw_minibatches = functions.Helpers.draw_minibatches
update_weights = functions.Workers.update_weights

if __name__ == "__main__":
    functions.Helpers.draw_minibatches = print_fingerprint
    functions.Workers.update_weights = update_all_weights
    driver.ALL_UP_AT = None
    driver.LAYERS, driver.NUM_CLASSES, driver.ACCURACY_EVERY = THIN, 10, 5
    driver.PRECISION = "float32"  # on any CPU
    settings = [argument for argument in sys.argv[1:] if argument.split("=")[0].isupper()]
    for name, value in (setting.split("=", 1) for setting in settings):
        setattr(driver, name, ast.literal_eval(value))
    sys.exit(driver.main(sys.argv[1 + len(settings) :]))
