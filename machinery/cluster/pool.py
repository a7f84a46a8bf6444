"""The workers of a run, as the driver sees them."""

import contextlib
import math
import time
from collections import Counter, deque, namedtuple

from machinery.cluster import nodes
from machinery.cluster.adding import aligned_empty, all_finite, mean_of
from machinery.cluster.helpers import Helpers
from machinery.cluster.nodes import first_line, lives
from machinery.cluster.tasks import Waiting, limits
from machinery.errors import ClusterError, InputError, say

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

LEFT_FREE = 0.1  # of the CPUs that a worker uses, for data tasks beside it
CRASHES = 3  # of workers with one request, after which it is given up

# A worker: the handle of its actor, and its node. It starts until a deadline.
Member = namedtuple("Member", "number actor node deadline")


class Request:
    """A call of a worker's method about a helpers.Drawn mini-batch, and what has come of it.

    `value` is the last value that the method returns, `results` are references of those before it.
    """

    def __init__(self, method, drawn, refs, arguments=(), returns=1):
        """The method takes references of the weights, the mini-batch and `refs`, and the arguments."""
        self.method, self.drawn, self.refs = method, drawn, refs
        self.arguments, self.returns = arguments, returns  # returns: how many values
        self.number, self.value, self.results = None, None, []
        self.member, self.deadline = None, None  # a worker, which is asked after that whether it hangs
        self.crashes = []  # nodes on which this run has lost workers with it


class Patience:
    """Bears errors of what Ray rebuilds, for as long as a wait may take, from the first one on."""

    def __init__(self):
        self._end = None

    def bear(self, error):
        """Wait for a moment, or raise the error if it is time."""
        self._end = self._end or time.monotonic() + limits["wait"]
        if time.monotonic() > self._end:
            raise error
        time.sleep(1)


