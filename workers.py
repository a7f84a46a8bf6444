"""The workers of a run, as the driver sees them: the pool that shares out an iteration's requests and
replaces the lost, and the mean of the gradients."""

import itertools
import math
import os
import time
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce

import cv2
import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from cluster import ClusterError, room_for_workers
from functions import CPU_SLICE, Worker, aligned_empty, as_float32, generator

SLICES_LEFT_FREE = 2  # of the CPUs that a worker uses, for data tasks and a helper beside it

CRASHES_IN_A_ROW = 3  # of one request, or of workers that start, before the run gives up

VALIDATION_PIECE = 200  # images of one validation request: small, so that all workers end together

BLOCK = 2**19  # floats that are computed on at once: a few such blocks stay in the cache


def mean_of(sums, count, weights, decays, means):
    """Write the mean of `count` gradients plus weight decay into `means`; returns its norm, a float.

    The norm is not finite if any value is not. `sums` are the gradients' sum, or two parts of it, which
    gives the same bits. `decays` are numbers, one a variable: how much of the weight is added. All else
    are lists of arrays, one a variable: `means` float32, the others too or bfloat16's bits. It goes
    through memory once, block by block. OpenCV saves 10 ms of an iteration of 585 (bfloat16,
    `benchmarks/step.py` with NumPy instead), and its arithmetic decides the bits of every run.
    """
    rows = [[array.reshape(1, -1) for array in arrays] for arrays in (means, weights, *sums)]

    def one_block(variable, start):
        block = slice(start, start + BLOCK)  # of rows: OpenCV takes four values alone for a colour
        mean, weight, *parts = (as_float32(arrays[variable][:, block]) for arrays in rows)
        total = reduce(partial(np.add, out=mean), parts)
        cv2.addWeighted(total, 1 / count, weight, decays[variable], 0, dst=mean)
        return cv2.norm(mean, cv2.NORM_L2SQR)

    places = [(i, start) for i, mean in enumerate(rows[0]) for start in range(0, mean.size, BLOCK)]
    cpus = os.cpu_count()
    shares = [places[len(places) * i // cpus : len(places) * (i + 1) // cpus] for i in range(cpus)]
    with ThreadPoolExecutor(cpus) as threads:
        squares = threads.map(lambda share: [one_block(*place) for place in share], shares)
        return math.sqrt(sum(itertools.chain(*squares)))  # in the order of the blocks


def all_finite(arrays):
    """Whether no array holds a NaN or an infinity."""
    return all(np.isfinite(as_float32(array)).all() for array in arrays)


# A call of a worker's method, which returns so many values; `then` takes the last one once it is there.
Request = namedtuple("Request", "method arguments returns then", defaults=(1, lambda value: None))

# The last value of a request, the number of the worker that made it, references of the values before.
Result = namedtuple("Result", "value worker refs")

# The number of a request that a worker computes, until a deadline, and references of all its values.
Running = namedtuple("Running", "request worker deadline refs")


class Workers:
    """The workers of a run: starts them, shares out an iteration's requests, replaces the lost.

    An iteration is a fixed list of requests, each complete in itself. Any worker can take any of them,
    so which worker does, and how many there are, never changes a result.
    """

    def __init__(
        self, count, resources, network, precision, helpers, timeout, report, can_grow, actor=Worker
    ):
        """Start `count` workers; ClusterError if the cluster has no room for them and cannot grow.

        `resources` has the `cpus` and `gpus` of a worker, `network` AlexNet's layers and classes;
        `helpers` add the gradients; `timeout` bounds the seconds of one request; `report` is a
        results.Report; `actor` is the class of the workers.
        """
        self.count, self._resources, self._actor = count, resources, actor
        options = {"precision": precision, "threads": resources["cpus"], "gpus": resources["gpus"]}
        self._network = network | options
        self._helpers, self._timeout, self._report = helpers, timeout, report
        self._weights = None  # iteration, a list with the reference of its weights
        self._beside = []  # requests to run beside the next gradients
        self._requests, self._results = [], []  # those of this iteration's gradients
        self._up = {}  # number -> worker that is up
        self._nodes = {}  # number -> the node it is, or was, on
        self._means = []  # arrays of the mean gradients
        self._starting = {}  # reference that resolves once it is up -> number, worker
        self._failed_starts = 0
        if (shortage := self._shortage()) and not can_grow:
            raise ClusterError(f"{shortage}: lower NUM_WORKERS or add nodes")
        for number in range(count):
            self._start(number)

    def __del__(self):
        """End all workers, those that still start too: Ray would keep these, on a shared cluster."""
        if ray.is_initialized():
            for worker in [*self._up.values(), *(worker for _, worker in self._starting.values())]:
                ray.kill(worker)

    def _shortage(self):
        """What to say where the cluster has not room for all workers; nothing where it has."""
        room = room_for_workers(**self._resources)
        each = "{cpus} CPUs and {gpus} GPUs".format(**self._resources)
        asked = f"{self.count} workers of {each} each were asked for"
        return f"{asked}, the cluster has room for {room}" if room < self.count else ""

    def _start(self, number):
        worker = self._actor.options(
            num_cpus=self._resources["cpus"] - SLICES_LEFT_FREE * CPU_SLICE,
            num_gpus=self._resources["gpus"],
            scheduling_strategy="SPREAD",
        ).remote(self._network)
        self._starting[worker.node.remote()] = number, worker

    def _admit(self, timeout):
        """Take in the workers that have started, or do so within `timeout` seconds."""
        if not self._starting:
            return
        for ref in ray.wait(list(self._starting), timeout=timeout)[0]:
            number, worker = self._starting.pop(ref)
            try:
                self._nodes[number] = ray.get(ref)
            except RayActorError as error:
                self._failed_starts += 1
                if self._failed_starts == CRASHES_IN_A_ROW:
                    raise ClusterError(f"workers do not start: {first_line(error)}") from error
                self._start(number)
            else:
                self._failed_starts = 0
                self._up[number] = worker
                if self._weights:
                    self._report.say(f"worker {number} is back: {len(self._up)} of {self.count} are up")

    def wait(self, seconds):
        """Wait until all workers are up, at most `seconds`; ClusterError if they are not by then."""
        deadline, announced = time.monotonic() + seconds, False
        while self._starting:
            self._admit(timeout=1)
            shortage = self._shortage()
            if self._starting and time.monotonic() > deadline:
                up = f"only {len(self._up)} of {self.count} workers are up after {seconds} s"
                raise ClusterError(f"{shortage or up}: lower NUM_WORKERS or add nodes")
            if shortage and not announced:
                self._report.say(f"{shortage}: waiting up to {seconds} s for more nodes")
                announced = True

    def update_weights(self, iteration, weightref):
        """Have every worker load an iteration's weights, which all requests are about from now on."""
        self._admit(timeout=0)
        self._weights = iteration, [weightref]
        nodes = sorted({self._nodes[number] for number in self._up})
        passed_on = self._helpers.pass_on(weightref, nodes)
        for number, worker in self._up.items():
            worker.update_weights.remote(*self._weights, passed_on[self._nodes[number]])

    def print_accuracy(self, minibatch, mean):
        """Have one worker measure the accuracy of the weights just loaded, beside the next gradients.

        The report prints it as soon as it is there.
        """
        iteration, _ = self._weights
        then = partial(self._report.accuracy, iteration)
        self._beside = [Request("print_accuracy", (minibatch, mean), then=then)]

    def validate(self, batches, mean):
        """Top-1 and top-5 accuracy on all images of some batches, with the weights just loaded.

        The hits are counted, so that the result is exact, however the images are split.
        """
        requests = [
            Request("count_hits", (batch.images, batch.labels, start, stop, mean))
            for batch in batches
            for start in range(0, batch.count, VALIDATION_PIECE)
            for stop in [min(start + VALIDATION_PIECE, batch.count)]
        ]
        hits = sum(result.value for result in self._run(requests))
        return hits / sum(batch.count for batch in batches)

    def compute_grad(self, minibatches, mean, keep_probability, seed):
        """The losses of all mini-batches, all finite; their gradients stay where they were computed."""
        iteration, _ = self._weights
        self._requests = [
            Request("compute_grad", (minibatch, mean, keep_probability, dropout), returns=2)
            for index, minibatch in enumerate(minibatches)
            for dropout in [dropout_seed(seed, iteration, index)]
        ]
        results = self._run(self._beside + self._requests)
        self._results, self._beside = results[len(self._beside) :], []
        losses = [result.value for result in self._results]
        self._check(np.isfinite(losses), "loss")
        return losses

    def mean_gradients(self, decays):
        """The mean of the gradients just computed, plus weight decay (see `mean_of`), and its norm.

        The mean is a list of 16 float32 arrays, all finite; the next call uses them again. Gradients
        that a node took along when it died are computed again.
        """
        iteration, weightrefs = self._weights
        for _ in range(CRASHES_IN_A_ROW):
            try:
                gradients = [refs[0] for _, _, refs in self._results]
                nodes = [self._nodes[result.worker] for result in self._results]
                sums = self._helpers.add_gradients(gradients, nodes)
                [weights] = ray.get(weightrefs)
                self._means = self._means or [aligned_empty(weight.shape) for weight in weights]
                norm = mean_of(sums, len(gradients), weights, decays, self._means)
                if not math.isfinite(norm):
                    self._check([all_finite(ray.get(ref)) for ref in gradients], "gradient")
                    raise ClusterError(f"iteration {iteration}: the gradients' sum is not finite")
                self._results = []  # their references would keep the gradients in the object store
                return self._means, norm
            except (ObjectLostError, RayActorError, RayTaskError) as error:
                lost = getattr(error, "cause", error)
                if not isinstance(lost, ObjectLostError | RayActorError):
                    raise
                self._report.say(f"gradients are lost ({first_line(lost)}): they are computed again")
                self._results = self._run(self._requests)
        raise ClusterError(f"gradients were lost {CRASHES_IN_A_ROW} times in a row: {first_line(lost)}")

    def _check(self, finite, what):
        """ClusterError if one of this iteration's mini-batches has given something not finite."""
        for index, result in enumerate(self._results):
            if not finite[index]:
                where = f"iteration {self._weights[0]}: the {what} of mini-batch {index}"
                why = f"is not finite, on worker {result.worker}: lower LEARNING_RATE"
                raise ClusterError(f"{where} {why}")

    def _run(self, requests):
        """Share out requests, each to the first free worker; a list of a Result for each.

        A request whose worker dies or hangs goes to another worker.
        """
        waiting, crashes = deque(range(len(requests))), [0] * len(requests)
        results, running = [None] * len(requests), {}  # reference of a last value -> Running
        while waiting or running:
            self._admit(timeout=0 if self._up else self._timeout)
            if not self._up:
                where = f"iteration {self._weights[0]}"
                raise ClusterError(f"{where}: no worker left, and none could start")
            busy = {run.worker for run in running.values()}
            for number in [n for n in self._by_node() if n not in busy][: len(waiting)]:
                request = waiting.popleft()
                run = self._send(request, requests[request], number)
                running[run.refs[-1]] = run
            next_deadline = min(run.deadline for run in running.values())
            done, _ = ray.wait(list(running), timeout=max(0, next_deadline - time.monotonic()))
            now = time.monotonic()
            late = [ref for ref, run in running.items() if ref not in done and run.deadline < now]
            for ref in done + late:
                request, number, _, refs = running.pop(ref)
                try:
                    results[request] = Result(ray.get(ref, timeout=0), number, refs[:-1])
                    requests[request].then(results[request].value)
                except (RayActorError, GetTimeoutError) as error:
                    crashes[request] += 1
                    why = f"no answer in {self._timeout} s" if ref in late else first_line(error)
                    if crashes[request] == CRASHES_IN_A_ROW:
                        name = f"iteration {self._weights[0]}, {requests[request].method} {request}"
                        failed = f"{name}: {CRASHES_IN_A_ROW} workers failed: {why}"
                        raise ClusterError(failed) from error
                    waiting.appendleft(request)
                    self._replace(number, why)
        return results

    def _send(self, number, request, worker):
        """Have a worker compute a request, which has a number; what is Running then."""
        call = getattr(self._up[worker], request.method).options(num_returns=request.returns)
        refs = call.remote(*self._weights, *request.arguments)
        deadline = time.monotonic() + self._timeout
        return Running(number, worker, deadline, refs if request.returns > 1 else [refs])

    def _by_node(self):
        """Numbers of the workers that are up, those of this node first, then node by node."""
        nodes = self._nodes
        return sorted(self._up, key=lambda n: (nodes[n] != self._helpers.here, nodes[n], n))

    def _replace(self, number, why):
        worker = self._up.pop(number)
        ray.kill(worker)
        self._report.say(f"worker {number} is lost ({why}): {len(self._up)} of {self.count} go on")
        self._start(number)


def dropout_seed(seed, iteration, index):
    """Two integers that decide the dropout masks of a mini-batch."""
    return generator(seed, "dropout", iteration, index).integers(2**31, size=2).tolist()


def first_line(error):
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
