"""The workers of a run, as the driver sees them: a pool that shares out an iteration's requests and
replaces the lost."""

import math
import time
from collections import Counter, deque, namedtuple
from importlib.metadata import version

import numpy as np
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

import cluster
from adding import all_finite, mean_of
from cluster import CRASHES_IN_A_ROW, Patience, Room, ask, first_line, lives, on_node
from functions import CPU_SLICE, Worker, aligned_empty, generator
from imagenet import PATIENCE
from joining import ClusterError, carried
from s3 import InputError
from watching import waits

SLICES_LEFT_FREE = 2  # of the CPUs that a worker uses, for data tasks beside it
SIGNALS = 0.2  # seconds of one wait in Ray, which looks for signals only once a second
MOMENT = 0.001  # seconds in which answers are taken together
VALIDATION_PIECE = 200  # images of one validation request: small, so that all workers end together

# A call of a worker's method, which returns so many values. It is sent once the Drawn mini-batch, which
# is its first argument, is there.
Request = namedtuple("Request", "method drawn arguments returns", defaults=(1,))

# The last value of a request, the worker and the node that it is from, references of the values before.
Result = namedtuple("Result", "value worker node refs")

# A worker that is up: the handle of its actor, its node, and its functions.Place.
Member = namedtuple("Member", "number actor node place")

# A worker that starts on a node, until a deadline.
Starting = namedtuple("Starting", "number actor node deadline")

# The number of a request that a Member computes, until a deadline, and references of all its values.
Running = namedtuple("Running", "request member deadline refs")


