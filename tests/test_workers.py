"""The pool of workers, the mean of their gradients, and how large objects travel, on a real Ray."""

from collections import Counter, namedtuple

import alexnet
import functions
from machinery.cluster import adding, nodes, tasks
from machinery.cluster.helpers import Helpers
from machinery.errors import ClusterError
from tests.support import THIN, Given, notes, noting_worker, pool_of, two_workers, workers_of

import numpy as np
import psutil
import pytest
import ray

NETWORK = {"layers": THIN, "num_classes": 10}


# ---- room


def test_precision_is_bfloat16_where_every_cpu_is_faster_in_it(one_ray):
    [place] = nodes.places.known.values()
    fast = "bfloat16" if nodes.is_fast_in_bfloat16(place) else "float32"
    assert nodes.fastest_precision(1, 0) == fast
    assert nodes.fastest_precision(1, 1) == "float32"


def test_room_counts_whole_workers_a_node(one_ray):
    room = {(1, 0): 2, (2, 0): 1, (3, 0): 0, (1, 1): 2, (1, 2): 1}
    assert {share: sum(nodes.room_for_workers(*share).values()) for share in room} == room


def test_room_counts_memory(monkeypatch, caplog):
    """As in a container of 16 GB on a host of 64 CPUs: Ray takes 70% of its memory for tasks."""
    caplog.set_level("INFO", "driver")
    has = {
        "small": {"CPU": 64, "memory": 11.2e9},
        "large": {"CPU": 4, "memory": 1e11},
        "tiny": {"CPU": 2},
    }
    has["tiny"]["memory"] = 5e8
    there = [{"NodeID": name, "Resources": resources} for name, resources in has.items()]
    monkeypatch.setattr(nodes.Places, "usable", lambda self: there)
    monkeypatch.setattr(nodes, "places", nodes.Places())
    for _ in range(2):
        assert nodes.room_for_workers(1, 0) == {"small": 11, "large": 4, "tiny": 1}
    use = "a larger CPUS_PER_WORKER uses them"
    assert caplog.messages == [
        f"node small has memory for 11 workers only, its CPUs are for 64; {use}",
        f"node tiny has memory for 1 workers only, its CPUs are for 2; {use}",
    ]


def test_more_workers_than_this_machine_holds(one_ray):
    with pytest.raises(ClusterError) as caught:
        pool_of(2, cpus=3)
    assert str(caught.value) == (
        "2 workers of 3 CPUs and 0 GPUs each were asked for, the cluster has room for 0: "
        "lower NUM_WORKERS or add nodes"
    )


# ---- gradients


def test_gradients_are_added_up_by_helpers_and_here(one_ray):
    sets = [[np.full((3, 4), 2.0**-i, np.float32), np.full(5, float(i), np.float32)] for i in range(5)]
    helpers, refs = Helpers(functions.Helper), [ray.put(grads) for grads in sets]
    tree, left = helpers.add_gradients(refs, [helpers.here] * 5)
    assert tree == adding.tree_of(5) and list(left) == [0, 1, 2, 3, 4]
    helper = helpers.on(helpers.here)
    added = ray.get(helper.add_gradients.remote(tree, [0, 1, 2, 3, 4], refs))
    for total, *parts in zip(added, *sets, strict=True):
        np.testing.assert_array_equal(total, sum(parts))


# ---- between nodes

Call = namedtuple("Call", "remote")


class Noted(Helpers):
    """Helpers on nodes that do not exist, so that there can be many: their calls are only noted."""

    def __init__(self):
        super().__init__(None)
        self.calls = {}  # the reference that a call returns -> node, arguments

    def on(self, node):
        """A helper that notes its calls."""

        def note(*arguments):
            ref = ray.put(None)
            self.calls[ref] = node, arguments
            return ref

        return namedtuple("NotedHelper", "fetch")(Call(note))


@pytest.mark.parametrize(("count", "rounds"), [(1, 0), (2, 1), (3, 2), (8, 3), (64, 6)])
def test_weights_are_passed_on_in_rounds(one_ray, count, rounds):
    """A node's copy begins when as many nodes have it as copy it."""
    helpers = Noted()
    names = [helpers.here, *range(1, count)]
    there = helpers.pass_on("weights", names)
    assert list(there) == names and there[helpers.here] == "weights"
    assert {node: helpers.calls[there[node]][0] for node in names[1:]} == {n: n for n in names[1:]}
    assert all(arguments[0] == ["weights"] for _, arguments in helpers.calls.values())

    def round_of(ref):
        _, (_, before) = helpers.calls[ref]
        return 1 + max(map(round_of, before), default=0)

    sizes = Counter(map(round_of, helpers.calls))
    assert max(sizes, default=0) == rounds
    assert all(sizes[number] <= 2 ** (number - 1) for number in sizes)


def test_a_helper_on_a_node_that_is_gone_is_forgotten(one_ray):
    helpers, gone = Helpers(functions.Helper), "0" * 56
    start = helpers.on(gone).seconds_at_work.remote()
    helpers.on(helpers.here)
    with pytest.raises(ray.exceptions.ActorUnschedulableError):
        ray.get(start)
    helpers.let_go_hung()
    assert set(helpers.at) == {helpers.here}


# ---- workers of other classes


