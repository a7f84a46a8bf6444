"""Remote functions on batches, on a real Ray: labels, shuffle, mean image, mini-batches, gradients."""

from collections import Counter
from unittest import mock

import numpy as np
import pytest
import ray
from ml_dtypes import bfloat16

import functions
from functions import NO_LABEL, Batch


def put_batches(sizes, side=256):
    """Batches of images that each are filled with their own number, which is their label too."""
    batches, start = [], 0
    for size in sizes:
        labels = np.arange(start, start + size, dtype=np.int32)
        images = np.empty((size, side, side, 3), np.uint8)
        images[:] = labels[:, None, None, None]
        batches.append(Batch(ray.put(images), ray.put(labels), size))
        start += size
    return batches


def test_convert_looks_names_up_and_reports_the_missing(cluster):
    pairs = ray.put({"a.JPEG": 3, "b.JPEG": 0})
    labels, report = ray.get(functions.convert.remote(["b.JPEG", "c.JPEG", "a.JPEG"], pairs))
    assert labels.dtype == np.int32
    assert labels.tolist() == [0, NO_LABEL, 3]
    assert report == {"images": 2, "unlabelled": 1, "named": ["'c.JPEG'"]}


def test_match_drops_unlabelled_images_and_empty_batches(cluster, capsys):
    images = [ray.put(np.full((n, 4, 4, 3), n, np.uint8)) for n in (2, 3, 1, 0)]
    names = [["a", "b"], ["c", "x", "d"], ["y"], []]
    pairs = ray.put({"a": 0, "b": 1, "c": 2, "d": 3})
    converted = [functions.convert.remote(batch, pairs) for batch in names]
    reports = [ray.put({"key": "a.tar", "images": 1, "left_out": 0}) for _ in images]
    loaded = [(refs, None, report) for refs, report in zip(images, reports, strict=True)]
    batches = functions.match("bucket", loaded, converted, "flags")
    assert [batch.count for batch in batches] == [2, 2]
    assert [ray.get(batch.labels).tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert ray.get(batches[1].images).shape == (2, 4, 4, 3)
    assert "2 images have no label and are left out: 'x', 'y'" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [(5, 3, 4, 1), (3, 2, 4), (6,)])
def test_shuffle_keeps_every_image_once_with_its_label(cluster, sizes):
    batches = put_batches(sizes, side=8)
    for number in range(5):
        batches = functions.shuffle_round(batches, 0, number)
        images, labels = (ray.get([getattr(b, part) for b in batches]) for part in ("images", "labels"))
        assert sorted(np.concatenate(labels).tolist()) == list(range(sum(sizes)))
        for batch, pixels, label in zip(batches, images, labels, strict=True):
            assert len(pixels) == len(label) == batch.count
            assert (pixels == label[:, None, None, None]).all()
    assert sorted(batch.count for batch in batches) == sorted(sizes)