class Workers:
    """The workers of a run: starts them, shares out an iteration's requests, replaces the lost.

    An iteration is a fixed list of requests, each complete in itself. Any worker can take any of them,
    so which worker does, and how many there are, never changes a result.
    """

    def __init__(
        self, count, resources, network, precision, helpers, timeouts, report, can_grow, actor=Worker
    ):
        """Start `count` workers; ClusterError if the cluster has no room for them and cannot grow.

        `resources` has the `cpus` and `gpus` of a worker, `network` AlexNet's layers and classes;
        `helpers` draw mini-batches and add gradients; `timeouts` bound the seconds of one request, and
        those of a start or of waiting for room; `report` is a results.Report; `actor` is the class of
        the workers.
        """
        self.count, self._resources, self._actor = count, resources, actor
        options = {"precision": precision, "threads": resources["cpus"], "gpus": resources["gpus"]}
        self._network = network | options
        self._helpers, self._report = helpers, report
        self._timeout, self._patience = timeouts
        self._can_grow, self._asked = can_grow, False
        self._room = Room(resources, helpers.here, report.say)
        self._weights = None  # iteration, a list with the reference of its weights
        self._accuracy_requests = []  # to run after the next gradients
        self._requests, self._results = [], []  # those of this iteration's gradients
        self._means = []  # arrays of the mean gradients
        self._up = {}  # number -> Member
        self._starting = {}  # reference of its Place, once the worker is up -> Starting
        self._in_bfloat16 = False  # a worker whose CPU has no instructions for it would take minutes
        if shortage := self._shortage():
            if not can_grow:
                raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
            self._ask_for_nodes()
        self._start_missing()

    def __del__(self):
        """End all workers, those that still start too: Ray would keep these, on a shared cluster."""
        if ray.is_initialized():
            for worker in [*self._up.values(), *self._starting.values()]:
                ray.kill(worker.actor)
            if self._asked:
                request_resources(bundles=[])

    def _shortage(self):
        """What to say where the cluster has not room for all workers; nothing where it has."""
        room = sum(cluster.room_for_workers(**self._resources).values())
        each = "{cpus} CPUs and {gpus} GPUs".format(**self._resources)
        asked = f"{self.count} workers of {each} each were asked for"
        return f"{asked}, the cluster has room for {room}" if room < self.count else ""

    def _ask_for_nodes(self):
        """Tell an autoscaler what the workers need: they start only on nodes that are there."""
        bundle = {"CPU": self._resources["cpus"], "GPU": self._resources["gpus"]}
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
                num_cpus=self._resources["cpus"] - SLICES_LEFT_FREE * CPU_SLICE,
                num_gpus=self._resources["gpus"],
                scheduling_strategy=on_node(node),
                **carried(),
            ).remote(self._network)
            deadline = time.monotonic() + self._patience
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
                    late_start = f"not up in {self._patience} s"
                    self._room.failed(start.node, first_line(error) if ref in done else late_start)

    def _take_in(self, start, place):
        if self._in_bfloat16 and not place.bfloat16:
            ray.kill(start.actor)
            self._room.limit(start.node, 0)
            why = "its CPU has no instructions for bfloat16, in which this run computes"
            self._report.say(f"node {start.node[:8]} is left alone: {why}")
            return
        self._up[start.number] = Member(start.number, start.actor, start.node, place)
        if self._weights:
            up = f"{len(self._up)} of {self.count} are up"
            self._report.say(f"worker {start.number} is back: {up}")

    def _wait_for_one(self):
        """Wait until a worker is up; ClusterError if none can start, or if no node has room."""
        deadline = time.monotonic() + self._patience
        where = f"iteration {self._weights[0]}: " if self._weights else ""
        self._admit(timeout=0)
        if not self._up:
            self._report.say(f"{where}no worker is left: waiting up to {self._patience} s for one")
        while not self._up:
            self._admit(timeout=1)
            if not self._up and (self._room.given_up() or time.monotonic() > deadline):
                why = "no node has room for one"
                if self._room.why:
                    why = f"workers fail: {self._room.why}"
                raise ClusterError(f"{where}no worker is left, and none could start: {why}")

    def wait(self):
        """Wait until all workers are up; go on with fewer if some cannot start or find no room.

        ClusterError if none is up by then.
        """
        deadline, announced = time.monotonic() + self._patience, False
        while len(self._up) < self.count:
            self._admit(timeout=1)
            shortage, late = self._shortage(), time.monotonic() > deadline
            if len(self._up) == self.count:
                break
            if shortage and late and not self._up:
                raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
            if shortage and not announced:
                self._report.say(f"{shortage}: waiting up to {self._patience} s for more nodes")
                if self._can_grow:
                    self._ask_for_nodes()
                announced = True
            if late or (not shortage and self._room.why and not self._starting and self._up):
                self._wait_for_one()
                up = f"{len(self._up)} of {self.count} workers are up"
                why = shortage or self._room.why or f"the others need more than {self._patience} s"
                self._report.say(f"only {up}: the run goes on with them ({why})")
                break
            if self._room.given_up():
                self._wait_for_one()
        places = [member.place for member in self._up.values()]
        in_bfloat16 = self._network["precision"] == "bfloat16"
        self._in_bfloat16 = in_bfloat16 and all(place.bfloat16 for place in places)

    def machine(self):
        """What the last bits of a result depend on: a dict of texts."""
        cpus = sorted({member.place.cpu for member in self._up.values()})
        if len(cpus) > 1:
            models = "; ".join(cpus)
            self._report.say(f"CPUs of several models ({models}): two runs may differ in the last bits")
        return {"CPU": "; ".join(cpus), "TensorFlow": version("tensorflow")}

    def update_weights(self, iteration, weightref):
        """Have every worker load an iteration's weights, which all requests are about from now on."""
        self._admit(timeout=0)
        self._weights = iteration, [weightref]
        nodes = sorted({member.node for member in self._up.values()})
        passed_on = self._helpers.pass_on(weightref, nodes)
        for member in self._up.values():
            member.actor.update_weights.remote(*self._weights, passed_on[member.node])

    def print_accuracy(self, sample, mean):
        """Have the workers measure the accuracy of the weights just loaded, after the next gradients.

        `sample` are Drawn mini-batches, for as many workers: so it costs their forward passes and no
        more. The report prints it.
        """
        self._accuracy_requests = [Request("print_accuracy", part, (mean,)) for part in sample]

    def validate(self, batches, mean):
        """Top-1 and top-5 accuracy on all images of some batches, with the weights just loaded.

        The hits are counted, so that the result is exact, however the images are split.
        """
        pieces = [
            self._helpers.draw_piece(batch, start, min(start + VALIDATION_PIECE, batch.count))
            for batch in batches
            for start in range(0, batch.count, VALIDATION_PIECE)
        ]
        results = self._run([Request("count_hits", piece, (mean,)) for piece in pieces])
        return sum(result.value for result in results) / sum(batch.count for batch in batches)

    def compute_grad(self, minibatches, mean, keep_probability, seed):
        """The losses of all mini-batches, all finite; their gradients stay where they were computed."""
        iteration, _ = self._weights
        self._requests = [
            Request("compute_grad", minibatch, (mean, keep_probability, dropout), returns=2)
            for index, minibatch in enumerate(minibatches)
            for dropout in [dropout_seed(seed, iteration, index)]
        ]
        results = self._run(self._requests + self._accuracy_requests)
        self._results, hits = results[: len(minibatches)], results[len(minibatches) :]
        if hits:
            right, of = sum(result.value for result in hits)
            self._report.accuracy(iteration, right / of)
        self._accuracy_requests = []
        losses = [result.value for result in self._results]
        self._check(np.isfinite(losses), "loss")
        return losses

    def mean_gradients(self, decays):
        """The mean of the gradients just computed, plus weight decay (see `mean_of`), and its norm.

        The mean is a list of 16 float32 arrays, all finite; the next call uses them again. Gradients
        that a node took along when it died are computed again.
        """
        iteration, weightrefs = self._weights
        patience = Patience(self._patience)
        while True:
            try:
                gradients = [result.refs[0] for result in self._results]
                nodes = [result.node for result in self._results]
                left = self._helpers.add_gradients(gradients, nodes, self._report.say, self._timeout)
                [weights] = ray.get(weightrefs)
                self._means = self._means or [aligned_empty(weight.shape) for weight in weights]
                norm = mean_of(*left, len(gradients), weights, decays, self._means)
                if not math.isfinite(norm):
                    self._check([all_finite(ray.get(ref)) for ref in gradients], "gradient")
                    raise ClusterError(f"iteration {iteration}: the gradients' sum is not finite")
                self._results = []  # their references would keep the gradients in the object store
                return self._means, norm
            except RayError as error:
                patience.bear(error)
                why = first_line(error)
                self._report.say(f"gradients are lost ({why}): they are computed again")
                self._lose_dead_nodes()
                self._results = self._run(self._requests)

    def _check(self, finite, what):
        """ClusterError if one of this iteration's mini-batches has given something not finite."""
        for index, result in enumerate(self._results):
            if not finite[index]:
                where = f"iteration {self._weights[0]}: the {what} of mini-batch {index}"
                hint = "lower LEARNING_RATE, and remove this iteration's checkpoint"
                raise ClusterError(f"{where} is not finite, on worker {result.worker}: {hint}")

    def _run(self, requests):
        """Share out requests, each to the first free worker; a list of a Result for each.

        A request whose worker is lost goes to another worker.
        """
        waiting, crashes, patience = deque(range(len(requests))), {}, Patience(self._patience)
        results, running = [None] * len(requests), {}  # reference of a last value -> Running
        moved = said = time.monotonic()
        while waiting or running:
            self._admit(timeout=0)
            if not self._up:
                self._wait_for_one()
            unready = self._send_ready(requests, waiting, running)
            refs, now = [*running, *unready], time.monotonic()
            done, _ = ray.wait(refs, timeout=SIGNALS, fetch_local=False)
            if done:  # take all that have ended: a look at every worker after each would be quadratic
                done, _ = ray.wait(refs, num_returns=len(refs), timeout=MOMENT, fetch_local=False)
                moved = said = now = time.monotonic()
            if now - said > PATIENCE:
                what = f"{len(running)} workers that compute" if running else "images to be read again"
                self._report.say(f"Iteration {self._weights[0]} waits for {what}")
                said = now
            if not running and now - moved > self._timeout:
                self._helpers.restart_hung()
                moved = now
            ended = set(done)
            over = self._over(running, ended)
            for ref in [ref for ref in running if ref in ended or ref in over]:
                run = running.pop(ref)
                result = self._collect(run, ref in ended, requests[run.request], crashes, patience)
                results[run.request] = result
                if result:
                    patience.renew()
                else:
                    waiting.appendleft(run.request)
        return results

    def _send_ready(self, requests, waiting, running):
        """Send waiting requests whose images are there to free workers, and have the next ones drawn.

        Returns the references of images that free workers wait for.
        """
        busy, members = {run.member.number for run in running.values()}, self._by_node()
        free = {member.number: member for member in members if member.number not in busy}
        ahead = list(waiting)[: len(free) + len(self._up)]
        data = {requests[number].drawn.ref(): number for number in ahead}
        there, unready = ray.wait(list(data), num_returns=len(data), timeout=0, fetch_local=False)
        ready = set(there)
        # An accuracy's requests, which follow those of gradients, are spread like these.
        alike = sum(request.returns > 1 for request in requests) or len(requests)
        for number in [data[ref] for ref in data if ref in ready][: len(free)]:
            waiting.remove(number)
            # Neighbours in the list go to one node, where their gradients are added up.
            home = members[number % alike * len(members) // alike]
            member = free.pop(home.number if home.number in free else next(iter(free)))
            run = self._send(number, requests[number], member)
            running[run.refs[-1]] = run
        return unready if free else []

    def _send(self, number, request, member):
        """Have a worker compute a request, which has a number; what is Running then."""
        call = getattr(member.actor, request.method).options(num_returns=request.returns)
        refs = call.remote(*self._weights, request.drawn.ref(), *request.arguments)
        deadline = time.monotonic() + self._timeout
        return Running(number, member, deadline, refs if request.returns > 1 else [refs])

    def _over(self, running, ended):
        """References of requests whose worker is lost or takes too long: nobody waits for them longer.

        A late worker that still waits for weights or images gets more time.
        """
        over = {ref for ref, run in running.items() if self._up.get(run.member.number) != run.member}
        for ref, run in running.items():
            if ref not in over and ref not in ended and run.deadline < time.monotonic():
                if ask(run.member.node, waits, run.member.place.pid):
                    self._report.say(f"worker {run.member.number} waits for weights or images")
                    self._helpers.restart_hung()
                    running[ref] = run._replace(deadline=time.monotonic() + self._timeout)
                else:
                    over.add(ref)
        return over

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
                why = first_line(error) if ended else f"no answer in {self._timeout} s"
                self._lose(member, why, isinstance(error, OutOfMemoryError))
                self._count_crash(run, request, crashes, error if cause else ClusterError(why))
            return None
        request.drawn.let_go()  # or a validation's images would all lie in the object store
        self._room.worked(member.node)
        return Result(value, member.number, member.node, run.refs[:-1])

    def _count_crash(self, run, request, crashes, error):
        """Raise the error if the request was too often what workers were lost with, wherever it ran."""
        nodes = crashes.setdefault(run.request, [])
        nodes.append(run.member.node)
        counted = [node for node in nodes if lives(node)]
        untried = {member.node for member in self._up.values()} - set(counted)
        if len(counted) >= CRASHES_IN_A_ROW and not untried:
            name = f"iteration {self._weights[0]}, {request.method} {run.request}"
            if isinstance(error, ClusterError):
                raise ClusterError(f"{name}: {len(counted)} workers failed: {error}")
            raise error

    def _by_node(self):
        """The workers that are up: those of this node first, then node by node."""
        here = self._helpers.here
        return sorted(self._up.values(), key=lambda m: (m.node != here, m.node, m.number))

    def _lose(self, member, why, out_of_memory=False):
        """Let a worker go, or all workers of its node if that is dead: others start in their place."""
        if not lives(member.node):
            self._lose_nodes({member.node})
            return
        del self._up[member.number]
        ray.kill(member.actor)
        if out_of_memory:
            left = sum(other.node == member.node for other in self._up.values())
            self._room.limit(member.node, max(1, left))
        up = f"{len(self._up)} of {self.count} go on"
        self._report.say(f"worker {member.number} is lost ({why}): {up}")
        self._room.failed(member.node, why)

    def _lose_nodes(self, nodes):
        """Let all workers and helpers of dead nodes go."""
        for node in nodes:
            lost = [member for member in self._up.values() if member.node == node]
            for member in lost:
                del self._up[member.number]
                ray.kill(member.actor)
            if lost:
                up = f"{len(self._up)} of {self.count} go on"
                self._report.say(f"node {node[:8]} is lost with {len(lost)} workers: {up}")
        self._helpers.let_go(nodes)
        if self._can_grow and len(self._up) < self.count:
            self._ask_for_nodes()

    def _lose_dead_nodes(self):
        nodes = self._helpers.nodes() | {member.node for member in self._up.values()}
        self._lose_nodes({node for node in nodes if not lives(node)})


def dropout_seed(seed, iteration, index):
    """Two integers that decide the dropout masks of a mini-batch."""
    return generator(seed, "dropout", iteration, index).integers(2**31, size=2).tolist()
