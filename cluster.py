"""The Ray cluster that a run is on: the room on its nodes, what runs on them, and how large objects
travel between them."""

import contextlib
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.experimental import get_object_locations
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import watching
from adding import leaves, share_out
from functions import CPU_SLICE, TASK_MEMORY, Helper, is_fast_in_bfloat16, random_batches
from imagenet import PATIENCE
from joining import CONNECT, ClusterError, carried

SHORT = 0.5  # seconds between two looks whether an answer is still wanted
ASKED = 3  # times that a node is asked before its silence is an answer
START = 60  # seconds in which a helper has started
LOOK = 5  # seconds between two looks whether the cluster is there and whether a data task hangs
CRASHES_IN_A_ROW = 3  # of workers with one request, or on one node, before it is given up
RETRY_START = 2  # seconds after which a worker is started again where one failed; longer each time
LEFT_ALONE = 300  # seconds that a node is left alone where workers have failed in a row


def nodes_alive():
    """The cluster's nodes that are alive, as Ray describes them. ClusterError if nobody knows."""
    answer = watching.within(watching.ANSWER, ray.nodes)
    if not answer:
        raise ClusterError(f"the head of the Ray cluster has not answered for {watching.ANSWER} s")
    return [node for node in answer[0] if node["Alive"]]


def lives(node):
    """Whether a node is alive: Ray itself notices only after some seconds that one has died."""
    for alive in nodes_alive():
        if alive["NodeID"] == node:
            raylet = alive["NodeManagerAddress"], alive["NodeManagerPort"]
            with contextlib.suppress(OSError), socket.create_connection(raylet, CONNECT):
                return True
    return False


