"""Tasks on data: how they start, how they end themselves, and the one way to wait."""

import contextlib
import faulthandler
import logging
import math
import tempfile
import time
from pathlib import Path

from machinery.cluster import nodes
from machinery.errors import InputError

import ray

say = logging.getLogger("driver").info

# An actor holds its CPUs for life. A worker asks for two slices less than it uses, and a data task asks
# for one slice, so that data tasks always find room beside workers: to rebuild a lost block, too.
CPU_SLICE = 0.05
TASK_MEMORY = 10**9  # bytes of a data task: two batches of tars.PART.images as pixels, and Python
MAX_STARTS = 5  # of a task on one node, in each of which it has ended its process
LONGEST = 10**8  # seconds, three years, that the standard library can count down from
PATIENCE = 30  # seconds of waiting after which the run says what it waits for, and again
TICK = 0.2  # seconds of one wait in Ray, which looks for signals only once a second

_limits = {"seconds": math.inf, "options": {}}  # of each task, see `limit`


def limit(seconds):
    """From here on, a task may take so many seconds, and two run on a CPU at most."""
    there = [node["Resources"] for node in nodes.head.nodes()]
    sizes = [(node["memory"], node["CPU"]) for node in there if node.get("CPU") and node.get("memory")]
    sizes = sizes or [(2 * TASK_MEMORY, 1)]  # no such node is there yet
    share, largest = min(memory / cpus / 2 for memory, cpus in sizes), max(sizes)[0]
    _limits["options"] = {"memory": int(min(max(TASK_MEMORY, share), largest)), "num_cpus": CPU_SLICE}
    _limits["seconds"] = seconds


def start(function, *arguments, name=None, **options):
    """Start a task on data that calls a function of a module; its reference, or references.

    Ray runs it again if its process or its node dies, and to rebuild what it has made, as often as that
    happens: no bound of Ray's tells these from a task that itself ends its process, see `run`. `name`
    names the task, if the function's name does not say enough; `options` are more of Ray's.
    """
    name = name or function.__name__
    options = {"name": name, "max_retries": -1} | _limits["options"] | nodes.modules | options
    return run.options(**options).remote(name, _limits["seconds"], function, *arguments)


@ray.remote
def run(name, seconds, function, *arguments):
    """What a task does: it calls a function, and ends its process if that takes too long.

    The stack is in the node's log then. InputError if the task has ended MAX_STARTS processes here.
    """
    context = ray.get_runtime_context()
    unique = f"ray-task-{context.get_node_id()}-{context.get_task_id()}"
    starts, before = Path(tempfile.gettempdir()) / unique, 0
    with contextlib.suppress(OSError), starts.open("ab") as file:  # on a full disk, nothing is counted
        before = file.tell()
        file.write(b".")
    faulthandler.dump_traceback_later(min(seconds, LONGEST), exit=True)
    try:
        if before >= MAX_STARTS:
            why = "too little memory, data on which it crashes, or too slow a node"
            raise InputError(f"{name}: this task has ended {before} processes ({why})")
        return function(*arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            starts.unlink()


class Waiting:
    """A wait for `what()`: says so every PATIENCE seconds, and looks whether the head is there."""

    def __init__(self, what):
        self._what, self._since, self._said = what, time.monotonic(), time.monotonic()
        self._stalls = 0

    def some(self, refs):
        """Those of a list of references that are there, after TICK seconds at most; maybe none."""
        done, _ = ray.wait(refs, timeout=TICK, fetch_local=False)
        now = time.monotonic()
        if done:  # all that have ended are taken: a look at each in turn would be quadratic
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0.001, fetch_local=False)
            self._since = self._said = now
        elif now > self._said + PATIENCE:
            self._said = now
            late = f", for {now - self._since:.0f} s" if now > self._since + _limits["seconds"] else ""
            say(f"{self._what()}{late}")
        nodes.head.look()
        return done

    def stalls(self, seconds):
        """Whether nothing has come for so many seconds; at the n-th stall, for n times as many."""
        stalls = time.monotonic() - self._since > (self._stalls + 1) * seconds
        self._stalls += stalls
        return stalls


def wait(refs, what):
    """Yield the references of a set as their objects come, and take them out of it.

    The loop over them may add others. `what` is a function that tells what is awaited.
    """
    waiting = Waiting(what)
    while refs:
        for ref in waiting.some(list(refs)):
            refs.discard(ref)
            yield ref


def wait_for(refs, what):
    """Wait until all objects are there; says how many are. Returns `refs`."""
    left = set(refs)
    for _ in wait(left, lambda: f"{what}: {len(refs) - len(left)} of {len(refs)} tasks are done"):
        pass
    return refs