class Pool(contextlib.AbstractContextManager):
    """The workers of a run: starts them, shares out an iteration's requests, replaces the lost.

    An iteration is a fixed list of requests, each complete in itself. Any worker can take any of them,
    so which worker does, and how many there are, never changes a result.
    """

    def __init__(self, count, network, actor, helper, can_grow):
        """Start so many workers, of the class `actor`, with AlexNets of the arguments `network`.

        `can_grow`: an autoscaler may add nodes. ClusterError if there is no room, and can be none.
        """
        self.count, self.helpers = count, Helpers(helper)
        self._network, self._actor, self._can_grow = network, actor, can_grow
        self._cpus, self._gpus = network["threads"], network["gpus"]  # of a worker
        self._room = nodes.Room(self._cpus, self._gpus, self.helpers.here, network["precision"])
        self._nothing, self._demand = ray.remote(lambda: None), []  # tasks of it, which wait for room
        self.iteration, self._weights = None, None  # of the workers' weights; their reference
        self._requests, self._patience = [], Patience()  # for gradients; with lost images
        self._means = []  # arrays of the mean gradients
        self._up = {}  # number -> Member
        self._starting = {}  # reference that resolves once the worker is up -> Member
        if (shortage := self._shortage()) and not can_grow:
            raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
        self._admit(timeout=0)

    def __exit__(self, *_):
        """End all workers, those that still start too: Ray would keep these, on a shared cluster."""
        for worker in [*self._up.values(), *self._starting.values()]:
            ray.kill(worker.actor)
        for waiting in self._demand:
            ray.cancel(waiting)

    def _shortage(self):
        """What to say where the cluster has not room for all workers; nothing where it has.

        Tasks that do nothing wait for room that an autoscaler may add. They end with this job.
        """
        cpus, gpus = self._cpus, self._gpus
        room = sum(nodes.room_for_workers(cpus, gpus).values())
        if room >= self.count:
            return ""
        if self._can_grow:
            _, demand = ray.wait(self._demand, num_returns=len(self._demand), timeout=0)
            task, more = self._nothing.options(num_cpus=cpus, num_gpus=gpus), self.count - room
            self._demand = demand + [task.remote() for _ in range(more - len(demand))]
        asked = f"{self.count} workers of {cpus} CPUs and {gpus} GPUs each were asked for"
        return f"{asked}, the cluster has room for {room}"

    def _admit(self, timeout):
        """Start what is missing and has room; take in what is up, or will be in `timeout` seconds."""
        workers = [*self._up.values(), *self._starting.values()]
        missing = sorted(set(range(self.count)) - {worker.number for worker in workers})
        there = Counter(worker.node for worker in workers)
        for number, node in zip(missing, self._room.places(there), strict=False):
            share = {"num_cpus": self._cpus - LEFT_FREE, "num_gpus": self._gpus}
            actor = self._actor.options(**share, **nodes.on_node(node)).remote(self._network)
            deadline = time.monotonic() + limits["wait"]
            self._starting[actor.seconds_at_work.remote()] = Member(number, actor, node, deadline)
        if not self._starting:
            time.sleep(timeout)
        done, _ = ray.wait(list(self._starting), timeout=timeout)
        late = [ref for ref, start in self._starting.items() if start.deadline < time.monotonic()]
        for ref in {*done, *late}:
            start = self._starting.pop(ref)
            try:
                ray.get(ref, timeout=0)
                self._up[start.number] = start
                if self._weights:
                    say(f"worker {start.number} is back: {len(self._up)} of {self.count} are up")
            except RayError as error:
                ray.kill(start.actor)
                if lives(start.node):  # it is the start that has failed, not the node
                    late_start = f"not up in {limits['wait']} s"
                    self._room.failed(start.node, first_line(error) if ref in done else late_start)

    def wait(self):
        """Wait until all workers are up, or some: ClusterError if none can start."""
        if shortage := self._shortage():
            say(f"{shortage}: waiting up to {limits['wait']} s for more nodes")
        self._wait_for(self.count)
        shortage = self._shortage()
        if shortage and not self._up:
            raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
        self._wait_for_one()
        if len(self._up) < self.count:
            why = shortage or self._room.why or f"the others need more than {limits['wait']} s"
            up = f"{len(self._up)} of {self.count} workers are up"
            say(f"only {up}: the run goes on with them ({why})")

    def _wait_for_one(self):
        """Start what is missing, and wait until a worker is up; ClusterError if none can be."""
        self._admit(timeout=0)
        where = f"iteration {self.iteration}: " if self._weights else ""
        if not self._up:
            say(f"{where}no worker is left: waiting up to {limits['wait']} s for one")
            self._wait_for(1)
        if not self._up:
            why = f"workers fail: {self._room.why}" if self._room.why else "no node has room for one"
            raise ClusterError(f"{where}no worker is left, and none could start: {why}")

    def _wait_for(self, count):
        """Wait until so many workers are up, for as long as more of them may start."""
        deadline = time.monotonic() + limits["wait"]
        while len(self._up) < count and time.monotonic() < deadline and not self._room.given_up():
            self._admit(timeout=1)
            waits = self._starting or self._shortage()  # which asks for nodes
            if self._up and self._room.why and not waits:
                return

    def machine(self):
        """What the last bits of a result depend on: a dict of texts."""
        there = [nodes.places.known[member.node] for member in self._up.values()]
        instructions = {" ".join(sorted(place.instructions)) for place in there}
        found = {"CPU": {place.cpu for place in there}, "CPU instructions": instructions}
        found["TensorFlow"] = {place.tensorflow for place in there}
        machine = {what: "; ".join(sorted(values)) for what, values in found.items()}
        for what, values in found.items():
            if len(values) > 1:
                said = f"{what} is not the same on all nodes ({machine[what]})"
                say(f"{said}: two runs may differ in the last bits")
        return machine

    def _lose(self, members, what):
        """Let workers go, and say what is lost: others start in their place."""
        for member in members:
            del self._up[member.number]
            ray.kill(member.actor)
        say(f"{what}: {len(self._up)} of {self.count} go on")

    def _lose_dead(self):
        """Let all workers and helpers of dead nodes go."""
        for node in {*(member.node for member in self._up.values()), *self.helpers.at}:
            if not lives(node):
                self.helpers.at.pop(node, None)
                if lost := [member for member in self._up.values() if member.node == node]:
                    self._lose(lost, f"node {node[:8]} is lost with {len(lost)} workers")
        self._shortage()  # which asks for nodes

    def update_weights(self, iteration, weightref):
        """Have every worker load an iteration's weights, which all requests are about from now on."""
        self._admit(timeout=0)
        self.iteration, self._weights = iteration, weightref
        arrived = self.helpers.pass_on(weightref, sorted({m.node for m in self._up.values()}))
        for member in self._up.values():
            member.actor.update_weights.remote(iteration, [weightref], [arrived[member.node]])

    def mean_gradients(self, decays):
        """The mean of the gradients just computed, plus weight decay (see `mean_of`), and its norm.

        The mean is a list of 16 float32 arrays, all finite; the next call uses them again. Gradients
        that a node took along when it died are computed again.
        """
        requests, patience = self._requests, Patience()
        while True:
            try:
                gradients = [request.results[0] for request in requests]
                there = [request.member.node for request in requests]
                left = self.helpers.add_gradients(gradients, there)
                weights = ray.get(self._weights)
                self._means = self._means or [aligned_empty(weight.shape) for weight in weights]
                norm = mean_of(*left, len(gradients), weights, decays, self._means)
                self._check(norm)
                self._requests = []  # their references would keep the gradients in the object store
                return self._means, norm
            except RayError as error:
                patience.bear(error)
                say(f"gradients are lost ({first_line(error)}): they are computed again")
                self._lose_dead()
                self.run(requests)

    def _check(self, norm):
        """ClusterError if a loss or the mean gradient, of this norm, is not finite."""
        for request in self._requests:
            finite = math.isfinite(norm) or all_finite(ray.get(request.results[0]))
            if not finite or not math.isfinite(request.value):
                what = f"the {'loss' if finite else 'gradient'} of mini-batch {request.number}"
                where = f"iteration {self.iteration}: {what}"
                hint = "lower LEARNING_RATE, and remove this iteration's checkpoint"
                raise ClusterError(f"{where} is not finite, on worker {request.member.number}: {hint}")
        if not math.isfinite(norm):
            raise ClusterError(f"iteration {self.iteration}: the gradients' sum is not finite")

    def run(self, requests):
        """Share out Requests, each to the first free worker, until all have values; returns them."""
        self._requests = [request for request in requests if request.returns > 1]
        for number, request in enumerate(requests):
            request.number, request.crashes = number, []
        left, running = deque(requests), {}  # reference of a last value -> Request
        self._patience = Patience()

        def what():
            awaited = f"{len(running)} workers that compute" if running else "images to be read again"
            return f"Iteration {self.iteration} waits for {awaited}"

        waiting = Waiting(what, self.helpers.let_go_hung)
        while left or running:
            self._wait_for_one()
            unready = self._send_ready(left, running, len(self._requests) or len(requests))
            ended = set(waiting.some([*running, *unready]))
            for ref, request in list(running.items()):
                if ref in ended or self._is_over(request):
                    del running[ref]
                    if not self._collect(request, ref in ended):
                        left.appendleft(request)
        return requests

    def _send_ready(self, left, running, alike):
        """Send waiting requests whose images are there to free workers, and have the next ones drawn.

        The first `alike` requests are spread over all workers, those that follow like them. Returns the
        references of images that free workers wait for.
        """
        here, busy = self.helpers.here, {request.member.number for request in running.values()}
        members = sorted(self._up.values(), key=lambda m: (m.node != here, m.node, m.number))
        free = {member.number: member for member in members if member.number not in busy}
        ahead = list(left)[: len(free) + len(self._up)]
        data = {request.drawn.ref(): request for request in ahead}
        there, unready = ray.wait(list(data), num_returns=len(data), timeout=0, fetch_local=False)
        for ref in there[: len(free)]:
            request = data[ref]
            left.remove(request)
            # Neighbours in the list go to one node, where their gradients are added up.
            home = members[request.number % alike * len(members) // alike]
            member = free.pop(home.number if home.number in free else next(iter(free)))
            call = getattr(member.actor, request.method).options(num_returns=request.returns)
            inputs = [self._weights, ref, *request.refs]
            refs = call.remote(self.iteration, inputs, *request.arguments)
            request.results = refs if request.returns > 1 else [refs]
            request.member, request.deadline = member, time.monotonic() + limits["work"]
            running[request.results[-1]] = request
        return unready if free else []

    def _is_over(self, request):
        """Whether a request's worker is lost or hangs: nobody waits for it longer."""
        member = request.member
        if self._up.get(member.number) is not member:
            return True
        late = time.monotonic() > request.deadline
        if late and not nodes.hangs(member.actor, limits["work"]):
            say(f"worker {member.number} waits for weights or images")
            self.helpers.let_go_hung()
            request.deadline, late = time.monotonic() + limits["work"], False
        return late

    def _collect(self, request, ended):
        """Whether a request that has ended or is over has its value; else it must be computed again."""
        member = request.member
        try:
            request.value = ray.get(request.results[-1], timeout=0)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, InputError):
                raise
            if isinstance(cause, RayError):  # not the call has failed, but what makes its images
                self._patience.bear(error)
                self._lose_dead()
                request.drawn.let_go()
            elif self._up.get(member.number) is member:
                why = first_line(error) if ended else f"no answer in {limits['work']} s"
                self._lose_dead()
                if member.number in self._up:
                    self._lose([member], f"worker {member.number} is lost ({why})")
                    short = isinstance(error, OutOfMemoryError)
                    self._room.failed(member.node, why, nodes.LEFT_ALONE if short else None)
                self._count_crash(request, error if cause else ClusterError(why))
            return False
        request.results.pop()
        self._patience = Patience()
        request.drawn.let_go()  # or a validation's images would all lie in the object store
        self._room.worked(member.node)
        return True

    def _count_crash(self, request, error):
        """Raise the error if the request was too often what workers were lost with, wherever it ran."""
        request.crashes.append(request.member.node)
        counted = [node for node in request.crashes if lives(node)]
        untried = {member.node for member in self._up.values()} - set(counted)
        if len(counted) >= CRASHES and not untried:
            if isinstance(error, ClusterError):
                name = f"iteration {self.iteration}, {request.method} {request.number}"
                raise ClusterError(f"{name}: {len(counted)} workers failed: {error}")
            raise error