def on_node(node):
    """Ray's strategy to place something on a node, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def room_for_workers(cpus, gpus):
    """How many workers of so many CPUs and GPUs each node holds in all: a dict of node id -> number."""
    room = {}
    for node in nodes_alive():
        by_cpu = int(node["Resources"].get("CPU", 0) // cpus)
        by_gpu = int(node["Resources"].get("GPU", 0) // gpus) if gpus else by_cpu
        room[node["NodeID"]] = min(by_cpu, by_gpu)
    return room


def fastest_precision(cpus, gpus):
    """The precision for workers of so many CPUs and GPUs, "bfloat16" or "float32".

    bfloat16 where the CPU of every node that has room for a worker is faster in it; on GPUs, float32.
    """
    if gpus:
        return "float32"
    nodes = [node for node, number in room_for_workers(cpus, gpus).items() if number]
    with ThreadPoolExecutor(64) as threads:
        fast = list(threads.map(lambda node: ask(node, is_fast_in_bfloat16), nodes))
    return "bfloat16" if any(fast) and False not in fast else "float32"  # None: the node is gone


def room_for_images(mini_batches, one_set, batch):
    """Bytes that the object stores have for images before Ray spills them, beside all else.

    That is gradients, a node's sum and weights of two iterations, sets of so many bytes each, and what
    data tasks make: two tasks a CPU, two batches of so many bytes each.
    """
    cpus, store = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "object_store_memory"))
    sets = mini_batches + 3 * len(nodes_alive())
    return int(0.8 * store - sets * one_set - 4 * cpus * batch)  # Ray spills a store that is fuller


def ask(node, function, *arguments, closed=None):
    """What a short function returns on a node; None if the node does not answer, asked ASKED times.

    An answer does not come if Ray gives the task to a process that hangs; another one gets the next.
    ClusterError as soon as the event `closed` is set: nobody waits for the answer then.
    """
    task = ray.remote(num_cpus=0, scheduling_strategy=on_node(node), **carried())(function)
    for _ in range(ASKED):
        with contextlib.suppress(RayError):
            return _answer(task.remote(*arguments), closed)
    return None


def _answer(ref, closed):
    for _ in range(round(watching.ANSWER / SHORT)):
        if ray.wait([ref], timeout=SHORT)[0]:
            return ray.get(ref)
        if closed and closed.is_set():
            raise ClusterError("the run ends")
    raise GetTimeoutError(f"no answer in {watching.ANSWER} s")


class DataTasks:
    """Starts the tasks on data: loading, labels, shuffle, mean image. Ray runs a task again if its
    process or its node dies, to rebuild what was lost, too, as often as that happens.

    Until it is closed, one thread names a task that hangs, and ends its process; another one looks
    whether the cluster's head is there.
    """

    def __init__(self, say, timeout, fail, **options):
        """`timeout` bounds the seconds of a task; `fail` is called with the error if the head is gone.

        A task takes a slice of a CPU, and memory: TASK_MEMORY, or more, so that at most two run on a
        CPU. `options` are more of Ray's for all tasks.
        """
        here = on_node(ray.get_runtime_context().get_node_id())
        self._watch = watching.Watch.options(scheduling_strategy=here, **carried()).remote()
        self._names, self._closed = set(), threading.Event()
        looks = (_look_at_tasks, self._watch, self._names, say, timeout), (_look_at_head, fail)
        self._threads = [
            threading.Thread(target=look, args=(self._closed, *arguments), daemon=True)
            for look, *arguments in looks
        ]
        for thread in self._threads:
            thread.start()
        nodes = [node["Resources"] for node in nodes_alive()]
        sizes = [(n["memory"], n["CPU"]) for n in nodes if n.get("CPU") and n.get("memory")]
        sizes = sizes or [(2 * TASK_MEMORY, 1)]  # no such node is there yet
        share, largest = min(m / c / 2 for m, c in sizes), max(sizes)[0]
        limits = {"num_cpus": CPU_SLICE, "memory": int(min(max(TASK_MEMORY, share), largest))}
        self._task = ray.remote(max_retries=-1, **limits | carried() | options)(watching.watched)

    def close(self):
        """End the threads: Ray ends the process if one of them calls it after its end."""
        self._closed.set()
        for thread in self._threads:
            thread.join(5 * SHORT)

    __del__ = close

    def start(self, function, *arguments, name=None, **options):
        """Start a task that calls a function of a carried module; its reference, or references.

        `name` names the task, if the function's name does not say enough; `options` are Ray's.
        """
        name = name or function.__name__
        self._names.add(name)
        return self._task.options(name=name, **options).remote(self._watch, function, *arguments)


def _look_at_tasks(closed, watch, names, say, timeout):
    """Look every few seconds whether a task takes too long, and sometimes whether one is stopped."""
    look_for_stopped = time.monotonic() + timeout
    while not closed.wait(LOOK):
        try:
            for late in _answer(watch.late.remote(timeout), closed):
                if ask(late.node, watching.end_process, late.pid, late.name, closed=closed):
                    where = f"on node {late.node[:8]}"
                    say(f"{late.name} has not ended in {timeout} s {where}: this task is run again")
            if time.monotonic() > look_for_stopped:
                look_for_stopped = time.monotonic() + timeout
                for node in [node["NodeID"] for node in nodes_alive()]:
                    for title in ask(node, watching.end_stopped, list(names), closed=closed) or ():
                        say(f"a process is stopped on node {node[:8]} ({title}): it is ended")
        except GetTimeoutError:
            ray.kill(watch, no_restart=False)
        except (RayError, ClusterError):
            pass  # the run ends, the watch is restarted, or the other thread looks at the head


def _look_at_head(closed, fail):
    """Look every few seconds whether the cluster's head answers."""
    while not closed.wait(LOOK):
        try:
            nodes_alive()
        except ClusterError as error:
            if not closed.is_set():
                fail(error)
            return


