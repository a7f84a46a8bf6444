"""The main job on one machine: an S3 server on loopback, a small ImageNet-shaped data set, driver.py.

    python demo.py

Draws JPEGs of ten classes that can be learned, puts them into a bucket as class tars with a label
file, runs driver.py unchanged and checks that it has learned. Leaves nothing running.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support import fill_bucket, s3_client, s3_server

import numpy as np

HERE = Path(__file__).resolve().parent

NUM_CLASSES = 10
CHANCE = 1 / NUM_CLASSES
IMAGES_PER_CLASS = 60
ITERATIONS = 71  # accuracies at 0, 10, ..., 70


def main():
    """Run the demo; returns the exit status, 1 if nothing was learned."""
    with s3_server() as environment:
        print(f"Drawing {NUM_CLASSES * IMAGES_PER_CLASS} images of {NUM_CLASSES} classes", flush=True)
        fill_bucket(s3_client(environment), "demo", IMAGES_PER_CLASS, NUM_CLASSES)
        command = [sys.executable, str(HERE / "driver.py"), "--s3-bucket", "demo"]
        command += ["--iterations", str(ITERATIONS)]
        print("$", "python driver.py", *command[2:], flush=True)
        # Without RAY_ADDRESS, driver.py starts a Ray of its own (or joins the one running here).
        pipe = {"stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        driver = subprocess.Popen(command, env=os.environ | environment, **pipe)
        accuracies = []
        for line in driver.stdout:
            print(line, end="", flush=True)
            if match := re.search(r"accuracy = ([\d.]+)%", line):
                accuracies.append(float(match[1]) / 100)
        if driver.wait() != 0:
            return driver.returncode
    last = np.mean(accuracies[-3:])
    learned = last >= 5 * CHANCE
    needed = f"chance is {CHANCE:.0%}, 5 times that is needed"
    print(f"The last three accuracies average {last:.1%}; {needed}")
    print("The demo has learned" if learned else "The demo has NOT learned")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
