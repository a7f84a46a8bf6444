"""driver.py with the thin network, as soak.py runs it: NAME=VALUE sets a constant, then come the flags.

PACE=SECONDS has an iteration take at least so long. SIGUSR1 prints where each thread is.
"""

import ast
import faulthandler
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs by its path, from anywhere

import driver
from machinery import ending, results
from tests.support import THIN


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
    driver.LAYERS, driver.NUM_CLASSES = THIN, 10
    settings = [argument for argument in sys.argv[1:] if argument.split("=")[0].isupper()]
    values = {name: ast.literal_eval(value) for name, value in (s.split("=", 1) for s in settings)}
    report = Paced(values.pop("PACE", 0))
    for name, value in values.items():
        setattr(driver, name, value)
    argv = sys.argv[1 + len(settings) :]
    sys.exit(ending.status(lambda: driver.main(argv, report=report)))
