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

from tests.nodes import Nodes, memory_monitor, raylet_of, tree, use_memory_until
from tests.support import free_port, title

import psutil

NODES = 3  # healthy ones; each holds two workers
LITTLE_MEMORY = 3 * 10**9  # bytes that Ray knows of on a small node
HEAD_PAUSE = 40  # seconds
DISK = "size=16m"  # of the checkpoints, and of the log
LIBRARIES = "simplejpeg", "cv2", "PIL", "boto3"  # that data needs

# What Ray's processes call themselves.
WORKER, HELPER = r"ray::Worker\b", r"ray::Helper\b"
DATA = "ray::(s3://|convert|drop_unlabelled|shuffle_pair|sum_images|add$)"


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
        self._ports = {"gcs_server_port": free_port(), "dashboard_port": free_port()}
        self._begin()

    def _begin(self):
        super().__init__(0, others=NODES, cpus=2, **self._ports)
        self.healthy = list(self.others)

    def begin_again(self):
        """End what is left of the cluster, and start another one at the same address."""
        self.close()
        self._begin()

    def end(self, node):
        """Kill a node, which may be a healthy one."""
        self.healthy = [other for other in self.healthy if other is not node]
        self.kill(self.others.index(node))

    def all(self, nodes=None):
        """The processes of some nodes or of all."""
        nodes = nodes or self.cluster.list_all_nodes()
        return [process for node in nodes for process in tree(raylet_of(node))]

    def processes(self, pattern, nodes=None):
        """Those with such titles that are not stopped."""
        return [
            process
            for process in self.all(nodes)
            if re.match(pattern, title(process))
            and ask(process.status, psutil.STATUS_STOPPED) != psutil.STATUS_STOPPED
        ]


class Weather:
    """What S3 does to the requests of the next seconds: it takes the place of FaultProxy.faults."""

    def __init__(self, reads, proxy, credentials):
        """All goes well at a FaultProxy; `reads` says whether the driver has begun to read tars.

        Before, its own few requests end it soon with a line, as its README says. `credentials` is the
        path of the file that all processes have theirs from.
        """
        self._reads, self._fault, self._seconds, self._end = reads, None, 0, None
        self._proxy, self._credentials, self._rotations = proxy, credentials, 0
        self.rotate()

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

    def rotate(self):
        """Put new credentials into the file; those before have expired."""
        self._rotations += 1
        access_key, new = f"soak{self._rotations}", self._credentials.with_suffix(".new")
        new.write_text(f"[default]\naws_access_key_id={access_key}\naws_secret_access_key=x\n")
        new.replace(self._credentials)
        self._proxy.access_keys = [access_key]
        return True

    def get(self, request, default):
        """What happens to a request, in the form that FaultProxy reads."""
        if not self._fault or not self._reads():
            return default
        self._end = self._end or time.monotonic() + self._seconds
        return default if time.monotonic() > self._end else iter([self._fault])


