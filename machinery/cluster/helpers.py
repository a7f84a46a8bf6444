"""One helper on each node draws, passes on and adds up: large objects are used where they lie."""

from machinery.cluster import nodes
from machinery.cluster.adding import leaves, share_out
from machinery.cluster.tasks import limits, wait_for

import ray
from ray.experimental import get_object_locations


class Drawn:
    """A mini-batch that a helper draws of a batch. It can be drawn again, and is the same."""

    def __init__(self, helpers, batch, *arguments):
        """Nothing is drawn yet; `arguments` are those of the helper's `draw` after the batch."""
        self._helpers, self._batch = helpers, batch
        self._arguments, self._ref = arguments, None

    def ref(self, helper=None):
        """The reference of the mini-batch, which the first call has drawn: by `helper`, if given."""
        if self._ref is None:
            helper = helper or self._helpers.holding([self._batch])[0]
            refs = [self._batch.images, self._batch.labels]
            self._ref = helper.draw.remote(refs, *self._arguments)
        return self._ref

    def let_go(self):
        """It has been used, or is lost: the next call of `ref` draws it again."""
        self._ref = None


class Helpers:
    """The helpers of a run: actors of a class, which are started on the nodes that need one."""

    def __init__(self, actor):
        """Start none yet. `actor` is their class, a nodes.Actor: functions.Helper."""
        self._actor, self.here = actor, ray.get_runtime_context().get_node_id()
        self.at = {}  # node id -> actor: all nodes on which data or gradients lie

    def holding(self, batches):
        """For each batch the helper on a node that holds it, or on this one if Ray knows of none."""
        places = get_object_locations([batch.images for batch in batches])
        return [self.on((*places[batch.images]["node_ids"], self.here)[0]) for batch in batches]

    def on(self, node):
        """The helper on a node."""
        if node not in self.at:
            self.at[node] = self._actor.options(**nodes.on_node(node)).remote()
        return self.at[node]

    def let_go_hung(self):
        """End helpers that hang: their calls fail, and what they were to make is asked for again."""
        for node, actor in list(self.at.items()):
            if nodes.hangs(actor, limits["work"]):
                ray.kill(actor)
                del self.at[node]

    def pass_on(self, ref, there):
        """Start to copy an object from this node to others, in rounds.

        A round has as many copies as nodes hold the object by then: Ray copies from any of them, which
        saves time over slow links. Returns a dict of node -> reference that resolves once it is there.
        """
        arrived, before, rest = {self.here: ref}, [], [node for node in there if node != self.here]
        while rest:
            now, rest = rest[: len(arrived)], rest[len(arrived) :]
            before = [self.on(node).fetch.remote([ref], before) for node in now]
            arrived |= zip(now, before, strict=True)
        return arrived

    def add_gradients(self, gradients, there):
        """Have the nodes add up sets of gradients, given as references, where they lie (`share_out`).

        `there` names each set's node. Returns what is left to add: a tree, a dict of index -> set.
        """
        steps, tree = share_out(there, self.here)
        refs = list(gradients)
        for node, part in steps:
            indexes = leaves(part)
            sets = [refs[index] for index in indexes]
            refs.append(self.on(node).add_gradients.remote(part, indexes, sets))
        left = {index: refs[index] for index in leaves(tree)}
        sets = ray.get(wait_for([*left.values()], "Adding up gradients", self.let_go_hung))
        return tree, dict(zip(left, sets, strict=True))
