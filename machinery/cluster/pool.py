"""The workers of a run, as the driver sees them: a pool that shares out an iteration's requests and
replaces the lost."""

import logging
import math
import time
from collections import Counter, deque, namedtuple
from functools import partial
from importlib.metadata import version

from machinery.cluster import nodes
from machinery.cluster.adding import aligned_empty, all_finite, mean_of
from machinery.cluster.helpers import Helpers
from machinery.cluster.nodes import first_line, lives
from machinery.cluster.tasks import CPU_SLICE, TICK, Waiting
from machinery.errors import ClusterError, InputError

import numpy as np
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

say = logging.getLogger("driver").info

SLICES_LEFT_FREE = 2  # of the CPUs that a worker uses, for data tasks beside it
CRASHES = 3  # of workers with one request, after which it is given up

# What a pool is for: `count` workers, each with the `cpus` and `gpus` of `share`, and an AlexNet of the
# arguments `network`. `timeout` bounds the seconds at work of one request, `patience` those of a start,
# and of waiting for room. `can_grow`: an autoscaler may add nodes.
Setup = namedtuple("Setup", "count share network timeout patience can_grow")

# A call of a worker's method, which returns so many values. It is sent once the helpers.Drawn is there.
# `refs` are references that it takes beside those of the weights and the mini-batch.
Request = namedtuple("Request", "method drawn refs arguments returns", defaults=([], (), 1))

# The last value of a request, the worker and the node that it is from, references of the values before.
Result = namedtuple("Result", "value worker node refs")

# A worker that is up: the handle of its actor, its node, and its nodes.Place.
Member = namedtuple("Member", "number actor node place")

# A worker that starts on a node, until a deadline.
Starting = namedtuple("Starting", "number actor node deadline")


class Running:
    """A request, by its number, that a Member computes, with references of all its values."""

    def __init__(self, request, member, refs, timeout):
        """It may be at work for `timeout` seconds. Later, its worker is asked whether it hangs."""
        self.request, self.member, self.refs, self._timeout = request, member, refs, timeout
        self._deadline, self._health = time.monotonic() + timeout, None

    def hangs(self, when_waiting):
        """Whether its worker hangs; calls a function if that only waits for weights or images."""
        if self._health is None and time.monotonic() > self._deadline:
            self._health = nodes.Health(self.member.actor, self._timeout)
        hangs = self._health and self._health.hangs()
        if hangs is False:
            self._deadline, self._health = time.monotonic() + self._timeout, None
            say(f"worker {self.member.number} waits for weights or images")
            when_waiting()
        return bool(hangs)