class Disk:
    """A disk that the driver writes to: small, of memory, if this is root; it can be full."""

    def __init__(self, folder):
        """Mount it on a folder, which is made."""
        folder.mkdir()
        self.folder, self._filler, self.full = folder, folder / "filler", False
        command = ["mount", "-t", "tmpfs", "-o", DISK, "soak", str(folder)]
        self.small = subprocess.run(command, capture_output=True).returncode == 0

    def fill(self):
        """Leave no room on it, nor in the last block of a log."""
        self.full = True
        for path in [self._filler, *self.folder.glob("*.log")]:
            with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
                while True:
                    file.write(b" " * 4096)

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

    def __init__(self, driver, nodes, weather, disks, rng, folder, log):
        """Know the run's parts; `disks` are by what is on them, and `folder` is for files."""
        self.driver, self.nodes, self.disks, self.rng, self.log = driver, nodes, disks, rng, log
        self.counts, self._later, self._folder = Counter(), [], folder
        hit, kill, stop = self._hit, signal.SIGKILL, signal.SIGSTOP
        self.kinds = {
            "node dies, another comes": self.node_dies,
            "late node, which leaves again": self.late_node,
            "bad node, where no worker starts": partial(self.bad_node, ["tensorflow"]),
            "bad node, where no data is read": partial(self.bad_node, LIBRARIES),
            "small node in another's place": partial(self.node_dies, memory=LITTLE_MEMORY),
            "memory of a node runs out": self.memory,
            "worker killed": partial(hit, WORKER, kill),
            "helper killed": partial(hit, HELPER, kill),
            "data task killed": partial(hit, DATA, kill),
            "worker stopped": partial(hit, WORKER, stop),
            "helper stopped": partial(hit, HELPER, stop),
            "driver killed": driver.kill,
            "driver interrupted": self.interrupt,
            "all processes ended at once": self.all_end,
            f"head stands still for {HEAD_PAUSE} s": self.head_pauses,
            "S3 stands still for 15 s": partial(weather.turn, weather.stall, 15),
            "S3 answers 503 for 5 s": partial(weather.turn, "503", 5),
            "S3 resets connections for 5 s": partial(weather.turn, "reset", 5),
            "credentials of S3 rotated": weather.rotate,
        }
        for name, disk in disks.items():
            if disk.small:
                self.kinds[f"disk of {name} full for 15 s"] = partial(self.full_disk, disk)

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

    def node_dies(self, **options):
        """A healthy node dies, with all that lies on it; `options` are those of the one that comes."""
        node = self._replaced(**options)
        self.nodes.healthy += [node] if node else []
        return node is not None

    def late_node(self):
        """One node more comes and leaves."""
        self._after(self.rng.uniform(5, 25), self.nodes.end, self.nodes.add())
        return True

    def bad_node(self, libraries):
        """The node that comes in another's place has an image in which a library is broken."""
        if len(self.nodes.healthy) < NODES:
            return False
        library = self.rng.choice(libraries)
        image = self._folder / f"broken-{library}"
        image.mkdir(exist_ok=True)
        (image / f"{library}.py").write_text(f"raise ImportError('a broken {library}')")
        self.log.write(f"# a node with a broken {library}")
        node = self._replaced(env_vars={"PYTHONPATH": str(image)})
        self._after(25, self._make_good, node)
        return True

    def memory(self):
        """The node that comes in another's place has little memory, and something uses it."""
        if node := self._replaced(env_vars=memory_monitor()):
            self._after(20, self._use_memory, node)
        return node is not None

    def _use_memory(self, node, tries=8):
        workers = self.nodes.processes(WORKER, [node])
        if not workers and tries:
            self._after(5, self._use_memory, node, tries - 1)
            return
        try:
            use_memory_until(lambda: not all(worker.is_running() for worker in workers))
        except AssertionError:  # none was ended
            self.counts["memory of a node runs out"] -= 1
        self._after(5, self._make_good, node)

    def interrupt(self):
        """The driver is asked to end."""
        return self.driver.interrupt(self.rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))

    def all_end(self):
        """All processes of the run are asked to end at once, as systemd does; then all comes again."""
        left = [moment[1].func for moment in self._later]
        if not self.driver.trains() or self._use_memory in left:
            return False
        of_nodes = self.nodes.end, self._make_good
        self._later = [moment for moment in self._later if moment[1].func not in of_nodes]
        processes = [self.nodes.head(), *self.nodes.all()]
        self.driver.interrupt(signal.SIGTERM, processes)
        for process in processes:
            ask(process.kill, None)
        self.nodes.begin_again()
        return True

    def head_pauses(self):
        """The head answers nobody for a while, in which nothing else is done."""
        if not self.driver.trains():
            return False
        self.log.write("# the head stands still")
        head = self.nodes.head()
        head.suspend()
        time.sleep(HEAD_PAUSE)
        head.resume()
        return True

    def full_disk(self, disk):
        """A disk takes no more for a while."""
        if not self.driver.trains() or disk.full:
            return False
        disk.fill()
        self._after(15, disk.free)
        return True
