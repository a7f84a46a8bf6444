"""The nodes of the cluster: which are alive, what each one is, and what they have room for."""

import contextlib
import importlib
import math
import os
import platform
import re
import socket
import threading
import time
from collections import Counter, namedtuple
from importlib import metadata
from pathlib import Path

from machinery.errors import ClusterError, one_line, say

import ray
from ray.exceptions import OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER = 20  # seconds in which a healthy cluster answers a short question
CONNECT = 5  # seconds in which a process on a healthy node can be connected to
BETWEEN_LOOKS = 5  # seconds between two questions to the head, while the run waits
FAILURES_IN_A_ROW = 3  # of workers on one node, before it is left alone
RETRY_START = 2  # seconds after which a worker is started again where one failed; longer each time
LEFT_ALONE = 300  # seconds that a node is left alone where workers have failed in a row
WORKER_MEMORY = 10**9  # bytes of a worker: TensorFlow, its weights, a mini-batch (README.md)

# Ray's options by which tasks find our modules where a program has called `ray.init` without them.
modules = {}


class Head:
    """The cluster's head, which knows the nodes. A thread asks it: Ray's own call waits for an answer.

    A head that refuses connections is gone; Ray ends this process a minute after that. A silent one may
    stand still: the run says so once, calls `when_silent`, and goes on with the nodes that it knows.
    """

    def __init__(self):
        self.when_silent = lambda: None
        self._nodes, self._asking, self._since, self._is_silent = [], threading.Thread(), 0, False

    def nodes(self, wait=ANSWER):
        """The nodes that are alive, as Ray describes them. ClusterError if the head is gone.

        Without a `wait`, these are the ones that are known, and the head is asked now and then.
        """
        now = time.monotonic()
        if not self._asking.is_alive() and (wait or now > self._since + BETWEEN_LOOKS):
            self._asking, self._since = threading.Thread(target=self._ask, daemon=True), now
            self._asking.start()
        if wait and not self._is_silent:
            self._asking.join(wait)
        late = self._asking.is_alive() and time.monotonic() > self._since + ANSWER
        gone = late and is_open(ray.get_runtime_context().gcs_address, 1) is False
        if gone or (wait and not self._nodes):
            raise ClusterError(f"the head of the Ray cluster has not answered for {ANSWER} s")
        if late and not self._is_silent:
            say(f"The head of the Ray cluster is silent for {ANSWER} s: the run goes on without it")
            self.when_silent()
        self._is_silent = late
        return self._nodes

    def _ask(self):
        with contextlib.suppress(Exception):  # Ray may have ended meanwhile
            self._nodes = [node for node in ray.nodes() if node["Alive"]]


head = Head()  # of the cluster that this process is on


def is_open(address, seconds=CONNECT):
    """Whether HOST:PORT takes connections; False if it refuses them, None if it is silent or wrong."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
        return True
    except ConnectionRefusedError:
        return False
    except (OSError, OverflowError, ValueError):  # no such port, or no name that a host can have
        return None


def lives(node):
    """Whether a node is alive: Ray itself notices only after some seconds that one has died."""
    found = [alive for alive in head.nodes() if alive["NodeID"] == node]
    return any(is_open(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") for node in found)


def on_node(node):
    """Ray's options for a task or an actor that runs on a node, and nowhere else: a dict."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False), **modules}


def first_line(error):
    """The line of an error's message that says most: the last one of a traceback, else the first."""
    error = getattr(error, "cause", None) or error  # that of a task
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    return lines[-1 if 'File "' in str(error) else 0][:200]


# The model of a node's CPUs, their instructions (a set of words) and the version of TensorFlow there:
# the last bits of a result depend on these. `lacks` says why no task can run there, or is empty.
Place = namedtuple("Place", "cpu instructions tensorflow lacks")

BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # without one of these, a step in it takes minutes
INSTRUCTIONS = re.compile(r"GenuineIntel|(avx|amx|fma|f16c|sse4|asimd|sve|bf16|i8mm)\w*")


@ray.remote(num_cpus=0)
def look_around(module):
    """The Place of the node that this runs on. `module` imports all libraries that tasks need."""
    path, tensorflow, lacks = Path("/proc/cpuinfo"), "", ""
    text = path.read_text() if path.exists() else ""  # what Linux says of the CPUs; others say nothing
    names = "model name", "cpu family", "model", "CPU implementer", "CPU part"
    fields = [re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in names]
    model = " / ".join(field[1] for field in fields if field) or platform.processor()
    try:
        importlib.import_module(module)
        tensorflow = metadata.version("tensorflow")
    except Exception as error:  # a broken library can raise anything
        lacks = one_line(f"{type(error).__name__}: {error}")[:200]
    return Place(model, frozenset(filter(INSTRUCTIONS.fullmatch, text.split())), tensorflow, lacks)


