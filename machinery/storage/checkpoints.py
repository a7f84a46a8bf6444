"""Checkpoints, from which a run resumes: the state of its network, and the facts about the run."""

import dataclasses
import json
import logging
import math
import re
from concurrent.futures import ThreadPoolExecutor

from machinery.errors import InputError, one_line
from machinery.storage.places import as_they_end, open_place, write_errors
from machinery.storage.tf1 import tf

say = logging.getLogger("driver").info

FLAG = "--checkpoint-dir"
STATE = "checkpoint"  # the file in which TensorFlow looks for the names of checkpoints


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint says of its run, as JSON: all that decides how the run goes on."""

    iteration: int = 0  # how many steps have made the weights
    mini_batches: int | None = None  # of an iteration
    precision: str | None = None
    stored: str | None = None  # the form of the images in memory
    epoch: float | None = None  # how many iterations it has
    run: dict = dataclasses.field(default_factory=dict)  # texts: constants, fingerprints of data, CPUs
    held_out: dict | None = None  # fingerprints of the data that validations are on
    validated: int = 0  # the iteration of the last validation
    best: list | None = None  # iteration and top-1 of the best validation so far, which is saved


@dataclasses.dataclass
class Start:
    """Where a run begins: at a checkpoint, or at iteration 0, where nothing is known yet.

    `state` is the network's, and `mean` the mean image that its images are centred by. `reached` is the
    newest iteration of all checkpoints; `trained` says that nothing is left to train.
    """

    place: str | None
    facts: Facts = dataclasses.field(default_factory=Facts)
    state: dict | None = None
    mean: object = None
    reached: int = 0
    trained: bool = False
    run: dict = dataclasses.field(default_factory=dict)  # what `must_match` was told

    @property
    def iteration(self):
        """How many steps have made the weights."""
        return self.facts.iteration

    def must_match(self, run, fixed=()):
        """InputError unless the texts in `run` that are `fixed` are as saved; says what has changed."""
        was = self.facts.run
        changed = {key: was[key] for key in run if key in was and was[key] != run[key]}
        if wrong := [f"{key} (was {was})" for key, was in changed.items() if key in fixed]:
            what = f"is of another run: different are {', '.join(wrong)}"
            hint = f"restore that or name another {FLAG}"
            if "tars" in changed and "tars" in fixed:
                same = "ETags tell; if the same tars were only uploaded again in another way"
                hint = f"{same}, set CHECK_TARS = False in driver.py, or else {hint}"
            raise InputError(f"{self.place} {what}; {hint}")
        for key, before in changed.items():
            say(f"{key} is {run[key]} from here on, was {before}")
        if new := [f"{key} = {run[key]}" for key in run if was and key not in was]:
            say(f"From here on {' and '.join(new)}: the checkpoints in {self.place} do not say it")
        self.run |= run

    def go_on(self, machine, stored, **facts):
        """The Facts of the run from here on, on a machine that is described by a dict of texts."""
        self.must_match({"STORED": repr(stored), **machine})
        return dataclasses.replace(self.facts, stored=stored, run=self.run, **facts)

    def take_state(self):
        """The network's state, which is let go here: it takes 500 MB."""
        state, self.state = self.state, None
        return state

    def validate_on(self, held_out):
        """Take the fingerprints of a held-out set, None if there is none.

        What was best on another set is forgotten.
        """
        if held_out not in (None, self.facts.held_out):
            if self.facts.best:
                say("The held-out set is another one: its best checkpoint is looked for from here on")
            new = {"held_out": held_out, "validated": 0, "best": None}
            self.facts = dataclasses.replace(self.facts, **new)