class Room:
    """Where on the cluster workers start: on the node with the most room, and not where they fail.

    A node on which workers start in vain, or crash, is tried again after a while, and is left alone
    after CRASHES_IN_A_ROW failures.
    """

    def __init__(self, resources, here, say):
        """`resources` has the `cpus` and `gpus` of a worker; `here` is the id of the driver's node."""
        self._resources, self._here, self._say = resources, here, say
        self._limits = {}  # node -> how many workers it can hold in fact
        self._failures, self._next_try = Counter(), {}  # node -> failures in a row; a moment
        self.why = ""  # why the last worker that failed has failed

    def nodes(self):
        """How many workers each node can hold: a dict of node id -> number."""
        room = room_for_workers(**self._resources)
        return {node: min(n, self._limits.get(node, n)) for node, n in room.items()}

    def places(self, count, there):
        """Nodes for at most `count` more workers; `there` is a Counter of the nodes of all others."""
        room, now, chosen = self.nodes(), time.monotonic(), []
        left = {n: room[n] - there[n] for n in room if self._next_try.get(n, 0) <= now}
        while len(chosen) < count and left:
            node = max(left, key=lambda node: (left[node], node == self._here))
            if left[node] <= 0:
                break
            left[node] -= 1
            chosen.append(node)
        return chosen

    def limit(self, node, number):
        """A node can hold only so many workers."""
        self._limits[node] = number

    def failed(self, node, why):
        """A worker has failed on a node that goes on."""
        self._failures[node] += 1
        self.why, pause = why, RETRY_START * self._failures[node]
        if self._failures[node] % CRASHES_IN_A_ROW == 0:
            pause, times = LEFT_ALONE, f"{self._failures[node]} times in a row"
            self._say(f"node {node[:8]} is left alone: workers failed there {times} ({why})")
        self._next_try[node] = time.monotonic() + pause

    def worked(self, node):
        """A worker on a node has done its work."""
        self._failures.pop(node, None)

    def given_up(self):
        """Whether workers have failed too often on every node that has room for one."""
        nodes = [node for node, number in self.nodes().items() if number]
        return bool(nodes) and all(self._failures[node] >= CRASHES_IN_A_ROW for node in nodes)


class Patience:
    """Bears errors of what Ray rebuilds, as long as they do not go on for too long."""

    def __init__(self, seconds):
        """Bear them for so many seconds from the first one on."""
        self._seconds, self._end = seconds, None

    def bear(self, error):
        """Wait for a moment, or raise the error if it is time."""
        self._end = self._end or time.monotonic() + self._seconds
        if time.monotonic() > self._end:
            raise error
        time.sleep(1)

    def renew(self):
        """It goes on."""
        self._end = None


class Drawn:
    """A mini-batch that a helper draws of a batch. It can be drawn again, and is the same."""

    def __init__(self, helpers, method, batch, *arguments):
        """Name the helper's method, and its arguments after the batch; nothing is drawn yet."""
        self._helpers, self._method, self._batch = helpers, method, batch
        self._arguments, self._ref = arguments, None

    def ref(self, helper=None):
        """The reference of the mini-batch, which the first call has drawn: by `helper`, if given."""
        if self._ref is None:
            draw = getattr(helper or self._helpers.holding([self._batch])[0], self._method)
            self._ref = draw.remote(self._batch.images, self._batch.labels, *self._arguments)
        return self._ref

    def let_go(self):
        """It has been used, or is lost: the next call of `ref` draws it again."""
        self._ref = None


