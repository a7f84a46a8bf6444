"""The Ray cluster that a run is on: joining it, the room on its nodes, and how large objects travel
between them."""

import json
import math
import os
from pathlib import Path

import ray
from ray.experimental import get_object_locations
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from functions import CPU_SLICE, Helper, multiplies_bfloat16, random_batch
from imagenet import IMAGE_SIZE

CARRIED_MODULES = ("alexnet", "decoding", "functions", "imagenet")  # what runs on other nodes


class ClusterError(Exception):
    """A cluster that cannot be joined, or on which workers do not stay up. The message is one line."""


def connect(**start_options):
    """Join the Ray cluster in RAY_ADDRESS or the one running here (True), or else start one (False).

    The runtime environment carries the project's modules to every node, and nothing else; none if this
    is a Ray job whose working directory brings them. `start_options` are for a cluster that it starts.
    """
    if ray.is_initialized():
        return True
    here = Path(__file__).resolve().parent
    modules = [str(here / f"{name}.py") for name in CARRIED_MODULES]
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    brought = "working_dir" in job and here == Path.cwd()
    options = {"logging_level": "ERROR", "log_to_driver": False}
    options["runtime_env"] = {} if brought else {"py_modules": modules}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address != "local":  # Ray's word for a cluster of one's own
            ray.init("auto", **options)
            return True
    except ConnectionError as error:
        if address:
            hint = "check it, and that RAY_AUTH_MODE and the token are the cluster's"
            raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS={address}: {hint}") from error
    ray.init("local", include_dashboard=False, **options, **start_options)
    return False


def nodes_alive():
    """The cluster's nodes that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def on_node(node):
    """Ray's strategy to place a task or an actor on a node, or elsewhere if that node is gone."""
    return NodeAffinitySchedulingStrategy(node, soft=True)


def data_task_options():
    """Ray options of a data task: a slice of a CPU, and memory for at most two tasks a CPU."""
    nodes = [node["Resources"] for node in nodes_alive()]
    shares = [n["memory"] / n["CPU"] / 2 for n in nodes if n.get("CPU") and n.get("memory")]
    return {"num_cpus": CPU_SLICE, "memory": int(min(shares, default=0))}


def room_for_workers(cpus, gpus):
    """How many workers of so many CPUs and GPUs the nodes of the cluster hold together."""
    room = 0
    for node in nodes_alive():
        has = node["Resources"]
        by_gpu = has.get("GPU", 0) // gpus if gpus else math.inf
        room += int(min(has.get("CPU", 0) // cpus, by_gpu))
    return room


def fastest_precision(gpus):
    """The precision in which the cluster's workers are fastest, "bfloat16" or "float32".

    bfloat16 where every node's CPU multiplies in it; on GPUs, float32.
    """
    if gpus:
        return "float32"
    ask = ray.remote(num_cpus=0)(multiplies_bfloat16)
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in nodes_alive() if node["NodeID"] != here]
    answers = [ask.options(scheduling_strategy=on_node(node)).remote() for node in others]
    return "bfloat16" if all([multiplies_bfloat16(), *ray.get(answers)]) else "float32"


def memory_needed(images):
    """A line that says what decoded images take of memory, and of disk if the stores are too small."""
    store = ray.cluster_resources().get("object_store_memory", 0)
    pixels = images * IMAGE_SIZE * IMAGE_SIZE * 3
    text = f"About {images} images: {pixels / 1e9:.1f} GB decoded"
    text += f", the object stores hold {store / 1e9:.1f} GB"
    if pixels > store:
        text += f": {(pixels - store) / 1e9:.1f} GB goes to disk (Ray spills it), and is slower"
    return text


class Helpers:
    """One Helper on each node that needs one, so that large objects are used where they lie."""

    def __init__(self):
        """Start none yet."""
        self.here = ray.get_runtime_context().get_node_id()
        self._on = {}  # node id -> Helper

    def at(self, refs):
        """The Helper of each object: on a node that holds it, or on this node if Ray knows of none."""
        places = get_object_locations(refs)
        return [self.on((*places[ref]["node_ids"], self.here)[0]) for ref in refs]

    def on(self, node):
        """The helper on a node."""
        if node not in self._on:
            self._on[node] = Helper.options(scheduling_strategy=on_node(node)).remote()
        return self._on[node]

    def draw_minibatches(self, batches, size, count, seed, iteration):
        """References to an iteration's `count` mini-batches, each `size` images of a random batch."""
        chosen = [random_batch(batches, seed, "batch", iteration, index) for index in range(count)]
        helpers = self.at([batch.images for batch in chosen])
        keys = [(seed, "crop", iteration, index) for index in range(count)]
        return [
            helper.draw_minibatch.remote(batch.images, batch.labels, size, key)
            for helper, batch, key in zip(helpers, chosen, keys, strict=True)
        ]

    def draw_sample(self, batches, size, seed, iteration):
        """A reference to at most `size` images of a random batch, for an accuracy."""
        batch = random_batch(batches, seed, "accuracy", iteration)
        (helper,) = self.at([batch.images])
        return helper.draw_sample.remote(batch.images, batch.labels, size)

    def pass_on(self, ref, nodes):
        """Start to copy an object from this node to others, in rounds.

        The first round has one copy. Each later round has as many copies as nodes hold the object by
        then, since Ray copies from any of them. So this node sends about one copy a round, instead of
        one a node. To 11 others over slow links it took 0.65 [0.39..1.13] of the time, to 7 over faster
        ones 1.07 [0.68..1.19] (`benchmarks/links.py`).
        Returns a dict of node -> reference that resolves once the object is there; None for this node.
        """
        arrived, before = {self.here: None}, []
        rest = [node for node in nodes if node != self.here]
        while rest:
            now, rest = rest[: len(arrived)], rest[len(arrived) :]
            before = [self.on(node).fetch.remote([ref], *before) for node in now]
            arrived |= zip(now, before, strict=True)
        return arrived

    def add_gradients(self, gradients, nodes):
        """Sets of gradients, given as references, added up to one or two sets, returned as arrays.

        `nodes` names the node on which each set lies. Sets are added two by two in the order of the
        list. This tree is fixed, so that the floats are the same wherever the sets lie. Each sum is
        formed on the node of its second part. If the sets of this node come first in the list, at most
        one set comes here from another node.
        """
        placed = list(zip(gradients, nodes, strict=True))
        while len(placed) > 2 or (len(placed) == 2 and self.here not in (placed[0][1], placed[1][1])):
            pairs = [placed[i : i + 2] for i in range(0, len(placed), 2)]
            placed = [self._add(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
        return ray.get([gradients for gradients, _ in placed])

    def _add(self, first, second):
        (a, _), (b, node) = first, second
        return self.on(node).add_gradients.remote(a, b), node
