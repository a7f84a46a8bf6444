"""How sets of gradients are added up: the order, who adds what, the mean, its decay and its norm."""

from machinery.cluster import adding

import numpy as np
import pytest
from ml_dtypes import bfloat16

SHAPES = (3, 4), (4,), (adding.BLOCK + 5, 2)


def random_sets(count, *shapes):
    rng = np.random.default_rng(0)
    return [[rng.standard_normal(shape, np.float32) for shape in shapes] for _ in range(count)]


def two_by_two(sets):
    """Sets added by the plainest code: two by two, in the order of the list."""
    while len(sets) > 1:
        pairs = [sets[i : i + 2] for i in range(0, len(sets), 2)]
        sets = [[sum(g[1:], start=g[0]) for g in zip(*pair, strict=True)] for pair in pairs]
    return sets[0]


def assert_equal(arrays, others):
    for a, b in zip(arrays, others, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_mean_is_of_a_sum_in_a_fixed_order(count):
    sets, weights = random_sets(count, *SHAPES), [np.ones(shape, np.float32) for shape in SHAPES]
    got, tree = [np.empty_like(weight) for weight in weights], adding.tree_of(count)
    norm = adding.mean_of(tree, dict(enumerate(sets)), count, weights, [0, 0, 0], got)
    assert norm == pytest.approx(np.linalg.norm([np.linalg.norm(mean) for mean in got]), rel=1e-3)
    assert_equal(got, [total * np.float32(1 / count) for total in two_by_two(sets)])


@pytest.mark.smoke
@pytest.mark.parametrize("kind", [np.float32, bfloat16])
def test_the_mean_has_each_variables_decay(kind):
    """Of float32 or of bfloat16's bits, and to the same bits if the gradients were added before."""
    weights, a, b = ([x.astype(kind) for x in arrays] for arrays in random_sets(3, (30, 40), 40))
    sent, *sets = [
        [x.view(np.uint16) if kind is bfloat16 else x for x in arrays] for arrays in (weights, a, b)
    ]
    sets = dict(enumerate(sets))
    got, same = ([np.empty(w.shape, np.float32) for w in weights] for _ in range(2))
    norm = adding.mean_of((0, 1), sets, 2, sent, [0.3, 0], got)
    added = {2: adding.sum_of_sets((0, 1), sets)}
    assert norm == adding.mean_of(2, added, 2, sent, [0.3, 0], same)
    assert_equal(got, same)
    (w, _), (a, a_bias), (b, b_bias) = ([x.astype(np.float32) for x in xs] for xs in (weights, a, b))
    np.testing.assert_allclose(got[0], (a + b) / 2 + 0.3 * w, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], (a_bias + b_bias) / 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_norm_tells_any_value_that_is_not_finite(bad):
    weights = [np.ones((3, 4), np.float32), np.ones(5, np.float32)]
    sets = {i: [np.ones_like(weight) for weight in weights] for i in range(2)}
    got = [np.empty_like(weight) for weight in weights]
    assert adding.all_finite(sets[1])
    assert np.isfinite(adding.mean_of((0, 1), sets, 2, weights, [5e-4, 0], got))
    sets[1][0][2, 1] = bad
    assert not adding.all_finite(sets[1])
    assert not np.isfinite(adding.mean_of((0, 1), sets, 2, weights, [5e-4, 0], got))


def test_float32_of_all_bfloat16_is_exact():
    bits = np.arange(2**16, dtype=np.uint16)
    wide = adding.as_float32(bits)
    np.testing.assert_array_equal(wide, bits.view(bfloat16).astype(np.float32))


def follow(nodes, here):
    """The sum that a plan makes of sets on `nodes`, in words, and the moves (from, to) of sets."""
    steps, tree = adding.share_out(nodes, here)
    places, moves, sums = list(nodes), [], [str(index) for index in range(len(nodes))]

    def read(tree, node):
        if isinstance(tree, int):
            moves.extend([(places[tree], node)] if places[tree] != node else [])
            return sums[tree]
        return f"({read(tree[0], node)} + {read(tree[1], node)})"

    for node, part in steps:
        sums.append(read(part, node))
        places.append(node)
    return read(tree, here), moves


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33])
def test_the_order_is_the_same_wherever_sets_lie(count):
    rng = np.random.default_rng(count)
    whole, moves = follow([0] * count, 0)
    assert not moves
    for _ in range(100):
        nodes = rng.integers(0, rng.integers(1, 6), count).tolist()
        assert follow(nodes, 0)[0] == whole


@pytest.mark.parametrize("each", [1, 2, 16])
@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_one_set_comes_to_this_node(nodes, each):
    """If the sets of a node are neighbours, and those of this node come first."""
    _, moves = follow([node for node in range(nodes) for _ in range(each)], 0)
    assert [end for _, end in moves].count(0) == (nodes > 1)
    assert len(moves) == nodes - 1 + (nodes > 2)


def test_sets_of_this_node_are_not_added_before_the_mean():
    assert adding.share_out([0] * 16, 0) == ([], adding.tree_of(16))
    steps, tree = adding.share_out([0, 0, 1, 1], 0)
    assert steps == [(1, (2, 3))] and tree == ((0, 1), 4)