class Pool:
    """The workers of a run: starts them, shares out an iteration's requests, replaces the lost.

    An iteration is a fixed list of requests, each complete in itself. Any worker can take any of them,
    so which worker does, and how many there are, never changes a result. At the end of a `with`, all
    workers end.
    """

    def __init__(self, setup, actor, helper):
        """Start workers and helpers, actors of two classes.

        ClusterError if the cluster has no room for all workers and cannot grow.
        """
        self.count, self.helpers = setup.count, Helpers(helper)
        self._setup, self._actor, self._asked = setup, actor, False
        self._room = nodes.Room(setup.share, self.helpers.here)
        self._weights = None  # iteration, reference of its weights
        self._requests, self._results = [], []  # those of this iteration's gradients
        self._means = []  # arrays of the mean gradients
        self._up = {}  # number -> Member
        self._starting = {}  # reference of its Place, once the worker is up -> Starting
        self._in_bfloat16 = False  # a worker whose CPU has no instructions for it would take minutes
        if shortage := self._shortage():
            if not setup.can_grow:
                raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
            self._ask_for_nodes()
        self._start_missing()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End all workers, those that still start too: Ray would keep these, on a shared cluster."""
        for worker in [*self._up.values(), *self._starting.values()]:
            ray.kill(worker.actor)
        if self._asked:
            request_resources(bundles=[])

    @property
    def iteration(self):
        """The iteration whose weights the workers have."""
        return self._weights[0]

    # ---- which workers are up

    def _shortage(self):
        """What to say where the cluster has not room for all workers; nothing where it has."""
        room = sum(nodes.room_for_workers(**self._setup.share).values())
        each = "{cpus} CPUs and {gpus} GPUs".format(**self._setup.share)
        asked = f"{self.count} workers of {each} each were asked for"
        return f"{asked}, the cluster has room for {room}" if room < self.count else ""

    def _ask_for_nodes(self):
        """Tell an autoscaler what the workers need: they start only on nodes that are there."""
        bundle = {"CPU": self._setup.share["cpus"], "GPU": self._setup.share["gpus"]}
        request_resources(bundles=[{kind: n for kind, n in bundle.items() if n}] * self.count)
        self._asked = True

    def _start_missing(self):
        """Start workers in place of those that are lost, as far as there is room."""
        starting = self._starting.values()
        missing = set(range(self.count)) - set(self._up) - {start.number for start in starting}
        if not missing:
            return
        there = Counter(worker.node for worker in [*self._up.values(), *starting])
        for number, node in zip(sorted(missing), self._room.places(len(missing), there), strict=False):
            actor = self._actor.options(
                num_cpus=self._setup.share["cpus"] - SLICES_LEFT_FREE * CPU_SLICE,
                num_gpus=self._setup.share["gpus"],
                scheduling_strategy=nodes.on_node(node),
                **nodes.modules,
            ).remote(self._setup.network)
            deadline = time.monotonic() + self._setup.patience
            self._starting[actor.place.remote()] = Starting(number, actor, node, deadline)

    def _admit(self, timeout):
        """Start what is missing, and take in what has started, or does within `timeout` seconds."""
        self._start_missing()
        if not self._starting:
            time.sleep(timeout)
            return
        done, _ = ray.wait(list(self._starting), timeout=timeout)
        late = [ref for ref, start in self._starting.items() if start.deadline < time.monotonic()]
        for ref in {*done, *late}:
            start = self._starting.pop(ref)
            try:
                self._take_in(start, ray.get(ref, timeout=0))
            except RayError as error:
                ray.kill(start.actor)
                if lives(start.node):  # it is the start that has failed, not the node
                    late_start = f"not up in {self._setup.patience} s"
                    self._room.failed(start.node, first_line(error) if ref in done else late_start)

    def _take_in(self, start, place):
        if self._in_bfloat16 and not place.bfloat16:
            ray.kill(start.actor)
            self._room.leave(start.node)
            why = "its CPU has no instructions for bfloat16, in which this run computes"
            say(f"node {start.node[:8]} is left alone: {why}")
            return
        self._up[start.number] = Member(start.number, start.actor, start.node, place)
        if self._weights:
            say(f"worker {start.number} is back: {len(self._up)} of {self.count} are up")

    def _wait_for_one(self):
        """Wait until a worker is up; ClusterError if none can start, or if no node has room."""
        deadline = time.monotonic() + self._setup.patience
        where = f"iteration {self.iteration}: " if self._weights else ""
        self._admit(timeout=0)
        if not self._up:
            say(f"{where}no worker is left: waiting up to {self._setup.patience} s for one")
        while not self._up:
            self._admit(timeout=1)
            nodes.head.look()
            if not self._up and (self._room.given_up() or time.monotonic() > deadline):
                why = (
                    f"workers fail: {self._room.why}" if self._room.why else "no node has room for one"
                )
                raise ClusterError(f"{where}no worker is left, and none could start: {why}")

    def wait(self):
        """Wait until all workers are up; go on with fewer if some cannot start or find no room.

        ClusterError if none is up by then.
        """
        deadline, announced = time.monotonic() + self._setup.patience, False
        while len(self._up) < self.count:
            self._admit(timeout=1)
            shortage, late = self._shortage(), time.monotonic() > deadline
            if len(self._up) == self.count:
                break
            if shortage and late and not self._up:
                raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
            if shortage and not announced:
                say(f"{shortage}: waiting up to {self._setup.patience} s for more nodes")
                if self._setup.can_grow:
                    self._ask_for_nodes()
                announced = True
            if late or (not shortage and self._room.why and not self._starting and self._up):
                self._wait_for_one()
                why = (
                    shortage or self._room.why or f"the others need more than {self._setup.patience} s"
                )
                up = f"{len(self._up)} of {self.count} workers are up"
                say(f"only {up}: the run goes on with them ({why})")
                break
            if self._room.given_up():
                self._wait_for_one()
        places = [member.place for member in self._up.values()]
        in_bfloat16 = self._setup.network["precision"] == "bfloat16"
        self._in_bfloat16 = in_bfloat16 and all(place.bfloat16 for place in places)

    def machine(self):
        """What the last bits of a result depend on: a dict of texts."""
        cpus = "; ".join(sorted({member.place.cpu for member in self._up.values()}))
        if ";" in cpus:
            say(f"CPUs of several models ({cpus}): two runs may differ in the last bits")
        return {"CPU": cpus, "TensorFlow": version("tensorflow")}

    def _by_node(self):
        """The workers that are up: those of this node first, then node by node."""
        here = self.helpers.here
        return sorted(self._up.values(), key=lambda m: (m.node != here, m.node, m.number))

    def _lose(self, member, why, pause=None):
        """Let a worker go, or all workers of its node if that is dead: others start in their place."""
        if not lives(member.node):
            self._lose_nodes({member.node})
            return
        del self._up[member.number]
        ray.kill(member.actor)
        say(f"worker {member.number} is lost ({why}): {len(self._up)} of {self.count} go on")
        self._room.failed(member.node, why, pause)

    def _lose_nodes(self, dead):
        """Let all workers and helpers of dead nodes go."""
        for node in dead:
            lost = [member for member in self._up.values() if member.node == node]
            for member in lost:
                del self._up[member.number]
                ray.kill(member.actor)
            if lost:
                up = f"{len(self._up)} of {self.count} go on"
                say(f"node {node[:8]} is lost with {len(lost)} workers: {up}")
        self.helpers.let_go(dead)
        if self._setup.can_grow and len(self._up) < self.count:
            self._ask_for_nodes()

    def _lose_dead_nodes(self):
        there = self.helpers.nodes() | {member.node for member in self._up.values()}
        self._lose_nodes({node for node in there if not lives(node)})

    # ---- what they compute

    def update_weights(self, iteration, weightref):
        """Have every worker load an iteration's weights, which all requests are about from now on."""
        self._admit(timeout=0)
        self._weights = iteration, weightref
        arrived = self.helpers.pass_on(weightref, sorted({m.node for m in self._up.values()}))
        for member in self._up.values():
            passed_on = [arrived[member.node]] if arrived[member.node] else []
            member.actor.update_weights.remote(iteration, [weightref], passed_on)

    def compute_grad(self, requests, others):
        """The Results of requests for gradients, which stay where they were computed, and of others."""
        results = self.run(requests + others)
        self._requests, self._results = requests, results[: len(requests)]
        self._check(np.isfinite([result.value for result in self._results]), "loss")
        return self._results, results[len(requests) :]

    def mean_gradients(self, decays):
        """The mean of the gradients just computed, plus weight decay (see `mean_of`), and its norm.

        The mean is a list of 16 float32 arrays, all finite; the next call uses them again. Gradients
        that a node took along when it died are computed again.
        """
        patience = Patience(self._setup.patience)
        while True:
            try:
                gradients = [result.refs[0] for result in self._results]
                there = [result.node for result in self._results]
                left = self.helpers.add_gradients(gradients, there, self._setup.timeout)
                weights = ray.get(self._weights[1])
                self._means = self._means or [aligned_empty(weight.shape) for weight in weights]
                norm = mean_of(*left, len(gradients), weights, decays, self._means)
                if not math.isfinite(norm):
                    self._check([all_finite(ray.get(ref)) for ref in gradients], "gradient")
                    raise ClusterError(f"iteration {self.iteration}: the gradients' sum is not finite")
                self._results = []  # their references would keep the gradients in the object store
                return self._means, norm
            except RayError as error:
                patience.bear(error)
                say(f"gradients are lost ({first_line(error)}): they are computed again")
                self._lose_dead_nodes()
                self._results = self.run(self._requests)

    def _check(self, finite, what):
        """ClusterError if one of this iteration's mini-batches has given something not finite."""
        for index, result in enumerate(self._results):
            if not finite[index]:
                where = f"iteration {self.iteration}: the {what} of mini-batch {index}"
                hint = "lower LEARNING_RATE, and remove this iteration's checkpoint"
                raise ClusterError(f"{where} is not finite, on worker {result.worker}: {hint}")

    def run(self, requests):
        """Share out requests, each to the first free worker; a list of a Result for each.

        A request whose worker is lost goes to another worker.
        """
        left, patience = deque(range(len(requests))), Patience(self._setup.patience)
        results, running, crashes = (
            [None] * len(requests),
            {},
            {},
        )  # reference of a last value -> Running
        waiting = Waiting(lambda: f"Iteration {self.iteration} waits for {_what(running)}")
        restart = self._setup.timeout
        while left or running:
            self._admit(timeout=0)
            if not self._up:
                self._wait_for_one()
            unready = self._send_ready(requests, left, running)
            ended = set(waiting.some([*running, *unready], TICK))
            if not running and waiting.still_for() > restart:
                self.helpers.restart_hung(self._setup.timeout)
                restart += self._setup.timeout
            for ref, run in list(running.items()):
                if ref in ended or self._is_over(run):
                    del running[ref]
                    result = self._collect(run, ref in ended, requests[run.request], crashes, patience)
                    results[run.request] = result
                    if not result:
                        left.appendleft(run.request)
        return results

    def _send_ready(self, requests, left, running):
        """Send waiting requests whose images are there to free workers, and have the next ones drawn.

        Returns the references of images that free workers wait for.
        """
        busy, members = {run.member.number for run in running.values()}, self._by_node()
        free = {member.number: member for member in members if member.number not in busy}
        ahead = list(left)[: len(free) + len(self._up)]
        data = {requests[number].drawn.ref(): number for number in ahead}
        there, unready = ray.wait(list(data), num_returns=len(data), timeout=0, fetch_local=False)
        ready = set(there)
        # An accuracy's requests, which follow those of gradients, are spread like these.
        alike = sum(request.returns > 1 for request in requests) or len(requests)
        for number in [data[ref] for ref in data if ref in ready][: len(free)]:
            left.remove(number)
            # Neighbours in the list go to one node, where their gradients are added up.
            home = members[number % alike * len(members) // alike]
            member = free.pop(home.number if home.number in free else next(iter(free)))
            run = self._send(number, requests[number], member)
            running[run.refs[-1]] = run
        return unready if free else []

    def _send(self, number, request, member):
        """Have a worker compute a request, which has a number; what is Running then."""
        iteration, weightref = self._weights
        call = getattr(member.actor, request.method).options(num_returns=request.returns)
        refs = call.remote(
            iteration, [weightref, request.drawn.ref(), *request.refs], *request.arguments
        )
        return Running(number, member, refs if request.returns > 1 else [refs], self._setup.timeout)

    def _is_over(self, run):
        """Whether a request's worker is lost or hangs: nobody waits for it longer."""
        restart_hung = partial(self.helpers.restart_hung, self._setup.timeout)
        return self._up.get(run.member.number) != run.member or run.hangs(restart_hung)

    def _collect(self, run, ended, request, crashes, patience):
        """The Result of a request that has ended or is over; None if it must be computed again.

        `crashes` is a dict of request -> the nodes on which workers were lost with it.
        """
        member = run.member
        try:
            value = ray.get(run.refs[-1], timeout=0)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, InputError):
                raise
            if isinstance(cause, RayError):  # not the call has failed, but what makes its images
                patience.bear(error)
                request.drawn.let_go()
            elif self._up.get(member.number) is member:
                why = first_line(error) if ended else f"no answer in {self._setup.timeout} s"
                short = isinstance(error, OutOfMemoryError)
                self._lose(member, why, nodes.LEFT_ALONE if short else None)
                self._count_crash(run, request, crashes, error if cause else ClusterError(why))
            return None
        request.drawn.let_go()  # or a validation's images would all lie in the object store
        self._room.worked(member.node)
        patience.renew()
        return Result(value, member.number, member.node, run.refs[:-1])

    def _count_crash(self, run, request, crashes, error):
        """Raise the error if the request was too often what workers were lost with, wherever it ran."""
        there = crashes.setdefault(run.request, [])
        there.append(run.member.node)
        counted = [node for node in there if lives(node)]
        untried = {member.node for member in self._up.values()} - set(counted)
        if len(counted) >= CRASHES and not untried:
            name = f"iteration {self.iteration}, {request.method} {run.request}"
            if isinstance(error, ClusterError):
                raise ClusterError(f"{name}: {len(counted)} workers failed: {error}")
            raise error


def _what(running):
    return f"{len(running)} workers that compute" if running else "images to be read again"


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