def is_fast_in_bfloat16(place):
    """Whether the CPUs of a Place multiply bfloat16 faster than float32.

    Intel's cores with AVX512_FP16 do so by AMX alone, which a hypervisor may hide: AVX512_BF16 did half
    as much a second as float32 there (benchmarks/README.md).
    """
    has = place.instructions
    return "amx_bf16" in has or ("avx512_bf16" in has and not has >= {"GenuineIntel", "avx512_fp16"})


@ray.remote
class Guard:
    """Takes all CPUs of a node that is left alone, so that Ray starts no other task there."""


class Places:
    """What the nodes are: each one is asked once. Those that lack what tasks need get a Guard."""

    def __init__(self):
        self._module, self._asked, self._guards = "ray", {}, []
        self.known = {}  # node id -> Place
        self.short_of_memory = set()  # ids of nodes of which it was said

    def look(self, there, timeout=0):
        """Ask those of the nodes that are there and new, and take in what comes within `timeout`."""
        there = {node["NodeID"]: node for node in there if node["Resources"].get("CPU")}
        for node in there.keys() - self._asked.keys():
            self._asked[node] = look_around.options(**on_node(node)).remote(self._module)
        asked = {self._asked[node]: node for node in there.keys() - self.known.keys()}
        for ref in ray.wait([*asked], num_returns=len(asked), timeout=timeout)[0]:
            node = asked[ref]
            try:
                place = ray.get(ref)
            except OutOfMemoryError:
                if not self.known:
                    raise
                del self._asked[node]  # it is asked again
                continue
            except RayError as error:  # its process has ended, or the node
                if not lives(node):
                    continue
                place = Place("", frozenset(), "", first_line(error))
            self.known[node] = place
            if place.lacks:
                named = f"node {node[:8]} ({there[node]['NodeManagerAddress']})"
                say(f"{named} is left alone: no task can run there ({place.lacks})")
                cpus, name = there[node]["Resources"]["CPU"], f"guard of {node}"
                guard = Guard.options(num_cpus=cpus, name=name, **on_node(node))
                self._guards.append(guard.remote())

    def usable(self):
        """The nodes on which tasks and workers of this program can run, as Ray describes them."""
        there = head.nodes()
        self.look(there)
        known = [(node, self.known.get(node["NodeID"])) for node in there]
        return [node for node, place in known if place and not place.lacks]

    def first_look(self, module):
        """Wait for what the nodes say, each of which imports a module that imports all that tasks need.

        ClusterError if tasks can run on none of them.
        """
        self._module, there = module, head.nodes()
        self.look(there, timeout=3 * ANSWER)
        for node in there:
            name, address = node["NodeID"], node["NodeManagerAddress"]
            if name in self._asked.keys() - self.known.keys():
                say(f"node {name[:8]} ({address}) does not answer: the run begins without it")
        lacks = [place.lacks for place in self.known.values()]
        if lacks and all(lacks):
            hint = "pip install -r requirements.txt there, with the Python that runs Ray"
            raise ClusterError(f"no task can run on any of {len(lacks)} nodes ({lacks[0]}): {hint}")


places = Places()  # of the cluster that this process is on


def leave():
    """End this process once its node is left alone, if it ever is: Ray runs the task elsewhere.

    Ray lets go of the CPUs of a task that waits, and so the Guard finds all of them free.
    """
    name = f"guard of {ray.get_runtime_context().get_node_id()}"
    for _ in range(3 * ANSWER):
        with contextlib.suppress(ValueError):  # the driver has not noticed yet
            ray.get(ray.get_actor(name).__ray_ready__.remote())
            os._exit(1)
        time.sleep(1)


def fastest_precision(cpus, gpus):
    """The precision for workers of so many CPUs and GPUs: "bfloat16" where all nodes with room for one
    are faster in it, else, and on GPUs, "float32"."""
    fast = [is_fast_in_bfloat16(places.known[node]) for node in room_for_workers(cpus, gpus)]
    return "bfloat16" if fast and all(fast) and not gpus else "float32"


def total(resource):
    """How much of a resource of Ray's, such as "CPU", the nodes have that are alive."""
    return sum(node["Resources"].get(resource, 0) for node in head.nodes())


