"""Tasks on data: how they start, how they end themselves, and the one way to wait."""

import contextlib
import faulthandler
import math
import tempfile
import time
from pathlib import Path

from machinery.cluster import nodes
from machinery.errors import ClusterError, InputError, say

import ray
from ray import cloudpickle

# A worker holds its CPUs for life but a tenth of one, and a data task asks for much less: so data tasks
# always find room beside workers, and leave room for new ones. Memory bounds how many run at once.
CPU_SLICE = 0.002
TASK_MEMORY = 9 * 10**8  # bytes of a data task: two batches of tars.PART.images as pixels, and Python
MAX_STARTS = 5  # of a task on one node, in each of which it has ended its process
LONGEST = 10**8  # seconds, three years, that the standard library can count down from
PATIENCE = 30  # seconds of waiting after which the run says what it waits for, and again
TICK = 0.2  # seconds of one wait in Ray, which looks for signals only once a second

# Seconds, which driver.py sets, of a task, of a wait for a worker or a node, and of an actor at work.
limits = {"task": math.inf, "wait": math.inf, "work": math.inf}


def start(function, *arguments, name=None, **options):
    """Start a task on data that calls a function of a module; its reference, or references.

    Ray runs it again, without a bound, if its process or its node dies, and to rebuild what it has
    made. References among the arguments must come first. The task has the function's name, or `name`.
    """
    refs = [value for value in arguments if isinstance(value, ray.ObjectRef)]
    call = cloudpickle.dumps((function, arguments[len(refs) :]))
    name = name or function.__name__
    options = {"name": name, "memory": TASK_MEMORY, "num_cpus": CPU_SLICE} | nodes.modules | options
    return run.options(**options).remote(name, limits["task"], call, *refs)


@ray.remote(max_retries=-1)
def run(name, seconds, call, *objects):
    """What a task does: it calls a function, and ends its process if that takes too long.

    The stack is in the node's log then. InputError if the task has ended MAX_STARTS processes here.
    `call` is a pickle of the function and its arguments after `objects`. It is unpickled here: a task
    that Ray cannot unpickle, as on a node without our libraries, it does not run again.
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
        try:
            function, values = cloudpickle.loads(call)
        except Exception:  # a broken library can raise anything
            nodes.leave()
            raise
        return function(*objects, *values)
    finally:
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            starts.unlink()


class Waiting:
    """A wait for `what()`: says so every PATIENCE seconds, and looks whether the head is there.

    It calls `stalled` when nothing has come for as long as an actor may be at work, twice as long, ...
    """

    def __init__(self, what, stalled=lambda: None):
        self._what, self._stalled = what, stalled
        self._since = self._said = time.monotonic()
        self._stalls = 1

    def some(self, refs):
        """Those of a list of references that are there, after TICK seconds at most; maybe none."""
        done, _ = ray.wait(refs, timeout=TICK, fetch_local=False)
        now = time.monotonic()
        if done:  # all that have ended are taken: a look at each in turn would be quadratic
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0.001, fetch_local=False)
            self._since = self._said = now
        elif now > self._said + PATIENCE:
            since = now - self._since
            late = f", for {since:.0f} s" if since > limits["task"] else ""
            lacking = lacking_for_tasks()
            if lacking and since > limits["wait"]:
                raise ClusterError(f"{self._what()}, in vain: {lacking}")
            self._said = now
            say(f"{self._what()}{late}{lacking and ': '}{lacking}")
        if not done and now > self._since + self._stalls * limits["work"]:
            self._stalls += 1
            self._stalled()
        nodes.places.look(nodes.head.nodes(wait=0))
        return done


def lacking_for_tasks():
    """What is missing if no node can run a task on data; empty if one can."""
    there = [node["Resources"].get("memory", 0) for node in nodes.places.usable()]
    if there and max(there) < TASK_MEMORY:
        least, most = TASK_MEMORY / 1e9, max(there) / 1e9
        return f"a task needs {least:.1f} GB of memory, and no node gives Ray more than {most:.1f}"
    return "" if there else "there is no node on which a task can run"


def wait(refs, what, *stalled):
    """Yield the references of a set as their objects come, and take them out of it.

    The loop over them may add others. `what` is a function that tells what is awaited; see Waiting.
    """
    waiting = Waiting(what, *stalled)
    while refs:
        for ref in waiting.some(list(refs)):
            refs.discard(ref)
            yield ref


def wait_for(refs, what, *stalled):
    """Wait until all objects are there; says how many are. Returns `refs`."""
    left, count = set(refs), len(refs)
    for _ in wait(left, lambda: f"{what}: {count - len(left)} of {count} tasks are done", *stalled):
        pass
    return refs