class Helpers:
    """One Helper on each node that needs one, so that large objects are used where they lie."""

    def __init__(self):
        """Start none yet."""
        self.here = ray.get_runtime_context().get_node_id()
        self._on = {}  # node id -> Helper
        self._starts = {}  # node id -> reference of the id of its process, and when it was started

    def holding(self, batches):
        """For each batch the Helper on a node that holds it, or on this one if Ray knows of none."""
        places = get_object_locations([batch.images for batch in batches])
        return [self.on((*places[batch.images]["node_ids"], self.here)[0]) for batch in batches]

    def on(self, node):
        """The helper on a node."""
        if node not in self._on:
            there = {"scheduling_strategy": on_node(node)} | carried()
            self._on[node] = Helper.options(**there).remote()
            self._note_start(node)
        return self._on[node]

    def _note_start(self, node):
        self._starts[node] = self._on[node].pid.remote(), time.monotonic()

    def nodes(self):
        """The nodes that have a helper: all on which data or gradients lie."""
        return set(self._on)

    def let_go(self, nodes):
        """Forget the helpers of nodes that are dead."""
        for node in nodes & set(self._on):
            del self._on[node]

    def restart_hung(self):
        """Start helpers anew that are stuck, in a call or in their start, and forget those that failed.

        Ray repeats the calls of one that was up; those of one that never came up fail.
        """
        for node, helper in list(self._on.items()):
            pid, since = self._starts[node]
            try:
                if not ask(node, watching.waits, ray.get(pid, timeout=0)):
                    ray.kill(helper, no_restart=False)
                    self._note_start(node)
            except GetTimeoutError:
                if time.monotonic() - since > START:
                    ray.kill(self._on.pop(node))
            except RayError:  # its node is gone, and Ray has known it for a place of images until now
                del self._on[node]

    def draw_minibatches(self, batches, size, count, seed, iteration):
        """An iteration's `count` Drawn mini-batches, each `size` images of a random batch."""
        chosen = random_batches(batches, [(seed, "batch", iteration, i) for i in range(count)])
        drawn = [
            Drawn(self, "draw_minibatch", batch, size, (seed, "crop", iteration, index))
            for index, batch in enumerate(chosen)
        ]
        for minibatch, helper in zip(drawn, self.holding(chosen), strict=True):
            minibatch.ref(helper)  # now, ahead of time
        return drawn

    def draw_sample(self, batches, size, parts, seed, iteration):
        """At most `size` images of a random batch, for an accuracy: in `parts` Drawn mini-batches."""
        [batch] = random_batches(batches, [(seed, "accuracy", iteration)])
        parts = min(parts, size, batch.count)
        return [Drawn(self, "draw_sample", batch, size, part, parts) for part in range(parts)]

    def draw_piece(self, batch, start, stop):
        """A Drawn mini-batch of the images `start` to `stop` of a batch, to validate on."""
        return Drawn(self, "draw_piece", batch, start, stop)

    def pass_on(self, ref, nodes):
        """Start to copy an object from this node to others, in rounds.

        A round has as many copies as nodes hold the object by then, since Ray copies from any of them:
        so this node sends about one a round. To 11 others over slow links it took 0.65 [0.39..1.13] of
        the time, to 7 over faster ones 1.07 [0.68..1.19] (`benchmarks/links.py`). Returns a dict of
        node -> reference that resolves once the object is there; None for this node.
        """
        arrived, before, rest = {self.here: None}, [], [node for node in nodes if node != self.here]
        while rest:
            now, rest = rest[: len(arrived)], rest[len(arrived) :]
            before = [self.on(node).fetch.remote([ref], *before) for node in now]
            arrived |= zip(now, before, strict=True)
        return arrived

    def add_gradients(self, gradients, nodes, say, timeout):
        """Have the nodes add up sets of gradients, given as references, where they lie (`share_out`).

        `nodes` names the node of each set. Returns what is left to add: a tree, and a dict of index ->
        set for it.
        """
        steps, tree = share_out(nodes, self.here)
        refs = list(gradients)
        for node, part in steps:
            indexes = leaves(part)
            sets = [refs[index] for index in indexes]
            refs.append(self.on(node).add_gradients.remote(part, indexes, *sets))
        left = {index: refs[index] for index in leaves(tree)}
        restart = time.monotonic() + timeout
        while ray.wait([*left.values()], num_returns=len(left), timeout=min(PATIENCE, timeout))[1]:
            say("The gradients are still added up")
            if time.monotonic() >= restart:
                self.restart_hung()
                restart += timeout
        return tree, dict(zip(left, ray.get([*left.values()]), strict=True))


def first_line(error):
    """The line of an error's message that says most: the last one of a traceback, else the first."""
    if isinstance(error, RayTaskError):
        error = error.cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1 if 'File "' in str(error) else 0][:200]
