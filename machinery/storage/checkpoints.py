"""Checkpoints, from which a run resumes: the state of its network, and the facts about the run."""

import contextlib
import dataclasses
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

from machinery.errors import InputError, one_line, say
from machinery.storage.places import as_they_end, open_place, write_errors
from machinery.storage.tf1 import tf

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
    """Where a run begins: at a checkpoint, or at iteration 0, where nothing is known yet."""

    place: str | None
    facts: Facts = dataclasses.field(default_factory=Facts)
    state: dict | None = None  # the network's
    mean: object = None  # the mean image that its images are centred by
    reached: int = 0  # the newest iteration of all checkpoints
    trained: bool = False  # whether nothing is left to train
    run: dict = dataclasses.field(default_factory=dict)  # what `must_match` was told

    @property
    def iteration(self):
        """How many steps have made the weights."""
        return self.facts.iteration

    def must_match(self, run, fixed=()):
        """InputError unless the texts in `run` that are `fixed` are as saved; says what has changed."""
        was = self.facts.run
        changed = [key for key in run if was.get(key, run[key]) != run[key]]
        if wrong := [key for key in changed if key in fixed]:
            hint = f"restore that or name another {FLAG}"
            if "tars" in wrong:
                same = "ETags tell; if the same tars were only uploaded again in another way"
                hint = f"{same}, set CHECK_TARS = False in driver.py, or else {hint}"
            what = ", ".join(f"{key} (was {was[key]})" for key in wrong)
            raise InputError(f"{self.place} is of another run: different are {what}; {hint}")
        for key in changed:
            say(f"{key} is {run[key]} from here on, was {was[key]}")
        if new := [f"{key} = {run[key]}" for key in run if was and key not in was]:
            say(f"From here on {' and '.join(new)}: the checkpoints in {self.place} do not say it")
        self.run |= run

    def go_on(self, machine, epoch):
        """The Facts of the run from here on, on a machine that is described by a dict of texts."""
        self.must_match({"STORED": repr(self.facts.stored), **machine})
        return dataclasses.replace(self.facts, run=self.run, epoch=epoch)

    def take_state(self):
        """The network's state, which is let go here: it takes 500 MB."""
        state, self.state = self.state, None
        return state

    def validate_on(self, held_out):
        """Take a held-out set's fingerprints, or None; what was best on another set is forgotten."""
        if held_out not in (None, self.facts.held_out):
            if self.facts.best:
                say("The held-out set is another one: its best checkpoint is looked for from here on")
            self.facts = dataclasses.replace(self.facts, held_out=held_out, validated=0, best=None)


class Checkpoints:
    """Checkpoints in TensorFlow's own format, which `tf.train` reads: the newest three, and the best.

    A checkpoint is the state of an AlexNet, the mean image, and a run's Facts. Its index is written
    last, and after that the file `checkpoint`, which names it; a thread puts them into S3.
    """

    def __init__(self, place):
        """Open a folder or `s3://bucket/prefix`; InputError if it cannot be written, or is in use."""
        mark, ours = r"checkpoint\.(lock|owner)", r"ckpt-\d+\..*|checkpoint"
        self._folder = open_place(FLAG, place, mark, ours)
        self.place = self._folder and self._folder.place
        self.saved = self._newest = 0  # iterations of the newest whole checkpoint, and of the last try
        self.best = None  # iteration and top-1 of the best one so far, which is whole
        self._damaged = set()  # iterations of checkpoints, which are left alone
        self._putter, self._putting = ThreadPoolExecutor(1), set()
        if place:
            with write_errors(FLAG, place):
                self._folder.lock(FLAG, STATE)
                for of_a_killed_save in self._folder.path.glob("ckpt-*.tempstate*"):
                    of_a_killed_save.unlink()

    def claim(self, facts):
        """The place is this run's from here on."""
        self.best = facts.best
        if self.place:
            self._folder.claim(anew=True)

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

        One that is `wanted`, to be evaluated, has no more than those. InputError if all are damaged.
        """
        there = self._iterations() if self.place else []
        reached = max(there, default=0)
        whole = wanted and reached >= iterations
        usable = [iteration for iteration in there if iteration <= iterations or not whole]
        for iteration in reversed(usable):
            for file in _files(iteration):
                self._folder.download(file)
            try:
                reader = tf.train.load_checkpoint(str(self._folder.path / f"ckpt-{iteration}"))
                # Reading a tensor verifies its checksum.
                state = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
                facts, mean = Facts(**json.loads(state.pop("facts"))), state.pop("mean")
            except Exception as error:  # TensorFlow's reader raises anything on damaged bytes
                say(f"{self.place}: ckpt-{iteration} is damaged and left out: {one_line(error)[:120]}")
                self._damaged.add(iteration)
            else:
                self.saved = self._newest = iteration
                return Start(self.place, facts, state, mean, reached, whole or iteration >= iterations)
        if usable != there:
            none = f"no intact checkpoint up to iteration {iterations} is kept"
            raise InputError(f"{self.place}: {none}; there are {', '.join(map(str, there))}")
        if there:
            raise InputError(f"{self.place}: no checkpoint is intact; remove them to start anew")
        return Start(self.place)

    def save(self, network, facts, mean, top1=None):
        """Write a checkpoint of a network; a save that fails is said, no more.

        With the top-1 accuracy of its weights, it is written only if that is the best so far, and not
        there yet. Without it, an iteration that has been tried is not tried again.
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
        with self._or_say(f"The checkpoint of iteration {iteration} is not saved"):
            text = json.dumps(dataclasses.asdict(facts))
            network.save(str(self._folder.path / f"ckpt-{iteration}"), text, mean)
            self._putting = {self._putter.submit(self._put, iteration, best)}
        self._newest = iteration

    def wait(self):
        """Wait until the last save has ended; `saved` is then the iteration of the newest whole one."""
        for putting in as_they_end(self._putting):
            putting.result()

    @contextlib.contextmanager
    def _or_say(self, failed):
        """Say of what is not done within that it has failed."""
        try:
            with write_errors(FLAG, self.place):
                yield
        except InputError as error:
            say(f"{failed}: {error}")

    def _put(self, iteration, best):
        """Put a checkpoint that is written where it belongs, and delete older ones."""
        with self._or_say(f"The checkpoint of iteration {iteration} is not saved"):
            self._folder.claim()
            self._damaged.discard(iteration)
            others = {*self._iterations()} - {iteration} - self._damaged
            there = [*sorted(others), iteration]
            kept = {*there[-3:], *(best[:1] if best else [])}
            names = [f"ckpt-{each}" for each in there if each in kept]
            tf.train.update_checkpoint_state(str(self._folder.path), f"ckpt-{iteration}", names)
            for file in [*_files(iteration), STATE]:
                self._folder.upload(file)
            self.saved, self.best = iteration, best
            with self._or_say(f"Older checkpoints than that of iteration {iteration} are not deleted"):
                for old in set(there) - kept:
                    for file in reversed(_files(old)):
                        self._folder.delete(file)


def _files(iteration):
    return [f"ckpt-{iteration}.data-00000-of-00001", f"ckpt-{iteration}.index"]