def room_for_workers(cpus, gpus):
    """How many workers of so many CPUs and GPUs nodes hold, those with room: a dict of id -> number.

    Memory counts, too: the host of a small container may have many CPUs.
    """
    room = {}
    for node in places.usable():
        name, has = node["NodeID"], node["Resources"]
        in_memory = max(1, has.get("memory", math.inf) // WORKER_MEMORY)
        on_gpus = has.get("GPU", 0) // gpus if gpus else math.inf
        otherwise = min(has.get("CPU", 0) // cpus, on_gpus)
        room[name] = int(min(otherwise, in_memory))
        if in_memory < otherwise and name not in places.short_of_memory:
            places.short_of_memory.add(name)
            hint = f"its CPUs are for {otherwise:.0f}; a larger CPUS_PER_WORKER uses them"
            say(f"node {name[:8]} has memory for {in_memory:.0f} workers only, {hint}")
    return {name: number for name, number in room.items() if number}


def room_for_images(mini_batches, one_set, batch):
    """Bytes that the object stores have for images before Ray spills them, beside all else.

    Beside them lie gradients, sums and weights of `one_set` bytes, and two batches of two tasks a CPU.
    """
    used = (mini_batches + 3 * len(head.nodes())) * one_set + 4 * total("CPU") * batch
    return int(0.8 * total("object_store_memory") - used)  # Ray spills a store that is fuller


class Room:
    """Where on the cluster workers start: on the node with the most room, and not where they fail.

    A node on which workers start in vain, or crash, is tried again after a while, and is left alone
    after FAILURES_IN_A_ROW failures, or where memory was short. `here` is the id of the driver's node.
    If workers use bfloat16, and the first nodes have instructions for it, nodes without are left alone.
    """

    def __init__(self, cpus, gpus, here, precision):
        self._share, self._here = (cpus, gpus), here
        self._in_bfloat16 = None if precision == "bfloat16" else False  # None: not known yet
        self._failures, self._next_try = Counter(), Counter()  # node -> failures in a row; a moment
        self.why = ""  # why the last worker that failed has failed

    def places(self, there):
        """Yield nodes for more workers; `there` is a Counter of the nodes of all others."""
        room, now = room_for_workers(*self._share), time.monotonic()
        without = [node for node in room if not places.known[node].instructions & BFLOAT16]
        if self._in_bfloat16 is None and room:
            self._in_bfloat16 = not without
        for node in without if self._in_bfloat16 else []:
            if self._next_try[node] != math.inf:
                why = "its CPU has no instructions for bfloat16, in which this run computes"
                say(f"node {node[:8]} is left alone: {why}")
                self._failures[node], self._next_try[node] = FAILURES_IN_A_ROW, math.inf
        left = {node: room[node] - there[node] for node in room if self._next_try[node] <= now}
        while max(left.values(), default=0) > 0:
            node = max(left, key=lambda node: (left[node], node == self._here))
            left[node] -= 1
            yield node

    def failed(self, node, why, pause=None):
        """A worker has failed on a node that goes on, which may need a pause of so many seconds."""
        self._failures[node] += 1
        self.why = why
        if self._failures[node] % FAILURES_IN_A_ROW == 0:
            pause, times = LEFT_ALONE, f"{self._failures[node]} times in a row"
            say(f"node {node[:8]} is left alone: workers failed there {times} ({why})")
        self._next_try[node] = time.monotonic() + (pause or RETRY_START * self._failures[node])

    def worked(self, node):
        """A worker on a node has done its work."""
        self._failures.pop(node, None)

    def given_up(self):
        """Whether workers have failed too often on every node that has room for one."""
        there = room_for_workers(*self._share)
        return bool(there) and all(self._failures[node] >= FAILURES_IN_A_ROW for node in there)


class Actor:
    """What Helper and Worker have in common: they say how long they have been at work.

    The question has a thread of its own, "health" (see ACTOR). Ray begins a call once its bare
    references are there, and later calls wait with it; so methods take references in lists, and get the
    objects themselves. While they wait for these, they are not at work.
    """

    _since = math.inf  # nothing is at work

    @ray.method(concurrency_group="health")
    def seconds_at_work(self):
        """For how long the method that runs has been at work; 0 if it waits, or if none runs."""
        return max(0.0, time.monotonic() - self._since)

    @contextlib.contextmanager
    def at_work(self):
        """What is done here is work."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = math.inf


ACTOR = {"concurrency_groups": {"health": 1}}  # Ray's options for the class of an Actor


def hangs(actor, seconds):
    """Whether an Actor has been at work for so many seconds, is lost, or does not answer."""
    try:
        return ray.get(actor.seconds_at_work.remote(), timeout=ANSWER) > seconds
    except RayError:
        return True
