"""Misfortunes: driver.py on several Ray nodes, at random moments struck by all that can happen to it.

    python benchmarks/soak.py --minutes 60 --seed 0 [--precision float32]

A head without CPUs and 3 nodes of 2 workers train the thin network of the tests; data comes from an S3
server through a proxy that spoils answers. When the time is over, an undisturbed run goes to the same
iteration. The soak fails if one bit of the weights differs, if the driver ends by itself or says an
error, or if it stands still. As root, the disks of the checkpoints and of the log fill up, too.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path

from measuring import PRECISIONS, TRAIN, read_flags, small_bucket
from misfortunes import NODES, Disk, Misfortunes, Soaked, Weather, ask

from tests.fault_proxy import fault_proxy
from tests.nodes import Nodes
from tests.support import ROOT, checksums

SETTINGS = {
    "PACE": 0,
    "NUM_WORKERS": 2 * NODES,
    "MINI_BATCH": 4,
    "STORED": "jpeg",  # or the room of each cluster would decide
    "WORKER_TIMEOUT": 10,
    "WORKER_WAIT": 60,
    "TASK_TIMEOUT": 20,
    "CHECKPOINT_EVERY": 5,
    "VALIDATE_EVERY": 25,
    "ACCURACY_EVERY": 5,
}
PACE = 1  # seconds of an iteration that is disturbed, at least
BETWEEN = 3, 15  # seconds between two misfortunes
TICK = 0.3  # seconds between two looks
STILL = 240  # seconds without an iteration after which the driver stands still
END = 60  # seconds in which the driver ends after a signal


class Log:
    """The file that holds what the drivers say and what is done to them; flaws are printed, too."""

    def __init__(self, path):
        """Open it."""
        self._file, self._start, self.flaws = path.open("w", buffering=1), time.monotonic(), 0

    def write(self, line):
        """Add a line, with the seconds since the start."""
        self._file.write(f"{time.monotonic() - self._start:7.1f} {line}\n")

    def flaw(self, what, lines=()):
        """Count and print what must not happen, and the lines before it."""
        self.flaws += 1
        self.write(f"FLAW: {what}")
        seconds = time.monotonic() - self._start
        print(f"FLAW at {seconds:.1f} s: {what}", *lines, sep="\n    ", flush=True)


class Driver:
    """driver.py as a process that goes on again whenever it was ended."""

    def __init__(self, command, environment, output, log):
        """Nothing is started yet; `output` is the path of the file that takes what it says."""
        self._command, self._environment, self._log = command, environment, log
        self._output = output
        self._process, self._reader, self._lines, self._errors = None, None, deque(maxlen=20), []
        self._reads, self._started = False, 0
        self.iterations = self.resumes = 0
        self.moved, self.longest = time.monotonic(), 0

    def runs(self):
        """Whether it runs."""
        return self._process is not None

    def reads(self):
        """Whether it has listed all tars, and has begun to read them."""
        return self.runs() and self._reads

    def trains(self):
        """Whether an iteration has just ended."""
        return self.runs() and time.monotonic() - self.moved < 3 * PACE

    def start(self):
        """Start it, or start it again."""
        self._log.write("the driver starts")
        with self._output.open("ab") as file:
            before = file.tell()
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            self._process = subprocess.Popen(self._command, env=self._environment, **streams)
        self._errors, self._reads, self._started = [], False, time.monotonic()
        follow = ["tail", "-s", "0.1", "-c", f"+{before + 1}", f"--pid={self._process.pid}"]
        tail = subprocess.Popen([*follow, "-f", self._output], stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, args=[tail.stdout])
        self._reader.start()

    def _read(self, output):
        for line in output:
            self._log.write(f"| {line.rstrip()}")
            self._lines.append(line.rstrip())
            if re.match("(error:|Traceback|Exception|Fatal)", line):
                self._errors.append(line)
            self._reads = self._reads or re.match(r"Loading: |Iteration \d", line) is not None
            self.resumes += line.startswith("Resumed from")
            if re.match(r"Iteration \d+: loss", line):
                self.iterations += 1
                now = time.monotonic()
                self.moved, self.longest = now, max(self.longest, now - self.moved)

    def look(self):
        """Notice an end that nobody has asked for, and a run that stands still."""
        if self.runs() and self._process.poll() is not None:
            self._ended("ended by itself", ())
        if self.runs() and time.monotonic() - max(self.moved, self._started) > STILL:
            self._log.flaw(f"no iteration for {STILL} s", self._where())
            self.kill()

    def _where(self):
        """What it said last, after a print of where its threads are."""
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(1)
        return list(self._lines)

    def _ended(self, how, expected):
        status = self._process.wait()
        self._reader.join(10)
        self._process = None
        self._log.write(f"the driver {how}: {status}")
        if status not in expected or self._errors:
            self._log.flaw(f"the driver {how}: status {status}", list(self._lines))

    def kill(self):
        """End it at once; whether there was one."""
        if self.runs():
            self._process.kill()
            self._ended("was killed", [-signal.SIGKILL])
            return True
        return False

    def interrupt(self, signum, others=()):
        """End it by a signal, which it answers by its status; whether there was one.

        `others` are processes that have the signal at the same moment: Ray may end it, too, then.
        """
        if not self.runs():
            return False
        self._log.write(f"# signal {signum} to the driver")
        for process in [self._process, *others]:
            ask(partial(process.send_signal, signum), None)
        try:
            self._process.wait(END)
        except subprocess.TimeoutExpired:
            self._log.flaw(f"no end within {END} s after signal {signum}", self._where())
            return self.kill()
        # Python has not begun to run it, or driver.py still imports what it needs: it ends at once.
        self._ended(f"had signal {signum}", [128 + signum, -signum, *([1] if others else [])])
        return True


def disturb(misfortunes, minutes):
    """Let misfortunes happen for so many minutes, then end them and wait until training goes on.

    Each kind has its turn before one has its second. One that finds no victim waits for it.
    """
    driver, rng, disk = misfortunes.driver, misfortunes.rng, misfortunes.disks["checkpoints"]
    start = time.monotonic()
    end, due, deck, armed = start + 60 * minutes, start + BETWEEN[1], [], []

    def look():
        time.sleep(TICK)
        misfortunes.go_on()
        driver.look()
        if not driver.runs() and not disk.full:  # where it could not even begin
            driver.start()

    while time.monotonic() < end:
        look()
        if time.monotonic() > due:
            due = time.monotonic() + rng.uniform(*BETWEEN)
            deck = deck or rng.sample(list(misfortunes.kinds), len(misfortunes.kinds))
            kind = deck.pop()
            armed += [kind] if kind not in armed else []
        armed = [kind for kind in armed if not misfortunes.strike(kind)]
    misfortunes.log.write("# misfortunes end")
    misfortunes.go_on(everything=True)
    goal = driver.iterations + 3
    while driver.iterations < goal:
        look()
    driver.interrupt(signal.SIGTERM)


def command(folder, flags, **settings):
    """The command line of a driver that saves to a folder."""
    program = [sys.executable, "-u", str(ROOT / "tests" / "thin_driver.py")]
    held_out = ["--val-prefix", f"{TRAIN}n01500007", "--val-label-file", "train.txt"]
    places = ["--checkpoint-dir", f"{folder}/checkpoints", "--log-dir", f"{folder}/curves"]
    constants = [f"{name}={value!r}" for name, value in (SETTINGS | settings).items()]
    return [*program, *constants, *flags, *held_out, *places]


def disturbed(folder, args, flags, log):
    """Train amid misfortunes on two disks; checksums, the last iteration, and the Misfortunes."""
    saved, said, credentials = folder / "disturbed", folder / "said", folder / "credentials"
    os.environ |= {"AWS_ACCESS_KEY_ID": "", "AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
    disks, nodes = {"checkpoints": Disk(saved), "log": Disk(said)}, Soaked()
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        there = {"RAY_ADDRESS": nodes.address, "AWS_ENDPOINT_URL": proxy.url}
        line = command(saved, flags, PRECISION=args.precision, PACE=PACE)
        driver = Driver(line, os.environ | there, said / "driver.log", log)
        proxy.faults = weather = Weather(driver.reads, proxy, credentials)
        rng = random.Random(args.seed)
        misfortunes = Misfortunes(driver, nodes, weather, disks, rng, folder, log)
        try:
            disturb(misfortunes, args.minutes)
            last = max(int(path.stem[5:]) for path in (saved / "checkpoints").glob("ckpt-*.index"))
            return checksums(saved / "checkpoints"), last, misfortunes
        finally:
            driver.kill()
            nodes.close()
            for disk in disks.values():
                disk.unmount()


def undisturbed(folder, args, flags, iterations, log):
    """Checksums of a run to an iteration on one node, which nothing disturbs."""
    saved, nodes = folder / "undisturbed", Nodes(2 * NODES, others=0, cpus=0)
    flags = [*flags, "--iterations", str(iterations)]
    line = command(saved, flags, PRECISION=args.precision, WORKER_TIMEOUT=120, WORKER_WAIT=300)
    environment = os.environ | {"RAY_ADDRESS": nodes.address}
    try:
        ended = subprocess.run(line, env=environment, capture_output=True, text=True)
    finally:
        nodes.close()
    if ended.returncode:
        log.flaw(f"the undisturbed run: status {ended.returncode}", ended.stdout[-2000:].splitlines())
        return None
    return checksums(saved / "checkpoints")


def print_table(misfortunes, equal, iteration):
    """Print what was done, and what came of it."""
    driver, counts = misfortunes.driver, misfortunes.counts
    rows = [(kind, counts[kind]) for kind in misfortunes.kinds]
    rows += [("all misfortunes", counts.total()), ("resumes", driver.resumes)]
    rows += [("longest time without an iteration, s", round(driver.longest))]
    rows += [("last iteration", iteration), ("flaws", misfortunes.log.flaws)]
    rows += [("the weights' bits are equal", "yes" if equal else "NO")]
    for name, value in rows:
        print(f"| {name:38} | {value:>5} |")


def main():
    """Disturb, compare, print; the exit status is 0 where nothing was wrong."""
    args = read_flags(__doc__, minutes=5.0, seed=0, precision=PRECISIONS)
    if args.precision == "bfloat16" and "bf16" not in Path("/proc/cpuinfo").read_text():
        sys.exit("this CPU has no instructions for bfloat16: a step would take minutes")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, a driver would go on after it
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    log = Log(folder / "log")
    print(f"The drivers' lines, and what happens to them: {folder / 'log'}", flush=True)
    with small_bucket() as flags:
        sums, last, misfortunes = disturbed(folder, args, flags, log)
        equal = undisturbed(folder, args, flags, last, log) == sums
    if not all(disk.small for disk in misfortunes.disks.values()):
        print("No disk of its own could be mounted (this takes root): it was never full")
    print_table(misfortunes, equal, last)
    sys.exit(0 if equal and not log.flaws else 1)


if __name__ == "__main__":
    main()
