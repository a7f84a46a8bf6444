"""The workers of a run, as the driver sees them: a pool that shares out an iteration's requests and
replaces the lost."""

import math
import time
from collections import Counter, deque, namedtuple
from types import SimpleNamespace

from machinery.cluster import nodes
from machinery.cluster.adding import aligned_empty, all_finite, mean_of
from machinery.cluster.helpers import Helpers
from machinery.cluster.nodes import first_line, lives
from machinery.cluster.tasks import Waiting
from machinery.errors import ClusterError, InputError, say

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

LEFT_FREE = 0.1  # of the CPUs that a worker uses, for data tasks beside it
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

# A worker: the handle of its actor, and its node. It starts until a deadline.
Member = namedtuple("Member", "number actor node deadline")


@ray.remote
def nothing():
    """What waits for room on nodes that an autoscaler may add."""


class Pool:
    """The workers of a run: starts them, shares out an iteration's requests, replaces the lost.

    An iteration is a fixed list of requests, each complete in itself. Any worker can take any of them,
    so which worker does, and how many there are, never changes a result. At the end of a `with`, all
    workers end.
    """

    def __init__(self, setup, actor, helper):
        """Start workers, of the class `actor`. ClusterError if there is no room, and can be none."""
        self.count, self.helpers = setup.count, Helpers(helper)
        self._setup, self._actor, self._demand = setup, actor, []
        self._room = nodes.Room(*setup.share.values(), self.helpers.here, setup.network["precision"])
        self._weights = None  # iteration, reference of its weights
        self._requests, self._results = [], []  # those of this iteration's gradients
        self._means = []  # arrays of the mean gradients
        self._up = {}  # number -> Member
        self._starting = {}  # reference that resolves once the worker is up -> Member
        if shortage := self._shortage():
            if not setup.can_grow:
                raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
            self._ask_for_nodes()
        self._admit(timeout=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End all workers, those that still start too: Ray would keep these, on a shared cluster."""
        for worker in [*self._up.values(), *self._starting.values()]:
            ray.kill(worker.actor)
        for waiting in self._demand:
            ray.cancel(waiting)

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
        """Have tasks wait for the room that workers miss: an autoscaler adds nodes for them.

        They do nothing, and end with this job, also if it is killed.
        """
        if self._demand:
            _, self._demand = ray.wait(self._demand, num_returns=len(self._demand), timeout=0)
        missing = self.count - sum(nodes.room_for_workers(**self._setup.share).values())
        share = {"num_cpus": self._setup.share["cpus"], "num_gpus": self._setup.share["gpus"]}
        for _ in range(missing - len(self._demand)):
            self._demand.append(nothing.options(**share).remote())

    def _admit(self, timeout):
        """Start what is missing and has room; take in what is up, or will be in `timeout` seconds."""
        workers = [*self._up.values(), *self._starting.values()]
        missing = sorted(set(range(self.count)) - {worker.number for worker in workers})
        there = Counter(worker.node for worker in workers)
        for number, node in zip(missing, self._room.places(there), strict=False):
            actor = self._actor.options(
                num_cpus=self._setup.share["cpus"] - LEFT_FREE,
                num_gpus=self._setup.share["gpus"],
                **nodes.on_node(node),
            ).remote(self._setup.network)
            deadline = time.monotonic() + self._setup.patience
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
                    late_start = f"not up in {self._setup.patience} s"
                    self._room.failed(start.node, first_line(error) if ref in done else late_start)

    def _wait_for_one(self):
        """Start what is missing, and wait until a worker is up; ClusterError if none can be."""
        self._admit(timeout=0)
        if self._up:
            return
        patience = self._setup.patience
        where = f"iteration {self.iteration}: " if self._weights else ""
        say(f"{where}no worker is left: waiting up to {patience} s for one")
        deadline = time.monotonic() + patience
        while not self._up:
            self._admit(timeout=1)
            if not self._up and (self._room.given_up() or time.monotonic() > deadline):
                fail = self._room.why and f"workers fail: {self._room.why}"
                why = fail or "no node has room for one"
                raise ClusterError(f"{where}no worker is left, and none could start: {why}")

    def wait(self):
        """Wait until all workers are up; go on with fewer if some cannot start or find no room.

        ClusterError if none is up by then.
        """
        patience, shortage, announced = self._setup.patience, "", False
        deadline = time.monotonic() + patience
        while len(self._up) < self.count and time.monotonic() < deadline:
            self._admit(timeout=1)
            shortage = self._shortage()
            if shortage and not announced:
                say(f"{shortage}: waiting up to {patience} s for more nodes")
                announced = True
            if shortage and self._setup.can_grow:
                self._ask_for_nodes()
            some_fail = self._up and self._room.why and not self._starting
            if self._room.given_up() or (some_fail and not shortage):
                break
        if shortage and not self._up:
            raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
        self._wait_for_one()
        if len(self._up) < self.count:
            why = shortage or self._room.why or f"the others need more than {patience} s"
            up = f"{len(self._up)} of {self.count} workers are up"
            say(f"only {up}: the run goes on with them ({why})")

    def machine(self):
        """What the last bits of a result depend on: a dict of texts."""
        there = [nodes.places.known[member.node] for member in self._up.values()]
        instructions = [" ".join(sorted(place.instructions)) for place in there]
        tensorflow = [place.tensorflow for place in there]
        machine = {"CPU": [place.cpu for place in there], "CPU instructions": instructions}
        machine |= {"TensorFlow": tensorflow}
        machine = {what: "; ".join(sorted(set(values))) for what, values in machine.items()}
        for what, values in machine.items():
            if ";" in values:
                said = f"{what} is not the same on all nodes ({values})"
                say(f"{said}: two runs may differ in the last bits")
        return machine

    def _lose(self, members, what):
        """Let workers go, and say what is lost: others start in their place."""
        for member in members:
            del self._up[member.number]
            ray.kill(member.actor)
        if members:
            say(f"{what}: {len(self._up)} of {self.count} go on")

    def _lose_nodes(self, dead):
        """Let all workers and helpers of dead nodes go."""
        for node in dead:
            lost = [member for member in self._up.values() if member.node == node]
            self._lose(lost, f"node {node[:8]} is lost with {len(lost)} workers")
        self.helpers.let_go(dead)
        if self._setup.can_grow and len(self._up) < self.count:
            self._ask_for_nodes()

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
                there = self.helpers.nodes() | {member.node for member in self._up.values()}
                self._lose_nodes({node for node in there if not lives(node)})
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
        left, results = deque(range(len(requests))), [None] * len(requests)
        running = {}  # reference of a last value -> what `_send_ready` has sent
        crashes = [[] for _ in requests]  # the nodes on which workers were lost with each
        patience, timeout = Patience(self._setup.patience), self._setup.timeout
        waiting = Waiting(lambda: f"Iteration {self.iteration} waits for {_what(running)}")
        while left or running:
            self._wait_for_one()
            unready = self._send_ready(requests, left, running)
            ended = set(waiting.some([*running, *unready]))
            if not running and waiting.stalls(timeout):
                self.helpers.restart_hung(timeout)
            for ref, run in list(running.items()):
                if ref in ended or self._is_over(run):
                    del running[ref]
                    result = self._collect(run, ref in ended, crashes[run.number], patience)
                    results[run.number] = result
                    if result:
                        patience = Patience(self._setup.patience)
                    else:
                        left.appendleft(run.number)
        return results

    def _send_ready(self, requests, left, running):
        """Send waiting requests whose images are there to free workers, and have the next ones drawn.

        Returns the references of images that free workers wait for.
        """
        here, busy = self.helpers.here, {run.member.number for run in running.values()}
        members = sorted(self._up.values(), key=lambda m: (m.node != here, m.node, m.number))
        free = {member.number: member for member in members if member.number not in busy}
        ahead = list(left)[: len(free) + len(self._up)]
        data = {requests[number].drawn.ref(): number for number in ahead}
        there, unready = ray.wait(list(data), num_returns=len(data), timeout=0, fetch_local=False)
        # An accuracy's requests, which follow those of gradients, are spread like these.
        alike = sum(request.returns > 1 for request in requests) or len(requests)
        for ref in there[: len(free)]:
            number, request = data[ref], requests[data[ref]]
            left.remove(number)
            # Neighbours in the list go to one node, where their gradients are added up.
            home = members[number % alike * len(members) // alike]
            member = free.pop(home.number if home.number in free else next(iter(free)))
            iteration, weightref = self._weights
            call = getattr(member.actor, request.method).options(num_returns=request.returns)
            refs = call.remote(iteration, [weightref, ref, *request.refs], *request.arguments)
            refs = refs if request.returns > 1 else [refs]
            run = SimpleNamespace(number=number, request=request, member=member, refs=refs)
            # After the deadline, its worker is asked whether it hangs.
            run.deadline, run.answer = time.monotonic() + self._setup.timeout, None
            running[refs[-1]] = run
        return unready if free else []

    def _is_over(self, run):
        """Whether a request's worker is lost or hangs: nobody waits for it longer."""
        if self._up.get(run.member.number) is not run.member:
            return True
        now, timeout = time.monotonic(), self._setup.timeout
        if run.answer is None:
            if now <= run.deadline:
                return False
            run.answer, run.deadline = run.member.actor.seconds_at_work.remote(), now + nodes.ANSWER
        hangs = nodes.hangs(run.answer, timeout)
        if hangs is False:
            run.answer, run.deadline = None, now + timeout
            say(f"worker {run.member.number} waits for weights or images")
            self.helpers.restart_hung(timeout)
        return now > run.deadline if hangs is None else hangs

    def _collect(self, run, ended, crashes, patience):
        """The Result of a request that has ended or is over; None if it must be computed again."""
        member = run.member
        try:
            value = ray.get(run.refs[-1], timeout=0)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, InputError):
                raise
            if isinstance(cause, RayError):  # not the call has failed, but what makes its images
                patience.bear(error)
                run.request.drawn.let_go()
            elif self._up.get(member.number) is member:
                why = first_line(error) if ended else f"no answer in {self._setup.timeout} s"
                if lives(member.node):
                    self._lose([member], f"worker {member.number} is lost ({why})")
                    short = isinstance(error, OutOfMemoryError)
                    self._room.failed(member.node, why, nodes.LEFT_ALONE if short else None)
                else:
                    self._lose_nodes({member.node})
                self._count_crash(run, crashes, error if cause else ClusterError(why))
            return None
        run.request.drawn.let_go()  # or a validation's images would all lie in the object store
        self._room.worked(member.node)
        return Result(value, member.number, member.node, run.refs[:-1])

    def _count_crash(self, run, crashes, error):
        """Raise the error if the request was too often what workers were lost with, wherever it ran."""
        crashes.append(run.member.node)
        counted = [node for node in crashes if lives(node)]
        untried = {member.node for member in self._up.values()} - set(counted)
        if len(counted) >= CRASHES and not untried:
            if isinstance(error, ClusterError):
                name = f"iteration {self.iteration}, {run.request.method} {run.number}"
                raise ClusterError(f"{name}: {len(counted)} workers failed: {error}")
            raise error


def _what(running):
    return f"{len(running)} workers that compute" if running else "images to be read again"


class Patience:
    """Bears errors of what Ray rebuilds, for so many seconds from the first one on."""

    def __init__(self, seconds):
        self._seconds, self._end = seconds, None

    def bear(self, error):
        """Wait for a moment, or raise the error if it is time."""
        self._end = self._end or time.monotonic() + self._seconds
        if time.monotonic() > self._end:
            raise error
        time.sleep(1)
