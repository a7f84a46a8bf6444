"""What hangs and what goes on: which data tasks run, and what Ray's processes on a node are at."""

import contextlib
import os
import signal
import threading
import time
from collections import Counter, namedtuple
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import ray
from ray._private.state import state
from ray.core.generated import common_pb2, gcs_pb2

from s3 import InputError

ANSWER = 20  # seconds in which a healthy cluster answers a short question

MAX_SHORT = 3  # a wait is in vain if so many looks in a row find that MANY processes have been ended

MANY = 3  # processes between two looks; fewer can come from a single task that is too large

MAX_ENDED = 5  # processes that a data task may end before it is given up, also those of its hangs


@contextlib.contextmanager
def silent_stderr():
    """Drop for a while what comes to file descriptor 2: C++ libraries write there at any log level."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def within(seconds, function):
    """What a function returns, in a list, which is empty if it raises something or takes longer.

    Some of Ray's calls wait for its head, and end the process after a minute without a word.
    """
    answer = []

    def call():
        with contextlib.suppress(Exception):  # Ray may have ended meanwhile
            answer.append(function())

    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(seconds)
    return answer


def as_they_end(jobs):
    """Yield each of a set of futures once it has ended.

    A signal that comes just before a wait without an end, as in `as_completed`, is heard only after it.
    """
    while jobs:
        ended, jobs = wait(jobs, timeout=1, return_when=FIRST_COMPLETED)
        yield from ended


def process_state(pid):
    """The title of a process, by which Ray says what it does, whether it is stopped, and the id of its
    parent; "", False, 0 if it is gone."""
    try:
        process = Path("/proc") / str(pid)
        title, stat = (process / "cmdline").read_text(), (process / "stat").read_text()
    except OSError:
        return "", False, 0
    state, parent, *_ = stat.rpartition(")")[2].split()
    return title.split("\0")[0], state in "Tt", int(parent)


def waits(pid):
    """Whether an actor's process is there, not stopped, and waits for a call or its arguments.

    Ray puts the method that it is in into the title, once the arguments are there.
    """
    title, stopped, _ = process_state(pid)
    return bool(title) and "." not in title and not stopped


def end_process(pid, task):
    """End the process in which a data task is; False if the task is not in it any more."""
    title, *_ = process_state(pid)
    if title != f"ray::{task}":
        return False
    os.kill(pid, signal.SIGKILL)
    return True


def end_stopped(tasks):
    """End the processes of this node that are stopped, idle ones and those of data tasks.

    `tasks` are the tasks' names. A Watch does not know of a task that was given to an idle process that
    is stopped, or that was stopped before it could say that it begins. Returns the titles. What another
    Ray on this machine has started is left alone: all processes of a node have one parent.
    """
    ended, titles = [], {f"ray::{name}" for name in ("IDLE", *tasks)}
    for process in Path("/proc").glob("[0-9]*"):
        title, stopped, parent = process_state(process.name)
        if stopped and title in titles and parent == os.getppid():
            os.kill(int(process.name), signal.SIGKILL)
            ended.append(title)
    return ended


def ended_for_memory():
    """How many processes of this job Ray's memory monitor has ended so far; None if nobody knows."""
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    # Without a dashboard, Ray tells it nowhere else.
    tables = within(ANSWER, lambda: state._connect_and_get_accessor().get_worker_table())
    if not tables:
        return None
    rows = [gcs_pb2.WorkerTableData.FromString(row) for row in tables[0]]
    short = common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY
    return sum(row.exit_type == short and row.job_id == job for row in rows)


class Wait:
    """A wait for data tasks: says what for, and ends if none gets through because memory is short."""

    def __init__(self, say):
        """Begin to wait; `say` takes a line."""
        self._say, self._ended, self._in_vain = say, ended_for_memory() or 0, 0

    def goes_on(self):
        """Note that a task has got through."""
        self._in_vain = 0

    def is_long(self, what):
        """Say what is waited for; InputError if memory is so short that waiting is in vain."""
        ended = ended_for_memory() or self._ended
        new, self._ended = ended - self._ended, ended
        short = f"; memory is short: Ray has ended {new} processes meanwhile" if new else ""
        self._say(f"{what}{short}")
        self._in_vain = self._in_vain + 1 if new >= MANY else 0
        if self._in_vain == MAX_SHORT:
            hint = "free memory on the nodes, or add nodes"
            raise InputError(f"{what}, and Ray ends every process because memory is short: {hint}")


# A data task that runs: its name, the ids of its node and process, and since when.
Begun = namedtuple("Begun", "name node pid since")


@ray.remote(num_cpus=0, memory=1, max_restarts=-1, max_task_retries=-1)  # memory: see Helper
class Watch:
    """Knows which data tasks run, and how often each has ended its process.

    One that Ray has restarted has forgotten both.
    """

    def __init__(self):
        """No task has begun."""
        self._running, self._ended = {}, Counter()

    def begin(self, task, name, node, pid):
        """A task begins. Returns how many processes it has ended so far, on nodes that are alive."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if task in self._running and self._running[task].node in alive:
            self._ended[task] += 1
        self._running[task] = Begun(name, node, pid, time.monotonic())
        return self._ended[task]

    def end(self, task):
        """A task has ended, and its process goes on."""
        self._running.pop(task, None)
        self._ended.pop(task, None)

    def late(self, seconds):
        """The tasks that began longer ago; each is told once in so many seconds: a list of Begun."""
        now = time.monotonic()
        late = {task: run for task, run in self._running.items() if now - run.since > seconds}
        self._running |= {task: run._replace(since=now) for task, run in late.items()}
        return list(late.values())


def watched(watch, function, *arguments):
    """What a data task does: it calls a function, and tells a Watch when it begins and ends.

    InputError if it has ended MAX_ENDED processes before.
    """
    context = ray.get_runtime_context()
    task, name = context.get_task_id(), context.get_task_name()
    begun = task, name, context.get_node_id(), os.getpid()
    if ray.get(watch.begin.remote(*begun)) >= MAX_ENDED:
        why = "too little memory, data on which it crashes, or too slow a node"
        raise InputError(f"{name}: this task has ended {MAX_ENDED} processes ({why})")
    try:
        return function(*arguments)
    finally:
        watch.end.remote(task)
