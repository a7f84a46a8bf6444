"""One helper on each node draws, passes on and adds up: large objects are used where they lie."""

import time

from machinery.cluster import nodes
from machinery.cluster.adding import leaves, share_out
from machinery.cluster.tasks import Waiting

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.experimental import get_object_locations

START = 60  # seconds in which a helper has started


class Drawn:
    """A mini-batch that a helper draws of a batch. It can be drawn again, and is the same."""

    def __init__(self, helpers, method, batch, *arguments):
        """Name the helper's method, and its arguments after the batch; nothing is drawn yet."""
        self._helpers, self._method, self._batch = helpers, method, batch
        self._arguments, self._ref = arguments, None

    def ref(self, helper=None):
        """The reference of the mini-batch, which the first call has drawn: by `helper`, if given."""
        if self._ref is None:
            draw = getattr(helper or self._helpers.holding([self._batch])[0], self._method)
            self._ref = draw.remote([self._batch.images, self._batch.labels], *self._arguments)
        return self._ref

    def let_go(self):
        """It has been used, or is lost: the next call of `ref` draws it again."""
        self._ref = None


class Helpers:
    """The helpers of a run: actors of a class, which are started on the nodes that need one."""

    def __init__(self, actor):
        """Start none yet. `actor` is their class, a nodes.Actor: functions.Helper."""
        self._actor, self.here = actor, ray.get_runtime_context().get_node_id()
        self._on = {}  # node id -> actor
        self._starts = {}  # node id -> reference that resolves once it is up, and when it was started

    def holding(self, batches):
        """For each batch the helper on a node that holds it, or on this one if Ray knows of none."""
        places = get_object_locations([batch.images for batch in batches])
        return [self.on((*places[batch.images]["node_ids"], self.here)[0]) for batch in batches]

    def on(self, node):
        """The helper on a node."""
        if node not in self._on:
            strategy = {"scheduling_strategy": nodes.on_node(node)}
            self._on[node] = self._actor.options(**strategy, **nodes.modules).remote()
            self._note_start(node)
        return self._on[node]

    def _note_start(self, node):
        self._starts[node] = self._on[node].seconds_at_work.remote(), time.monotonic()

    def nodes(self):
        """The nodes that have a helper: all on which data or gradients lie."""
        return set(self._on)

    def let_go(self, dead):
        """Forget the helpers of nodes that are dead."""
        for node in dead & set(self._on):
            del self._on[node]

    def restart_hung(self, seconds):
        """Start helpers anew that have been at work for so many seconds, or do not answer.

        Ray repeats the calls of one that was up; those of one that has never come up fail, and it is
        forgotten.
        """
        asked = {}
        for node, (up, since) in [(node, self._starts[node]) for node in self._on]:
            try:
                ray.get(up, timeout=0)
                asked[node] = nodes.Health(self._on[node], seconds)
            except GetTimeoutError:
                if time.monotonic() - since > START:
                    ray.kill(self._on.pop(node))
            except RayError:  # its node is gone, and Ray has known it for a place of images until now
                del self._on[node]
        for node, health in asked.items():
            if health.hangs(wait=nodes.ANSWER) is not False:
                ray.kill(self._on[node], no_restart=False)
                self._note_start(node)

    def pass_on(self, ref, there):
        """Start to copy an object from this node to others, in rounds.

        A round has as many copies as nodes hold the object by then, since Ray copies from any of them:
        so this node sends about one a round. To 11 others over slow links it took 0.65 [0.39..1.13] of
        the time, to 7 over faster ones 1.07 [0.68..1.19] (`benchmarks/links.py`). Returns a dict of
        node -> reference that resolves once the object is there; None for this node.
        """
        arrived, before, rest = {self.here: None}, [], [node for node in there if node != self.here]
        while rest:
            now, rest = rest[: len(arrived)], rest[len(arrived) :]
            before = [self.on(node).fetch.remote([ref], before) for node in now]
            arrived |= zip(now, before, strict=True)
        return arrived

    def add_gradients(self, gradients, there, timeout):
        """Have the nodes add up sets of gradients, given as references, where they lie (`share_out`).

        `there` names the node of each set. Returns what is left to add: a tree, and a dict of index ->
        set for it.
        """
        steps, tree = share_out(there, self.here)
        refs = list(gradients)
        for node, part in steps:
            indexes = leaves(part)
            sets = [refs[index] for index in indexes]
            refs.append(self.on(node).add_gradients.remote(part, indexes, sets))
        left = {index: refs[index] for index in leaves(tree)}
        missing, waiting = set(left.values()), Waiting(lambda: "The gradients are still added up")
        restart = timeout
        while missing := missing - set(waiting.some(list(missing))):
            if waiting.still_for() > restart:
                self.restart_hung(timeout)
                restart += timeout
        return tree, dict(zip(left, ray.get([*left.values()]), strict=True))