class Checkpoints:
    """Checkpoints in TensorFlow's own format, which `tf.train` reads; the newest three and the best are
    kept.

    A checkpoint is the state of an AlexNet, the mean image, and a run's Facts. TensorFlow writes it
    under names that nobody reads and renames them, the index last. If `place` is in S3, a thread puts
    it there in the same order, and the file `checkpoint`, which names it, last.
    """

    KEPT = 3

    def __init__(self, place):
        """Open a folder or `s3://bucket/prefix`; InputError if it cannot be written, or is in use."""
        ours = r"ckpt-\d+\..*|checkpoint"
        self._folder = open_place(FLAG, place, mark=r"checkpoint\.(lock|owner)", ours=ours)
        self.place = self._folder and self._folder.place
        self.saved = self._newest = 0  # iterations of the newest whole checkpoint, and of the last try
        self.best = None  # iteration and top-1 of the best one so far, which is whole
        self.lost_best = None  # those of a better one whose save has failed
        self._damaged = set()  # names of checkpoints, which are left alone
        self._putter, self._putting = ThreadPoolExecutor(1), set()
        if place:
            with write_errors(FLAG, place):
                self._folder.lock(FLAG, STATE)
                for leftover in self._folder.path.glob(
                    "ckpt-*.tempstate*"
                ):  # of a save that was killed
                    leftover.unlink()

    def claim(self, facts):
        """The place is this run's from here on."""
        self.best = facts.best
        if self.place:
            self._folder.claim()

    def close(self):
        """Leave the place to others."""
        if self.place:
            self._folder.close()

    def _iterations(self):
        """Those of the complete checkpoints, in order: the index is there once the data is."""
        found = [re.fullmatch(r"ckpt-(\d+)\.index", file) for file in self._folder.names()]
        return sorted(int(match[1]) for match in found if match)

    def start(self, iterations=math.inf, wanted=False):
        """The Start of a run up to so many iterations: the newest intact checkpoint, or iteration 0.

        If there is a checkpoint of that iteration or a later one, and one is `wanted`, to be evaluated
        or exported, then this is the newest intact one that is not later than `iterations`. Says which
        ones are damaged; InputError if there are none but damaged ones.
        """
        there = self._iterations() if self.place else []
        reached = there[-1] if there else 0
        trained = reached >= iterations
        limit = iterations if trained and wanted else math.inf
        usable = [iteration for iteration in there if iteration <= limit]
        for iteration in reversed(usable):
            if start := self._read(iteration):
                start.reached, start.trained = reached, trained and (wanted or iteration >= iterations)
                self.saved = self._newest = iteration
                return start
        if len(usable) < len(there):
            none = f"no intact checkpoint up to iteration {iterations} is kept"
            raise InputError(f"{self.place}: {none}; there are {', '.join(map(str, there))}")
        if there:
            raise InputError(f"{self.place}: no checkpoint is intact; remove them to start anew")
        return Start(self.place)

    def _read(self, iteration):
        """The Start at a checkpoint; None if that is damaged."""
        try:
            for file in _files(iteration):
                self._folder.download(file)
            reader = tf.train.load_checkpoint(str(self._folder.path / f"ckpt-{iteration}"))
            # Reading a tensor verifies its checksum.
            state = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
            facts, mean = Facts(**json.loads(state.pop("facts"))), state.pop("mean")
            return Start(self.place, facts, state, mean)
        except InputError:
            raise
        except Exception as error:  # TensorFlow's reader raises anything on damaged bytes
            why = one_line(error)[:120]
            say(f"{self.place}: ckpt-{iteration} is damaged and left out: {why}")
            self._damaged.add(iteration)
            return None

    def save(self, network, facts, mean, top1=None):
        """Write a checkpoint of a network; if it goes to S3, wait only for the one before it.

        With the top-1 accuracy of its weights, it is written only if that is the best so far, and not
        there yet. Without it, an iteration that has been tried is not tried again. A save that fails is
        said, no more.
        """
        iteration = network.iteration
        if not self.place or (top1 is None and iteration == self._newest):
            return
        self.wait()
        best = self.best
        if top1 is not None:
            if best and top1 <= best[1]:
                return
            best = [iteration, top1]
            if iteration == self.saved:  # the next checkpoint says that this one is the best
                self.best = best
                return
        facts = dataclasses.replace(facts, iteration=iteration, best=best)
        prefix = str(self._folder.path / f"ckpt-{iteration}")
        text = json.dumps(dataclasses.asdict(facts))
        if self._tried(facts, lambda: network.save(prefix, text, mean)):
            self._putting = {self._putter.submit(self._tried, facts, lambda: self._put(facts))}
        self._newest = iteration

    def wait(self):
        """Wait until the last save has ended; `saved` is then the iteration of the newest whole one."""
        for putting in as_they_end(self._putting):
            putting.result()

    def _tried(self, facts, do):
        """Whether a part of a save could be done. A failure is said."""
        try:
            with write_errors(FLAG, self.place):
                do()
        except InputError as error:
            if facts.best and facts.best[0] == facts.iteration:
                self.lost_best = max(facts.best, self.lost_best or facts.best, key=lambda lost: lost[1])
            say(f"The checkpoint of iteration {facts.iteration} is not saved: {error}")
            return False
        return True

    def _put(self, facts):
        """Put a checkpoint that is written where it belongs, and delete older ones."""
        iteration, best = facts.iteration, facts.best
        self._folder.check_claim()
        self._damaged.discard(iteration)
        there = [*(i for i in self._iterations() if i not in (iteration, *self._damaged)), iteration]
        kept = {*there[-self.KEPT :], *(best[:1] if best else [])}
        names = [f"ckpt-{each}" for each in there if each in kept]
        tf.train.update_checkpoint_state(str(self._folder.path), f"ckpt-{iteration}", names)
        for file in [*_files(iteration), STATE]:
            self._folder.upload(file)
        self.saved, self.best = iteration, best
        if self.lost_best and best and best[1] >= self.lost_best[1]:
            self.lost_best = None
        try:
            with write_errors(FLAG, self.place):
                for old in set(there) - kept:
                    for file in reversed(_files(old)):
                        self._folder.delete(file)
        except InputError as error:
            say(f"Older checkpoints than that of iteration {iteration} are not deleted: {error}")


def _files(iteration):
    return [f"ckpt-{iteration}.data-00000-of-00001", f"ckpt-{iteration}.index"]
