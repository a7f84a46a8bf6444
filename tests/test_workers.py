"""The pool of workers, the mean of their gradients, and how large objects travel, on a real Ray."""

from collections import Counter, namedtuple

import numpy as np
import psutil
import pytest
import ray
from ml_dtypes import bfloat16

import alexnet
import cluster
import functions
import results
import workers
from tests.support import THIN, Given, notes, noting_worker, two_workers, workers_of

NETWORK = {"layers": THIN, "num_classes": 10}


# ---- room


def test_precision_is_bfloat16_where_every_cpu_multiplies_it(one_ray):
    fast = "bfloat16" if functions.multiplies_bfloat16() else "float32"
    assert cluster.fastest_precision(1, 0) == fast
    assert cluster.fastest_precision(1, 1) == "float32"


def test_room_counts_whole_workers_a_node(one_ray):
    room = {(1, 0): 2, (2, 0): 1, (3, 0): 0, (1, 1): 2, (1, 2): 1}
    assert {share: sum(cluster.room_for_workers(*share).values()) for share in room} == room


def test_more_workers_than_this_machine_holds(one_ray):
    share = {"cpus": 3, "gpus": 0}
    with pytest.raises(cluster.ClusterError) as caught:
        workers.Workers(
            *(2, share, NETWORK, "float32", cluster.Helpers(), (100, 60), results.Report()),
            can_grow=False,
        )
    assert str(caught.value) == (
        "2 workers of 3 CPUs and 0 GPUs each were asked for, the cluster has room for 0: "
        "lower NUM_WORKERS or add nodes"
    )


# ---- gradients


