"""driver.py with the thin network as a program: NAME=VALUE sets a constant, then come the flags."""

import ast
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs by its path, from anywhere

import ray

import driver
import results
from tests.support import THIN, fingerprint

PATIENT_FROM = 15  # the iteration from which on a lost worker is waited for


class Report(results.Report):
    """Says what the object store holds every 10 iterations; goes slowly while a worker is missing."""

    def __init__(self):
        """Nothing is missing yet."""
        super().__init__()
        self.batches, self.missing = [], 0

    def say(self, line):
        """Print a line, and count the workers that are missing."""
        super().say(line)
        self.missing += (" is lost (" in line) - (" is back: " in line)

    def start(self, iteration, batches, mean):
        """Keep the batches."""
        super().start(iteration, batches, mean)
        self.batches = batches

    def iteration(self, iteration, *numbers):
        """Print a fingerprint of all images every 10 iterations; give a new worker time to come."""
        super().iteration(iteration, *numbers)
        if iteration % 10 == 0:
            pairs = (ray.get([batch.images, batch.labels]) for batch in self.batches)
            print(fingerprint(pairs), flush=True)
        if self.missing and iteration >= PATIENT_FROM:
            time.sleep(1)


if __name__ == "__main__":
    driver.LAYERS, driver.NUM_CLASSES, driver.ACCURACY_EVERY = THIN, 10, 5
    driver.PRECISION = "float32"  # on any CPU
    settings = [argument for argument in sys.argv[1:] if argument.split("=")[0].isupper()]
    for name, value in (setting.split("=", 1) for setting in settings):
        setattr(driver, name, ast.literal_eval(value))
    sys.exit(driver.main(sys.argv[1 + len(settings) :], report=Report()))
