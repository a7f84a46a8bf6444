"""What a run saves: checkpoints, from which it resumes, and the trained network for use elsewhere.

Both are told a place to write to, which may be None: then they write nothing.
"""

import contextlib
import fcntl
import json
import math
import re
import shutil
import tempfile
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError

from alexnet import forward, tf
from decoding import one_line
from imagenet import CROP_SIZE
from places import S3Folder, checked_place, disk_errors, make_writable
from s3 import InputError
from watching import as_they_end


@contextlib.contextmanager
def write_errors(flag, place):
    """Do what `disk_errors` does, also with what TensorFlow's writers raise."""
    try:
        with disk_errors(flag, place):
            yield
    except tf.errors.OpError as error:
        said = [line for line in error.message.splitlines() if "; " in line] or [one_line(error)]
        raise InputError(f"{flag} {place}: {said[0].rpartition('; ')[2][:200]}") from error


class Start(NamedTuple):
    """Where a run begins: at a checkpoint, or at iteration 0, where nothing more is known yet.

    `state` is the network's, and `mean` the mean image that its images are centred by; `mini_batches`
    and `precision` are those of every iteration, `epoch` is the number of iterations in an epoch;
    `stored` is the form of the images in memory; `run` is a dict of texts: the constants of driver.py,
    and fingerprints of the data. `validated` is the iteration of the last validation, and `best` are
    iteration and top-1 of the best one so far; `held_out` are fingerprints of the data that they are
    on. `reached` is the newest iteration of all checkpoints; `trained` says that nothing is left to
    train.
    """

    place: str | None
    state: dict | None = None
    mean: object = None
    iteration: int = 0
    mini_batches: int | None = None
    precision: str | None = None
    epoch: float | None = None
    stored: str | None = None
    run: dict | None = None
    validated: int = 0
    best: list | None = None
    held_out: dict | None = None
    reached: int = 0
    trained: bool = False

    def must_match(self, run, fixed, say):
        """InputError unless the texts in `run` that are `fixed` are as saved; says what has changed."""
        was = self.run or {}
        changed = {key: was[key] for key in run if key in was and was[key] != run[key]}
        if wrong := [f"{key} (was {was})" for key, was in changed.items() if key in fixed]:
            what = f"is of another run: different are {', '.join(wrong)}"
            hint = "restore that or name another --checkpoint-dir"
            if "tars" in changed and "tars" in fixed:
                same = "ETags tell; if the same tars were only uploaded again in another way"
                hint = f"{same}, set CHECK_TARS = False in driver.py, or else {hint}"
            raise InputError(f"{self.place} {what}; {hint}")
        for key, was in changed.items():
            say(f"{key} is {run[key]} from here on, was {was}")
        if new := [f"{key} = {run[key]}" for key in run if self.run and key not in self.run]:
            say(f"From here on {' and '.join(new)}: {self.place} is of before that")

    def forget_state(self):
        """Let go of the network's state, which a network has taken."""
        if self.state:
            self.state.clear()

    def of_validations(self):
        """The facts about validations, which checkpoints go on with."""
        return {"validated": self.validated, "best": self.best, "held_out": self.held_out}

    def validated_on(self, held_out, say):
        """This Start with the fingerprints of a held-out set, None if there is none.

        What was best on another set is forgotten.
        """
        if held_out in (None, self.held_out):
            return self
        if self.best:
            say("The held-out set is another one: its best checkpoint is looked for from here on")
        return self._replace(held_out=held_out, validated=0, best=None)


OWNER = "checkpoint.owner"  # the file in S3 that names the run whose checkpoints these are

STATE = "checkpoint"  # the file in which TensorFlow looks for the names of checkpoints


