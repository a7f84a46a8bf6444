"""driver.py with the thin network as a program: NAME=VALUE sets a constant, then come the flags.

Three settings are no constants. PAUSES=[(iteration, phase), line, ...]: the run stands still after the
phase, or after a line that starts so, until a line comes on standard input. So a test decides what
happens when. NOTES=folder: its workers are those of `noting_worker`. PACE=seconds: an iteration takes
at least so long, and nothing else is added to the run, as benchmarks/soak.py wants it.
SIGUSR1 prints where each thread is.
"""

import ast
import faulthandler
import os
import re
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs by its path, from anywhere
signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # as driver.py: an import may drop an exception

import driver
import functions
from machinery import ending, results
from machinery.cluster import tasks
from machinery.storage import terminal
from tests import support

import ray

# Batches are identified where they lie: copies in this process's node would outlive all other nodes.
ray.cloudpickle.register_pickle_by_value(support)  # which no node has
identify = ray.remote(num_cpus=0.1, max_retries=-1)(support.identify)

PATIENT_FROM = 15  # the iteration from which on a lost worker is waited for


def stand_still(moment):
    """Say where the run is, and wait for a line."""
    terminal.say(f"Paused after {moment}")
    sys.stdin.readline()


class Report(results.Report):
    """Says what the object store holds every 20 iterations; goes slowly while a worker is missing."""

    def __init__(self, pauses):
        """Nothing is missing yet; `pauses` are (iteration, phase), or starts of lines."""
        super().__init__()
        self.batches, self.missing, self.pauses, self.now = [], 0, pauses, None

    def say(self, line):
        """Print a line, and count the workers that are missing; stand still if a pause is due."""
        super().say(line)
        of_a_node = re.match(r"node \w+ is lost with (\d+) workers", line)
        self.missing += int(of_a_node[1]) if of_a_node else " is lost (" in line
        self.missing -= " is back: " in line
        for pause in self.pauses:
            if isinstance(pause, str) and line.startswith(pause):
                stand_still(pause)

    def start(self, iteration, batches, mean):
        """Keep the batches."""
        super().start(iteration, batches, mean)
        self.batches, self.now = batches, iteration

    def lap(self, phase):
        """Stand still if a pause is due."""
        super().lap(phase)
        if (self.now, phase) in self.pauses:
            stand_still(f"{phase} of iteration {self.now}")

    def iteration(self, iteration, *numbers):
        """Print a fingerprint of all images every 20 iterations; give a new worker time to come."""
        super().iteration(iteration, *numbers)
        self.now = iteration + 1
        if iteration % 20 == 0:
            found = [identify.remote(batch.images, batch.labels) for batch in self.batches]
            terminal.say(support.fingerprint(ray.get(tasks.wait_for(found, "Fingerprint"))))
        if self.missing and iteration >= PATIENT_FROM:
            time.sleep(3)


class Paced(results.Report):
    """Stands still at the end of an iteration that was quick, so that misfortunes find it at work."""

    def __init__(self, seconds):
        """`seconds` is the least that an iteration takes."""
        super().__init__()
        self.seconds, self.next = seconds, 0

    def iteration(self, iteration, *numbers):
        """Say and draw all as ever, then wait."""
        super().iteration(iteration, *numbers)
        time.sleep(max(0, self.next - time.monotonic()))
        self.next = time.monotonic() + self.seconds
        self.resume()  # the wait is no part of an iteration


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    driver.LAYERS, driver.NUM_CLASSES, driver.ACCURACY_EVERY = support.THIN, 10, 5
    driver.PRECISION, driver.MINI_BATCH = "float32", support.MINI_BATCH  # on any CPU
    settings = [argument for argument in sys.argv[1:] if argument.split("=")[0].isupper()]
    values = {name: ast.literal_eval(value) for name, value in (s.split("=", 1) for s in settings)}
    pauses, pace, notes = (values.pop(name, None) for name in ("PAUSES", "PACE", "NOTES"))
    report = Report(pauses or []) if pace is None else Paced(pace)
    actor = support.noting_worker(Path(notes)) if notes else functions.Worker
    for name, value in values.items():
        setattr(driver, name, value)
    argv = sys.argv[1 + len(settings) :]
    ending.leave(ending.status(lambda: driver.main(argv, report=report, actor=actor)))