def test_shuffle_pairs_are_disjoint_mixed_and_decided_by_the_seed(cluster):
    def shuffled(seed):
        mixed = functions.shuffle_round(put_batches([50] * 4, side=2), seed, 0)
        return [ray.get(batch.labels).tolist() for batch in mixed]

    first = shuffled(1)
    assert first == shuffled(1) != shuffled(2)
    for a, b in (first[:2], first[2:]):  # each pair holds the images of exactly two batches
        assert len({image // 50 for image in a + b}) == 2
        assert len({image // 50 for image in a}) == 2


def test_after_three_rounds_a_batch_has_images_of_eight(cluster):
    batches = put_batches([160] * 8, side=1)
    for number in range(3):
        batches = functions.shuffle_round(batches, 0, number)
    for labels in ray.get([batch.labels for batch in batches]):
        counts = np.bincount(labels // 160, minlength=8)
        assert counts.min() >= 8 and counts.max() <= 34  # 20 are due


def test_an_odd_batch_out_takes_part_in_another_round(cluster):
    batches = put_batches([40] * 3, side=2)
    for number in range(5):
        batches = functions.shuffle_round(batches, 0, number)
    for batch in batches:
        assert len({image // 40 for image in ray.get(batch.labels).tolist()}) == 3


def test_mean_image_is_exact(cluster):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (n, 6, 5, 3), np.uint8) for n in (4, 1, 7)]
    batches = [Batch(ray.put(a), None, len(a)) for a in arrays]
    mean = ray.get(functions.mean_image(batches))
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean, np.concatenate(arrays).mean(axis=0).astype(np.float32))


def test_one_hot():
    assert functions.one_hot(np.array([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crop_image_crops_and_mirrors(dtype):
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(dtype)
    image.flags.writeable = False  # as from the object store
    assert (functions.crop_image(image, (3, 32, 0)) == image[3:227, 32:256]).all()
    assert (functions.crop_image(image, (0, 1, 1)) == image[:224, 1:225][:, ::-1]).all()


def draw(batches, **changes):
    arguments = {"size": 20, "count": 2, "seed": 0, "iteration": 3} | changes
    return ray.get(functions.Helpers().draw_minibatches(batches, **arguments))


def test_minibatches_are_random_crops_decided_by_seed_iteration_and_index(cluster):
    batches = put_batches([30, 60])
    minibatches = draw(batches)
    for pixels, labels, crops in minibatches:
        assert pixels.shape == (20, 224, 224, 3)
        assert pixels.dtype == np.uint8
        assert (pixels == labels[:, None, None, None]).all()
        assert crops[:, :2].min() >= 0 and crops[:, :2].max() <= 32
        assert len(np.unique(crops[:, 0])) > 5 and set(crops[:, 2]) == {0, 1}
    assert minibatches[0][1].tolist() != minibatches[1][1].tolist()
    again, other = draw(batches), draw(batches, iteration=4)
    assert all((a[2] == b[2]).all() for a, b in zip(minibatches, again, strict=True))
    assert not all((a[2] == b[2]).all() for a, b in zip(minibatches, other, strict=True))
    # Index 0 is the same mini-batch however many there are.
    assert (draw(batches, count=5)[0][2] == minibatches[0][2]).all()


def test_every_crop_can_occur_at_the_edges(cluster):
    crops = np.concatenate([m[2] for m in draw(put_batches([5]), count=20)])
    assert crops[:, 0].min() == crops[:, 1].min() == 0
    assert crops[:, 0].max() == crops[:, 1].max() == 32


def test_random_batch_is_as_likely_as_it_is_large():
    batches = [Batch(None, None, 10), Batch(None, None, 90)]
    drawn = [functions.random_batch(batches, 0, "batch", i).count for i in range(1000)]
    assert 70 < drawn.count(10) < 130


def test_an_accuracys_sample_is_bounded_and_cropped_at_the_centre(cluster):
    helpers, batches = functions.Helpers(), put_batches([250])
    pixels, labels, crops = ray.get(helpers.draw_sample(batches, 100, 0, 0))
    assert len(pixels) == 100 and len(set(labels.tolist())) == 100
    assert set(map(tuple, crops)) == {(16, 16, 0)}
    assert len(ray.get(helpers.draw_sample(put_batches([7]), 100, 0, 0))[1]) == 7


def test_the_mean_is_subtracted_under_the_same_crop():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (256, 256, 3), np.uint8)
    crops = np.array([[0, 32, 0], [5, 9, 1]])
    pixels = np.stack([functions.crop_image(image, crop) for crop in crops])
    assert not functions.subtract_mean(pixels, crops, image.astype(np.float32)).any()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_mean_gradients_is_the_mean_by_a_fixed_tree(cluster, count):
    rng = np.random.default_rng(0)
    shapes = (3, 4), (4,), (functions.BLOCK + 5, 2)
    sets = [[rng.standard_normal(shape, np.float32) for shape in shapes] for _ in range(count)]
    weights = [np.ones(shape, np.float32) for shape in shapes]
    helpers, got = functions.Helpers(), [np.empty_like(weight) for weight in weights]
    sums = helpers.add_gradients([ray.put(grads) for grads in sets], [helpers.here] * count)
    assert len(sums) == min(count, 2)
    norm = functions.mean_of(sums, count, weights, 0.0, got)
    assert norm == pytest.approx(np.linalg.norm([np.linalg.norm(mean) for mean in got]), rel=1e-3)
    tree = sets
    while len(tree) > 1:
        pairs = [tree[i : i + 2] for i in range(0, len(tree), 2)]
        tree = [[sum(g[1:], start=g[0]) for g in zip(*p, strict=True)] for p in pairs]
    for mean, total in zip(got, tree[0], strict=True):
        np.testing.assert_array_equal(mean, total * np.float32(1 / count))


@pytest.mark.parametrize("kind", [np.float32, bfloat16])
def test_mean_has_the_decay_of_the_kernels(cluster, kind):
    """Of float32 or of bfloat16's bits, and to the same bits wherever the gradients were added."""
    rng = np.random.default_rng(0)
    weights, a, b = (
        [rng.standard_normal(shape, np.float32).astype(kind) for shape in ((30, 40), 40)] for _ in "wab"
    )
    sent = [
        [x.view(np.uint16) if kind is bfloat16 else x for x in arrays] for arrays in (weights, a, b)
    ]
    helper = functions.Helpers().on(ray.get_runtime_context().get_node_id())
    added = ray.get(helper.add_gradients.remote(*sent[1:]))
    got, same = ([np.empty(w.shape, np.float32) for w in weights] for _ in range(2))
    norm = functions.mean_of(sent[1:], 2, sent[0], 0.3, got)
    assert norm == functions.mean_of([added], 2, sent[0], 0.3, same)
    for x, y in zip(got, same, strict=True):
        np.testing.assert_array_equal(x, y)
    (w, _), (a, a_bias), (b, b_bias) = ([x.astype(np.float32) for x in xs] for xs in (weights, a, b))
    np.testing.assert_allclose(got[0], (a + b) / 2 + 0.3 * w, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], (a_bias + b_bias) / 2)


@pytest.mark.parametrize("shape", [(), (5,), (3, 7, 11), (1000, 1001)])
def test_aligned_arrays_start_at_a_multiple_of_64_bytes(shape):
    arrays = [functions.aligned_empty(shape) for _ in range(10)]
    assert all(array.ctypes.data % 64 == 0 for array in arrays)
    assert all(array.shape == shape and array.dtype == np.float32 for array in arrays)
    for i, array in enumerate(arrays):
        array[...] = i
    assert [array.sum() for array in arrays] == [i * array.size for i, array in enumerate(arrays)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_mean_tells_any_value_that_is_not_finite(bad):
    weights = [np.ones((3, 4), np.float32), np.ones(5, np.float32)]
    sets = [[np.ones_like(weight) for weight in weights] for _ in range(2)]
    got = [np.empty_like(weight) for weight in weights]
    assert functions.all_finite(sets[1])
    assert np.isfinite(functions.mean_of(sets, 2, weights, 5e-4, got))
    sets[1][0][2, 1] = bad
    assert not functions.all_finite(sets[1])
    assert not np.isfinite(functions.mean_of(sets, 2, weights, 5e-4, got))


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_one_set_of_gradients_comes_to_this_node(nodes):
    """Which sums are formed where, for two mini-batches a node, by helpers that only take notes."""
    helpers = functions.Helpers.__new__(functions.Helpers)
    helpers.here, moves = 0, []

    class Note:
        def __init__(self, node):
            self.add_gradients, self.node = self, node

        def remote(self, first, second):
            moves.extend((place, self.node) for _, place in (first, second) if place != self.node)
            return ("sum", first, second), self.node

    helpers.on = Note
    gradients = [(index, index // 2) for index in range(2 * nodes)]
    with mock.patch.object(ray, "get", list):
        last = helpers.add_gradients(gradients, [node for _, node in gradients])
    moves += [(place, 0) for _, place in last if place != 0]
    assert [to for _, to in moves].count(0) == (nodes > 1)
    assert len(moves) == nodes - 1 + (nodes > 2)


@pytest.mark.parametrize(("nodes", "rounds"), [(1, 0), (2, 1), (3, 2), (8, 3), (64, 6)])
def test_weights_are_passed_on_in_rounds(nodes, rounds):
    """By helpers that only take notes: a node's copy begins when as many nodes have it as copy it."""
    helpers = functions.Helpers.__new__(functions.Helpers)
    helpers.here, waits_for = 0, {}

    class Note:
        def __init__(self, node):
            self.fetch, self.node = self, node

        def remote(self, refs, *before):
            assert refs == ["weights"]
            waits_for[self.node] = before
            return self.node

    helpers.on = Note
    there = helpers.pass_on("weights", range(nodes))
    assert there == {0: None} | {node: node for node in range(1, nodes)}

    def round_of(node):
        return 1 + max(map(round_of, waits_for[node]), default=0)

    sizes = Counter(map(round_of, waits_for))
    assert max(sizes, default=0) == rounds
    assert all(sizes[number] <= 2 ** (number - 1) for number in sizes)


def test_precision_is_bfloat16_where_every_cpu_multiplies_it(cluster, monkeypatch):
    has_it = functions.multiplies_bfloat16._function()
    assert functions.fastest_precision(0) == ("bfloat16" if has_it else "float32")
    assert functions.fastest_precision(1) == "float32"


def test_room_counts_whole_workers_a_node(cluster):
    assert functions.room_for_workers(1, 0) == 2
    assert functions.room_for_workers(2, 0) == 1
    assert functions.room_for_workers(3, 0) == 0
    assert functions.room_for_workers(1, 1) == 2
    assert functions.room_for_workers(1, 2) == 1
