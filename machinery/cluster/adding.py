"""How sets of gradients are added up: in an order that is fixed by index, and in one pass.

A set is a list of arrays, one a variable, float32 or bfloat16's bits as uint16. A tree is the order in
which sets are added: the index of a set, or a pair of trees. Floats depend on it, so it never changes.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from ml_dtypes import bfloat16

BLOCK = 2**19  # floats that are added at once, in a core's cache: the bits of a norm depend on it


def tree_of(count):
    """The tree in which so many sets are added: two by two, again and again; an odd one out waits."""
    trees = list(range(count))
    while len(trees) > 1:
        pairs = [trees[i : i + 2] for i in range(0, len(trees), 2)]
        trees = [tuple(pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return trees[0]


def leaves(tree):
    """The indexes of a tree's sets, from left to right."""
    return [tree] if isinstance(tree, int) else [*leaves(tree[0]), *leaves(tree[1])]


def share_out(nodes, here):
    """Who adds up what, of sets that lie on `nodes`, so that the node `here` can form the sum of all.

    Returns a list of (node, tree), the additions of nodes in order, and the tree that is left for
    `here`. The sum of step i has the index len(nodes) + i. A node adds up the largest trees whose sets
    lie there. Where two trees of different nodes meet, their sum is formed on the node of the second.
    The last sum of all is formed on `here` if one of its two trees lies there.
    """
    steps = []

    def added(tree, node):
        if isinstance(tree, int):
            return tree
        steps.append((node, tree))
        return len(nodes) + len(steps) - 1

    def place(tree, wanted=None):
        if isinstance(tree, int):
            return tree, nodes[tree]
        (first, there), (second, node) = map(place, tree)
        if there == wanted != node:
            return (first, added(second, node)), there
        return (first if there == node else added(first, there), second), node

    tree, node = place(tree_of(len(nodes)), here)
    return steps, tree if node == here else added(tree, node)


def aligned_empty(shape):
    """A float32 array that starts at a multiple of 64 bytes: TensorFlow copies what does not."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def as_float32(values, out=None):
    """Float32 values themselves; bfloat16's bits, uint16, exactly as float32, in an array `out`."""
    if values.dtype == np.float32:
        return values
    out = np.empty(values.shape, np.float32) if out is None else out
    np.copyto(out, values.view(bfloat16))
    return out


def all_finite(arrays):
    """Whether no array holds a NaN or an infinity."""
    return all(np.isfinite(as_float32(array)).all() for array in arrays)


def sum_of_sets(tree, sets):
    """The sum of sets, a dict of index -> set, added in the order of a tree: float32 arrays."""
    sums = [np.empty(array.shape, np.float32) for array in sets[leaves(tree)[0]]]
    _by_block(tree, sets, sums, lambda *_: None)
    return sums


def mean_of(tree, sets, count, weights, decays, means):
    """Write the mean of `count` gradients plus weight decay into `means`; returns its norm, a float.

    The norm is not finite if any value is not. The gradients' sum is that of `sets`, a dict of index ->
    set, in the order of a tree. `decays` are numbers, one a variable: how much of the weight is added.
    `weights` are a set, `means` float32 arrays. OpenCV is faster than NumPy here; it decides the bits.
    """

    def finish(variable, block, total, mean):
        total, mean = total.reshape(1, -1), mean.reshape(1, -1)  # OpenCV takes a [4] for a colour
        weight = as_float32(weights[variable].reshape(-1)[block]).reshape(1, -1)
        cv2.addWeighted(total, 1 / count, weight, decays[variable], 0, dst=mean)
        return cv2.norm(mean, cv2.NORM_L2SQR)

    return math.sqrt(sum(_by_block(tree, sets, means, finish)))  # in the order of the blocks


def _by_block(tree, sets, outs, finish):
    """Add up sets block by block, in threads; returns what `finish` makes of each, in their order.

    `finish` takes a variable's number, a block as a slice, its sum, and that part of `outs`.
    """
    flat = {i: [array.reshape(-1) for array in arrays] for i, arrays in sets.items()}

    def one_block(variable, start):
        block = slice(start, start + BLOCK)
        out = outs[variable].reshape(-1)[block]
        total = _add_up(tree, {i: arrays[variable][block] for i, arrays in flat.items()}, [out])
        return finish(variable, block, total, out)

    places = [(i, start) for i, out in enumerate(outs) for start in range(0, out.size, BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(one_block, *zip(*places, strict=True)))  # also errors of a thread


def _add_up(tree, sets, rows, level=0):
    """The sum of blocks in the order of a tree: in its level's row, or a set itself if it is all."""
    if tree in sets:
        return as_float32(sets[tree], rows[level])
    if len(rows) == level + 1:
        rows.append(np.empty_like(rows[0]))
    first = _add_up(tree[0], sets, rows, level)
    second = _add_up(tree[1], sets, rows, level + 1)
    return np.add(first, second, out=rows[level])