class Checkpoints:
    """Checkpoints in TensorFlow's own format, which `tf.train` reads; the newest three and the best are
    kept.

    A checkpoint is the state of an AlexNet, the mean image, and a dict of facts about its run, as JSON.
    A thread writes it under names that nobody reads and renames them, the index last. Then it goes to
    S3 in the same order, if `place` is in S3; the file `checkpoint` names it last.
    """

    KEPT = 3

    def __init__(self, place, say):
        """Open a folder or `s3://bucket/prefix`; InputError if it cannot be written, or is in use."""
        self.place = place = checked_place("--checkpoint-dir", place)
        self._say, self._ours = say, set()  # names of checkpoints that this program has written
        self.saved = self._newest = 0  # iterations of the newest whole checkpoint, and of the last try
        self.best = None  # iteration and top-1 of the best one so far, which is whole
        self.lost_best = None  # those of a better one whose save has failed
        self._writer, self._writing = ThreadPoolExecutor(1), set()
        self._remote = S3Folder(place) if place and place.startswith("s3://") else None
        if place:
            with write_errors("--checkpoint-dir", place):
                self._scratch = tempfile.TemporaryDirectory() if self._remote else None
                self._folder = Path(self._scratch.name if self._remote else place).resolve()
                make_writable(self._folder)
                if self._remote:
                    self._remote.check()
                else:
                    self._lock_folder()
                self._find_ours()
                for leftover in self._folder.glob("ckpt-*.tempstate*"):  # of a save that was killed
                    leftover.unlink()

    def _find_ours(self):
        """Note which checkpoints are this program's; InputError if some are another program's."""
        others = []
        for name in self._names():
            if self._remote:
                self._remote.download(f"{name}.index", self._folder / f"{name}.index")
            with contextlib.suppress(Exception):  # a damaged one may be anybody's
                reader = tf.train.load_checkpoint(str(self._folder / name))
                ours = "facts" in reader.get_variable_to_shape_map()
                self._ours.add(name) if ours else others.append(name)
        if self._remote and STATE in self._remote.names(STATE):
            self._remote.download(STATE, self._folder / STATE)
        if (state := self._folder / STATE).exists():
            named = re.findall(r'model_checkpoint_path: "(?:.*/)?(.*)"', state.read_text("latin-1"))
            strange = [name for name in named if not re.fullmatch(r"ckpt-\d+", name)]
            if strange or not (named or self._ours):  # beside our checkpoints, it is ours and damaged
                others.append(STATE)
        if others:
            which = f"{one_line(others[0])} there is another program's"
            raise InputError(f"--checkpoint-dir {self.place}: {which}; name another place")

    def _lock_folder(self):
        """Make a folder this run's, by a lock that ends with the process. For S3, see `claim`."""
        self._lock = (self._folder / "checkpoint.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--checkpoint-dir {self.place}: another run saves here") from error
        except OSError as error:
            self._say(f"{self.place} has no locks ({error.strerror}): a second run here goes unnoticed")

    def claim(self):
        """Make a place in S3 this run's: the last to begin has it, and others see that as they save."""
        if self._remote:
            self._name = uuid.uuid4().hex
            (self._folder / OWNER).write_text(self._name)
            self._remote.upload(self._folder / OWNER, OWNER)

    def close(self):
        """Leave the place to others."""
        if self.place and not self._remote:
            self._lock.close()

    def _check_owner(self):
        """InputError if another run has claimed this place in S3."""
        if OWNER not in self._remote.names(OWNER):  # someone has cleaned up
            self.claim()
        self._remote.download(OWNER, self._folder / OWNER)
        if (self._folder / OWNER).read_text() != self._name:
            raise InputError(f"{self.place}: another run saves here now")

    def _names(self):
        """Names of the complete checkpoints, oldest first: the index is there once the data is."""
        files = self._remote.names() if self._remote else [path.name for path in self._folder.iterdir()]
        found = [re.fullmatch(r"ckpt-(\d+)\.index", file) for file in files]
        return [_name(number) for number in sorted(int(match[1]) for match in found if match)]

    def start(self, iterations=math.inf, wanted=False):
        """The Start of a run up to so many iterations: the newest intact checkpoint, or iteration 0.

        If there is a checkpoint of that iteration or a later one, and one is `wanted`, to be evaluated
        or exported, then this is the newest intact one that is not later than `iterations`. Says which
        ones are damaged; InputError if there are none but damaged ones.
        """
        names = self._names() if self.place else []
        reached = _iteration(names[-1]) if names else 0
        trained = reached >= iterations
        limit = iterations if trained and wanted else math.inf
        within = [name for name in names if _iteration(name) <= limit]
        for name in reversed(within):
            try:
                if self._remote:
                    for file in _files(name):
                        self._remote.download(file, self._folder / file)
                reader = tf.train.load_checkpoint(str(self._folder / name))
                # Reading a tensor verifies its checksum.
                state = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
                mean, facts = state.pop("mean", None), json.loads(state.pop("facts"))
                self.saved = self._newest = iteration = facts["iteration"]
                trained = trained and (wanted or iteration >= iterations)
                facts = {"stored": "pixels"} | facts | {"reached": reached, "trained": trained}
                return Start(self.place, state, mean, **facts)
            except InputError:
                raise
            except Exception as error:  # TensorFlow's reader raises anything on damaged bytes
                self._say(f"{self.place}: {name} is damaged and left out: {one_line(error)[:120]}")
        if len(within) < len(names):
            there = ", ".join(str(_iteration(name)) for name in names)
            none = f"no intact checkpoint up to iteration {iterations} is kept; there are {there}"
            raise InputError(f"{self.place}: {none}")
        if names:
            raise InputError(f"{self.place}: no checkpoint is intact; remove them to start anew")
        return Start(self.place)

    def save(self, network, facts, mean, top1=None):
        """Write a checkpoint in the background; waits only for the one before it.

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
        facts = facts | {"iteration": iteration, "best": best}
        network.snapshot()
        self._writing = {self._writer.submit(self._try, network, facts, mean)}
        self._newest = iteration

    def wait(self):
        """Wait until the last save has ended; `saved` is then the iteration of the newest whole one."""
        for writing in as_they_end(self._writing):
            writing.result()

    def _try(self, network, facts, mean):
        iteration, best = facts["iteration"], facts["best"]
        try:
            with write_errors("--checkpoint-dir", self.place):
                old = self._write(network, facts, mean)
        except InputError as error:
            if best and best[0] == iteration:
                self.lost_best = max(best, self.lost_best or best, key=lambda lost: lost[1])
            self._say(f"The checkpoint of iteration {iteration} is not saved: {error}")
            return
        self.saved, self.best = iteration, best
        if self.lost_best and best and best[1] >= self.lost_best[1]:
            self.lost_best = None
        try:
            with write_errors("--checkpoint-dir", self.place):
                self._delete(old)
        except InputError as error:
            self._say(f"Older checkpoints than that of iteration {iteration} are not deleted: {error}")

    def _write(self, network, facts, mean):
        """Write a checkpoint; the names of older ones that are not kept."""
        name, best = _name(facts["iteration"]), facts["best"]
        if self._remote:
            self._check_owner()
        network.save(str(self._folder / name), json.dumps(facts), mean)
        names = [*(other for other in self._names() if other in self._ours - {name}), name]
        self._ours.add(name)
        kept = {*names[-self.KEPT :], *([_name(best[0])] if best else [])}
        tf.train.update_checkpoint_state(str(self._folder), name, [n for n in names if n in kept])
        if self._remote:
            for file in [*_files(name), STATE]:
                self._remote.upload(self._folder / file, file)
        return [other for other in names if other not in kept]

    def _delete(self, names):
        for name in names:
            for file in reversed(_files(name)):
                (self._folder / file).unlink(missing_ok=True)
                if self._remote:
                    self._remote.delete(file)


MODEL = "saved_model.pb"  # an exported network is there once this file is

SCRATCH = ".export-"  # how the folder's name begins in which one is written


class SavedModel:
    """The trained network for use elsewhere, in a folder or `s3://bucket/prefix`, in one piece."""

    def __init__(self, place):
        """Name where it goes; InputError if that cannot be written or holds something else."""
        self.place = place = checked_place("--export-dir", place)
        if not place:
            return
        self._remote = S3Folder(place) if place.startswith("s3://") else None
        if self._remote:
            self._remote.check()
        else:
            self._folder = Path(place).resolve()
            with write_errors("--export-dir", place):
                make_writable(self._folder)
        if self._holds_others():
            raise InputError(f"--export-dir {place}: holds something else: name a new folder")

    def exists(self):
        """Whether there is an export already."""
        if self._remote:
            return MODEL in self._remote.names(MODEL)
        return (self._folder / MODEL).exists()

    def _holds_others(self):
        """Whether there is what this program has not written: another model, or other files."""
        with write_errors("--export-dir", self.place), tempfile.TemporaryDirectory() as scratch:
            if self.exists():
                path = Path(scratch) / MODEL if self._remote else self._folder / MODEL
                if self._remote:
                    self._remote.download(MODEL, path)
                return not _is_export(path.read_bytes())
        if self._remote:  # other files may be there; variables/ without a model is a cut-off export
            return False
        killed = list(self._folder.glob(f"{SCRATCH}*"))  # an export that was
        known = {"lost+found"} | ({"variables", "fingerprint.pb"} if killed else set())
        names = {path.name for path in self._folder.iterdir() if not path.name.startswith(".")}
        if not names <= known:
            return True
        for scratch in killed:
            shutil.rmtree(scratch, ignore_errors=True)
        return False

    def write(self, network, mean):
        """Export an AlexNet, whose images were centred by a mean image float32 [256, 256, 3].

        Its signature "serving_default" takes `images`, uint8 [n, 256, 256, 3], and gives
        `probabilities`, float32 [n, classes]. An older export is replaced: its saved_model.pb goes
        first, and the new one comes last, so that nobody loads one model's graph with another's
        weights. A folder stays the same one, since it can be a mount point.
        """
        with write_errors("--export-dir", self.place), contextlib.ExitStack() as stack:
            if not self._remote:
                self._folder.mkdir(parents=True, exist_ok=True)
            near = None if self._remote else self._folder
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=SCRATCH, dir=near)))
            _save_model(scratch / "new", network, mean)
            if self._remote:
                self._upload(scratch / "new")
            else:
                self._move(scratch / "new", scratch)

    def _upload(self, new):
        if self.exists():
            self._remote.delete(MODEL)
        files = [path for path in new.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == MODEL):
            self._remote.upload(path, path.relative_to(new).as_posix())

    def _move(self, new, scratch):
        entries = sorted(new.iterdir(), key=lambda path: path.name == MODEL)
        for old in [self._folder / MODEL, *(self._folder / entry.name for entry in entries)]:
            if old.exists():
                old.rename(scratch / f"old-{old.name}")
        for entry in entries:
            entry.rename(self._folder / entry.name)


def _is_export(data):
    """Whether the bytes of a saved_model.pb are those of a network that `SavedModel` has written."""
    # Here, since alexnet.py loads TensorFlow quietly.
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel as Proto

    model = Proto()
    with contextlib.suppress(DecodeError):
        model.ParseFromString(data)
    signatures = [graph.signature_def["serving_default"] for graph in model.meta_graphs]
    return [([*s.inputs], [*s.outputs]) for s in signatures] == [(["images"], ["probabilities"])]


def _save_model(folder, network, mean):
    margins = [(side - CROP_SIZE) // 2 for side in mean.shape[:2]]
    top, left = (slice(margin, margin + CROP_SIZE) for margin in margins)
    with tf.Graph().as_default(), tf.Session(config=tf.ConfigProto(device_count={"GPU": 0})) as sess:
        images = tf.placeholder(tf.uint8, [None, *mean.shape], "images")
        given = network.parameters
        parameters = [tf.get_variable(v.op.name, v.shape, use_resource=True) for v in given]
        centred = tf.cast(images[:, top, left], tf.float32) - mean[top, left]
        probabilities = tf.nn.softmax(forward(centred, parameters, network.layers))
        for variable, weight in zip(parameters, network.weights(), strict=True):
            variable.load(weight, sess)
        outputs = {"probabilities": probabilities}
        tf.saved_model.simple_save(sess, str(folder), {"images": images}, outputs)


def _name(iteration):
    return f"ckpt-{iteration}"


def _iteration(checkpoint):
    return int(checkpoint.removeprefix("ckpt-"))


def _files(checkpoint):
    return [f"{checkpoint}.data-00000-of-00001", f"{checkpoint}.index"]