def random_sets(count, *shapes):
    rng = np.random.default_rng(0)
    return [[rng.standard_normal(shape, np.float32) for shape in shapes] for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_mean_gradients_is_the_mean_by_a_fixed_tree(one_ray, count):
    shapes = (3, 4), (4,), (functions.BLOCK + 5, 2)
    sets, weights = random_sets(count, *shapes), [np.ones(shape, np.float32) for shape in shapes]
    helpers, got = cluster.Helpers(), [np.empty_like(weight) for weight in weights]
    refs, nodes = [ray.put(grads) for grads in sets], [helpers.here] * count
    sums = helpers.add_gradients(refs, nodes, print, 100)
    assert len(sums) == min(count, 2)
    norm = functions.mean_of(sums, count, weights, [0, 0, 0], got)
    assert norm == pytest.approx(np.linalg.norm([np.linalg.norm(mean) for mean in got]), rel=1e-3)
    tree = sets
    while len(tree) > 1:
        pairs = [tree[i : i + 2] for i in range(0, len(tree), 2)]
        tree = [[sum(g[1:], start=g[0]) for g in zip(*p, strict=True)] for p in pairs]
    for mean, total in zip(got, tree[0], strict=True):
        np.testing.assert_array_equal(mean, total * np.float32(1 / count))


@pytest.mark.parametrize("kind", [np.float32, bfloat16])
def test_mean_has_each_variables_decay(one_ray, kind):
    """Of float32 or of bfloat16's bits, and to the same bits wherever the gradients were added."""
    weights, a, b = ([x.astype(kind) for x in arrays] for arrays in random_sets(3, (30, 40), 40))
    sent = [
        [x.view(np.uint16) if kind is bfloat16 else x for x in arrays] for arrays in (weights, a, b)
    ]
    helpers = cluster.Helpers()
    added = ray.get(helpers.on(helpers.here).add_gradients.remote(*sent[1:]))
    got, same = ([np.empty(w.shape, np.float32) for w in weights] for _ in range(2))
    norm = functions.mean_of(sent[1:], 2, sent[0], [0.3, 0], got)
    assert norm == functions.mean_of([added], 2, sent[0], [0.3, 0], same)
    for x, y in zip(got, same, strict=True):
        np.testing.assert_array_equal(x, y)
    (w, _), (a, a_bias), (b, b_bias) = ([x.astype(np.float32) for x in xs] for xs in (weights, a, b))
    np.testing.assert_allclose(got[0], (a + b) / 2 + 0.3 * w, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], (a_bias + b_bias) / 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_mean_tells_any_value_that_is_not_finite(bad):
    weights = [np.ones((3, 4), np.float32), np.ones(5, np.float32)]
    sets = [[np.ones_like(weight) for weight in weights] for _ in range(2)]
    got = [np.empty_like(weight) for weight in weights]
    assert functions.all_finite(sets[1])
    assert np.isfinite(functions.mean_of(sets, 2, weights, [5e-4, 0], got))
    sets[1][0][2, 1] = bad
    assert not functions.all_finite(sets[1])
    assert not np.isfinite(functions.mean_of(sets, 2, weights, [5e-4, 0], got))


# ---- between nodes

Call = namedtuple("Call", "remote")


class Noted(cluster.Helpers):
    """Helpers on nodes that do not exist, so that there can be many: their calls are only noted."""

    def __init__(self):
        super().__init__()
        self.calls = {}  # the reference that a call returns -> node, arguments

    def on(self, node):
        """A helper that notes its calls."""

        def note(*arguments):
            ref = ray.put(None)
            self.calls[ref] = node, arguments
            return ref

        return namedtuple("NotedHelper", "fetch add_gradients")(Call(note), Call(note))


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_one_set_of_gradients_comes_to_this_node(one_ray, nodes):
    """Which sums are formed where, for two mini-batches a node."""
    helpers = Noted()
    names = [helpers.here, *range(1, nodes)]
    places = {ray.put(None): node for node in names for _ in "ab"}
    helpers.add_gradients(list(places), list(places.values()), print, 100)
    places |= {ref: node for ref, (node, _) in helpers.calls.items()}
    moves = [
        (places[part], node)
        for node, parts in helpers.calls.values()
        for part in parts
        if places[part] != node
    ]
    added = {part for _, parts in helpers.calls.values() for part in parts}
    moves += [(places[ref], helpers.here) for ref in places if ref not in added]
    moves = [(start, end) for start, end in moves if start != end]
    assert [end for _, end in moves].count(helpers.here) == (nodes > 1)
    assert len(moves) == nodes - 1 + (nodes > 2)


@pytest.mark.parametrize(("nodes", "rounds"), [(1, 0), (2, 1), (3, 2), (8, 3), (64, 6)])
def test_weights_are_passed_on_in_rounds(one_ray, nodes, rounds):
    """A node's copy begins when as many nodes have it as copy it."""
    helpers = Noted()
    names = [helpers.here, *range(1, nodes)]
    there = helpers.pass_on("weights", names)
    assert list(there) == names and there[helpers.here] is None
    assert {node: helpers.calls[there[node]][0] for node in names[1:]} == {n: n for n in names[1:]}
    assert all(arguments[0] == ["weights"] for _, arguments in helpers.calls.values())

    def round_of(ref):
        _, (_, *before) = helpers.calls[ref]
        return 1 + max(map(round_of, before), default=0)

    sizes = Counter(map(round_of, helpers.calls))
    assert max(sizes, default=0) == rounds
    assert all(sizes[number] <= 2 ** (number - 1) for number in sizes)


def test_a_helper_on_a_node_that_is_gone_is_forgotten(one_ray):
    helpers, gone = cluster.Helpers(), "0" * 56
    start = helpers.on(gone).pid.remote()
    helpers.on(helpers.here)
    with pytest.raises(ray.exceptions.ActorUnschedulableError):
        ray.get(start)
    helpers.restart_hung()
    assert helpers.nodes() == {helpers.here}


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
    actor, share = Remembered(), {"cpus": 1, "gpus": 0}
    common = share, NETWORK, "float32", cluster.Helpers(), (100, 60), results.Report(), True
    pool = workers.Workers(1, *common, actor=actor)
    del pool
    [handle] = actor.handles
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(handle.place.remote(), timeout=60)


def test_accuracy_does_not_keep_other_workers_waiting(one_ray, tmp_path):
    """While one worker is busy with an accuracy, another one computes all the mini-batches."""
    pool = two_workers(actor=noting_worker(tmp_path))
    pool.update_weights(0, ray.put([np.zeros(shape) for shape in alexnet.weight_shapes(**NETWORK)]))
    pool.print_accuracy(Given(None), None)  # this worker class has it wait for two gradients
    assert pool.compute_grad([Given(None), Given(None)], None, 1.0, 0) == [1.0, 1.0]
    calls = notes(tmp_path)
    assert [call.method for call in calls if call.method != "update_weights"] == [
        *["compute_grad"] * 2,
        "print_accuracy",
    ]
    assert calls[-1].pid not in {call.pid for call in calls if call.method == "compute_grad"}


# ---- two workers that are up


@pytest.fixture(scope="module")
def pool(one_ray):
    """Two workers, for all the tests below."""
    return two_workers()


def minibatch(rng, count=20):
    pixels = rng.integers(0, 256, (count, 224, 224, 3), np.uint8)
    return functions.MiniBatch(pixels, rng.integers(0, 10, count), np.zeros((count, 3), int))


def test_each_worker_is_a_process_beside_which_tasks_find_room(pool, tasks):
    assert pool.count == 2 and len(workers_of(psutil.Process().pid)) == 2
    # They hold both CPUs.
    labels, _ = tasks.start(functions.convert, ["a"], {"a": 1}, num_returns=2)
    assert ray.get(labels, timeout=30).tolist() == [1]


def test_distributed_mean_gradient_is_that_of_one_session_on_the_union(pool):
    rng = np.random.default_rng(0)
    minibatches, mean = [minibatch(rng) for _ in range(3)], rng.normal(120, 10, (256, 256, 3))
    mean, network = mean.astype(np.float32), alexnet.AlexNet(**NETWORK)
    network.restore(network.initial_state("he", rng))
    pool.update_weights(1, ray.put(network.weights()))
    losses = pool.compute_grad([Given(m) for m in minibatches], ray.put(mean), 1.0, 0)
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
    rng, sizes = np.random.default_rng(0), (2 * workers.VALIDATION_PIECE + 17, 1, 30)
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
    assert pool.validate(batches, ray.put(mean)) == pytest.approx(hits / sum(sizes), abs=1e-9)
    assert 0 < hits[0] < hits[1] < sum(sizes)