class Remembered:
    """functions.Worker as `actor`, of which this keeps all handles, so that Ray alone ends no actor."""

    def __init__(self):
        self.handles, self.made = [], None

    def options(self, **options):
        self.made = functions.Worker.options(**options)
        return self

    def remote(self, *arguments):
        self.handles.append(self.made.remote(*arguments))
        return self.handles[-1]


def test_workers_do_not_outlive_a_run(one_ray):
    """Also those that still start."""
    actor = Remembered()
    with pool_of(1, can_grow=True, actor=actor):
        pass
    [handle] = actor.handles
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(handle.seconds_at_work.remote(), timeout=60)


def test_a_run_begins_with_the_workers_that_find_room(one_ray, tmp_path, caplog):
    """A cluster that grows may not get all nodes, and a node can be lost while images are loaded."""
    caplog.set_level("INFO", "driver")
    with pool_of(3, patience=30, can_grow=True, actor=noting_worker(tmp_path)) as pool:
        pool.wait()
    lack = "3 workers of 1 CPUs and 0 GPUs each were asked for, the cluster has room for 2"
    assert caplog.messages == [
        f"{lack}: waiting up to 30 s for more nodes",
        f"only 2 of 3 workers are up: the run goes on with them ({lack})",
    ]


def test_an_accuracy_comes_after_the_gradients_and_is_shared_out(one_ray, tmp_path):
    weights = [np.zeros(shape) for shape in alexnet.weight_shapes(**NETWORK)]
    mean = ray.put(None)
    with two_workers(actor=noting_worker(tmp_path, [(7, 6)])) as pool:
        pool.update_weights(7, ray.put(weights))
        minibatches, parts = [[Given(None) for _ in range(count)] for count in (2, 4)]
        for sample, accuracy in (parts, 0.5), ([], None):
            computed = functions.compute_grad(pool, minibatches, sample, mean, 1.0, 0)
            assert computed == ([1.0, 1.0], accuracy)
    methods = [call.method for call in notes(tmp_path) if call.method != "update_weights"]
    assert Counter(methods[:6]) == {"compute_grad": 2, "print_accuracy": 4}
    assert methods[0] == "compute_grad" and methods[6:] == ["compute_grad"] * 2


# ---- two workers that are up


@pytest.fixture(scope="module")
def pool(one_ray):
    """Two workers, for all the tests below."""
    with two_workers() as pool:
        yield pool


def minibatch(rng, count=20):
    pixels = rng.integers(0, 256, (count, 224, 224, 3), np.uint8)
    return functions.MiniBatch(pixels, rng.integers(0, 10, count), np.zeros((count, 3), int))


def test_each_worker_is_a_process_beside_which_tasks_find_room(pool):
    assert pool.count == 2 and len(workers_of(psutil.Process().pid)) == 2
    # They hold both CPUs.
    labels, _ = tasks.start(functions.convert, ["t/a"], functions.label_table({"a": 1}), num_returns=2)
    assert ray.get(labels, timeout=30).tolist() == [1]


def test_distributed_mean_gradient_is_that_of_one_session_on_the_union(pool):
    rng = np.random.default_rng(0)
    minibatches, mean = [minibatch(rng) for _ in range(3)], rng.normal(120, 10, (256, 256, 3))
    mean, network = mean.astype(np.float32), alexnet.AlexNet(**NETWORK)
    network.restore(network.initial_state("he", rng))
    pool.update_weights(1, ray.put(network.weights()))
    given = [Given(m) for m in minibatches]
    losses, _ = functions.compute_grad(pool, given, [], ray.put(mean), 1.0, 0)
    got, norm = pool.mean_gradients([0] * 16)

    whole = functions.MiniBatch(*map(np.concatenate, zip(*minibatches, strict=True)))
    inputs = functions.subtract_mean(whole, mean), functions.one_hot(whole.labels, 10)
    union, loss = network.compute_grad(*inputs, 1.0, [0, 0])
    assert np.mean(losses) == pytest.approx(loss, rel=1e-5)
    for a, b in zip(got, union, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    assert norm == pytest.approx(np.sqrt(sum(np.vdot(b, b) for b in union)), rel=1e-5)


def test_validation_counts_every_image_of_batches_that_are_split(pool):
    """A batch larger than one request, and smaller ones, against one session on all images."""
    rng, sizes = np.random.default_rng(0), (2 * functions.VALIDATION_PIECE + 17, 1, 30)
    mean, network = np.full((256, 256, 3), 120, np.float32), alexnet.AlexNet(**NETWORK)
    network.restore(network.initial_state("he", rng))
    batches, hits = [], np.zeros(2, int)
    for size in sizes:
        images = rng.integers(0, 256, (size, 8, 8, 3), np.uint8).repeat(32, 1).repeat(32, 2)
        labels = rng.integers(0, 10, size).astype(np.int32)
        batches.append(functions.Batch(ray.put(images), ray.put(labels), size))
        centred = images[:, 16:240, 16:240] - mean[16:240, 16:240]
        hits += network.count_hits(centred, functions.one_hot(labels, 10))
    pool.update_weights(2, ray.put(network.weights()))
    shares = functions.validate(pool, batches, ray.put(mean))
    assert shares == pytest.approx(hits / sum(sizes), abs=1e-9)
    assert 0 < hits[0] < hits[1] < sum(sizes)
