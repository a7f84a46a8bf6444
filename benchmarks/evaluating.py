"""A checkpoint of the full network, evaluated: the same figure as in training, and how long it takes.

    python benchmarks/evaluating.py FOLDER [--iterations 20] [--repeats 3]

FOLDER is laid out like the bucket, with a held-out set, as for learning.py. driver.py trains for some
iterations and validates; then the same checkpoint is evaluated again and again. Both are run
as a user runs them, as processes of their own. Prints the seconds of the whole command, and those of
the validation alone: in training, from the line of the last iteration to its own.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measuring
from learning import TRAIN, VAL, serve_folder
from measuring import spread, verdict

import numpy as np

DRIVER = Path(__file__).resolve().parent.parent / "driver.py"


def run(bucket, iterations, folder):
    """Seconds to the end of the first iteration (None if there is none), of the validation, of all; its
    lines."""
    command = [sys.executable, "-u", str(DRIVER), "--s3-bucket", bucket]
    command += ["--key-prefix", TRAIN[0], "--label-file", TRAIN[1]]
    command += ["--val-prefix", VAL[0], "--val-label-file", VAL[1]]
    command += ["--iterations", str(iterations), "--checkpoint-dir", folder]
    start, first, before, validation, lines = time.monotonic(), None, 0, 0, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            now = time.monotonic() - start
            if line.startswith("Iteration 0: loss"):
                first = now
            if "validation top-1" in line:
                validation = now - before
            before = now
            lines.append(line.rstrip())
    if process.returncode:
        sys.exit("\n".join(lines))
    return first, validation, time.monotonic() - start, lines


def figures(lines):
    """The lines of validations."""
    return [line for line in lines if re.match(r"Iteration \d+ .*validation", line)]


def main():
    """Train, evaluate, and print."""
    parser = argparse.ArgumentParser(description="Measure the evaluation of a checkpoint.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with measuring.loopback() as s3, tempfile.TemporaryDirectory() as saved:
        del os.environ["RAY_ADDRESS"]  # driver.py starts a Ray of its own
        bucket = serve_folder(s3, args.folder)
        loading, validation, _, lines = run(bucket, args.iterations, saved)
        trained = figures(lines)[-1]
        evaluated = [run(bucket, args.iterations, saved)[2:] for _ in range(args.repeats)]
    print(f"trained:   {trained}")
    for _, lines in evaluated:
        print(f"evaluated: {figures(lines)[-1]}")
    same = all(figures(lines) == [trained] for _, lines in evaluated)
    print(f"The figures are {'the same' if same else 'NOT the same'}")
    whole = np.array([seconds for seconds, _ in evaluated])
    print(f"training, to the end of its first iteration, s: {loading:.1f}; validation {validation:.1f}")
    print(f"evaluation, s: {spread(whole, '.1f')}")
    rest = whole - validation
    print(f"besides validating, s: {spread(rest, '.1f')}, target 15: {verdict(rest, '<= 15')}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
