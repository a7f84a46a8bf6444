"""What soak.py does to a run: a cluster whose nodes die, an S3 server and a disk that fail, signals."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import ray  # noqa: F401, it brings psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for whoever imports the tests' helpers

from tests.nodes import Nodes, raylet_of, tree
from tests.support import free_port, title

import psutil

NODES = 3  # healthy ones; each holds two workers
MEMORY = 3 * 2**30  # bytes that are eaten at most
DISK = "size=16m"  # of the checkpoints

# What Ray's processes call themselves.
WORKER, HELPER = r"ray::Worker\b", r"ray::Helper\b"
DATA = "ray::(s3://|convert|drop_unlabelled|shuffle_pair|sum_images|add$)"

EATER = """
import time
eaten = []
while True:
    eaten.append(bytearray(b"x") * (32 * 2**20))
    time.sleep(0.1 if 32 * 2**20 * len(eaten) < {} else 1000)
"""


def ask(question, gone):
    """What a call of psutil answers, or `gone`: a process may have ended at any time."""
    try:
        return question()
    except psutil.Error:
        return gone


class Soaked(Nodes):
    """The cluster: a head without CPUs, three healthy nodes, and others for a while."""

    def __init__(self):
        """Start all healthy nodes."""
        super().__init__(0, others=NODES, cpus=2, dashboard_port=free_port())
        self.healthy = list(self.others)

    def end(self, node):
        """Kill a node, which may be a healthy one."""
        self.healthy = [other for other in self.healthy if other is not node]
        self.kill(self.others.index(node))

    def processes(self, pattern, nodes=None):
        """The processes with such titles that are not stopped, on some nodes or on all."""
        nodes = nodes or self.cluster.list_all_nodes()
        below = [process for node in nodes for process in tree(raylet_of(node))]
        return [
            process
            for process in below
            if re.match(pattern, title(process))
            and ask(process.status, psutil.STATUS_STOPPED) != psutil.STATUS_STOPPED
        ]


class Weather:
    """What S3 does to the requests of the next seconds: it takes the place of FaultProxy.faults."""

    def __init__(self, reads):
        """All goes well; `reads` says whether the driver has begun to read tars.

        Before, its own few requests end it soon with a line, as its README says.
        """
        self._reads, self._fault, self._seconds, self._end = reads, None, 0, None

    def turn(self, fault, seconds):
        """From the next request on, have a fault happen to all of them for so many seconds.

        Returns whether one has had it; only then another fault has its turn.
        """
        if not self._fault:
            self._seconds, self._end, self._fault = seconds, None, fault
        if self._fault != fault or not self._end:
            return False
        if time.monotonic() > self._end:
            self._fault = None
        return self._fault is None

    def stall(self):
        """Hold an answer back until the bad weather is over."""
        time.sleep(max(0, self._end - time.monotonic()))

    def get(self, request, default):
        """What happens to a request, in the form that FaultProxy reads."""
        if not self._fault or not self._reads():
            return default
        self._end = self._end or time.monotonic() + self._seconds
        return default if time.monotonic() > self._end else iter([self._fault])


class Disk:
    """The disk that the driver saves to: small, of memory, if this is root; it can be full."""

    def __init__(self, folder):
        """Mount it on a folder."""
        self.folder, self._filler, self.full = folder, folder / "filler", False
        command = ["mount", "-t", "tmpfs", "-o", DISK, "soak", str(folder)]
        self.small = subprocess.run(command, capture_output=True).returncode == 0

    def fill(self):
        """Leave no room on it."""
        self.full = True
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    def free(self):
        """Make room again."""
        self._filler.unlink(missing_ok=True)
        self.full = False

    def unmount(self):
        """Take it away."""
        if self.small:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


class Misfortunes:
    """All that is done to a run. A method of the table `kinds` says whether it has found a victim."""

    def __init__(self, driver, nodes, weather, disk, rng, folder, log):
        """Know the run's parts; `folder` is for files."""
        self.driver, self.nodes, self.disk, self.rng, self.log = driver, nodes, disk, rng, log
        self.counts, self._later, self._bad_image = Counter(), [], folder / "bad-image"
        self._bad_image.mkdir()
        (self._bad_image / "tensorflow.py").write_text("raise ImportError('a broken image')")
        hit, kill, stop = self._hit, signal.SIGKILL, signal.SIGSTOP
        self.kinds = {
            "node dies, another comes": self.node_dies,
            "late node, which leaves again": self.late_node,
            "bad node, where no worker starts": self.bad_node,
            "memory of a node runs out": self.memory,
            "worker killed": partial(hit, WORKER, kill),
            "helper killed": partial(hit, HELPER, kill),
            "data task killed": partial(hit, DATA, kill),
            "worker stopped": partial(hit, WORKER, stop),
            "helper stopped": partial(hit, HELPER, stop),
            "driver killed": driver.kill,
            "driver interrupted": self.interrupt,
            "S3 stands still for 15 s": partial(weather.turn, weather.stall, 15),
            "S3 answers 503 for 5 s": partial(weather.turn, "503", 5),
            "S3 resets connections for 5 s": partial(weather.turn, "reset", 5),
        }
        if disk.small:
            self.kinds["disk full for 15 s"] = self.full_disk

    def strike(self, kind):
        """Do a kind of misfortune; whether it has found a victim."""
        struck = self.kinds[kind]()
        if struck:
            self.log.write(f"# {kind}")
            self.counts[kind] += 1
        return struck

    def go_on(self, everything=False):
        """Do what misfortunes have left for later and is due, or do all of it."""
        while self._later and (everything or self._later[0][0] < time.monotonic()):
            self._later.pop(0)[1]()

    def _after(self, seconds, function, *arguments):
        self._later.append((time.monotonic() + seconds, partial(function, *arguments)))
        self._later.sort(key=lambda moment: moment[0])

    def _hit(self, pattern, signum):
        victims = self.nodes.processes(pattern)
        if victims:
            victim = self.rng.choice(victims)
            self.log.write(f"# signal {signum} to {victim.pid}, {title(victim)}")
            return ask(lambda: victim.send_signal(signum) is None, False)
        return False

    def _replaced(self, **options):
        """The node that comes in the place of a healthy one, which dies; None while one is missing."""
        if len(self.nodes.healthy) < NODES:
            return None
        self.nodes.end(self.rng.choice(self.nodes.healthy))
        return self.nodes.add(**options)

    def _make_good(self, node):
        """Put a healthy node in the place of one that is not."""
        self.nodes.end(node)
        self.nodes.healthy.append(self.nodes.add())

    def node_dies(self):
        """A healthy node is there no more, with all that runs and lies on it."""
        node = self._replaced()
        self.nodes.healthy += [node] if node else []
        return node is not None

    def late_node(self):
        """One node more comes and leaves."""
        self._after(self.rng.uniform(5, 25), self.nodes.end, self.nodes.add())
        return True

    def bad_node(self):
        """The node that comes in another's place has an image in which no worker can start."""
        if node := self._replaced(env_vars={"PYTHONPATH": str(self._bad_image)}):
            self._after(25, self._make_good, node)
        return node is not None

    def memory(self):
        """The node that comes in another's place has little memory, and something eats it."""
        now = psutil.virtual_memory()
        threshold = (now.total - now.available + MEMORY // 2) / now.total
        if node := self._replaced(env_vars={"RAY_memory_usage_threshold": f"{threshold:.3f}"}):
            self._after(20, self._eat, node)
        return node is not None

    def _eat(self, node, tries=8):
        before = self.nodes.processes(WORKER, [node])
        if not before and tries:
            self._after(5, self._eat, node, tries - 1)
            return
        eater = subprocess.Popen([sys.executable, "-c", EATER.format(MEMORY)])
        self._after(15, self._end_eater, eater, node, before)

    def _end_eater(self, eater, node, before):
        eater.kill()
        eater.wait()
        ended = sum(not process.is_running() for process in before)
        self.log.write(f"# memory: {ended} of {len(before)} processes were ended")
        if not ended:
            self.counts["memory of a node runs out"] -= 1
        self._after(5, self._make_good, node)

    def interrupt(self):
        """The driver is asked to end."""
        return self.driver.interrupt(self.rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))

    def full_disk(self):
        """Nothing can be saved for a while."""
        if not self.driver.trains() or self.disk.full:
            return False
        self.disk.fill()
        self._after(15, self.disk.free)
        return True
