"""What a run shows and leaves behind: its lines and learning curves, checkpoints, the trained network.

Each is told a place to write to, which may be None: then it writes nothing.
"""

import contextlib
import fcntl
import json
import re
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alexnet import forward, tf
from decoding import one_line
from imagenet import CROP_SIZE, InputError, S3Folder


class Report:
    """What a run says, and how long each phase of an iteration takes.

    `driver.main` takes another one: a subclass sees all that happens, and may stand still in it.
    """

    def __init__(self):
        """Say all on standard output; `draw` adds learning curves."""
        self._folder, self._curves, self._seconds, self._since = None, None, {}, 0
        self.lost_curves = False

    def say(self, line):
        """Print a line."""
        print(line, flush=True)

    def draw(self, folder):
        """Draw learning curves, too: TensorBoard's event files. InputError if that is impossible."""
        if folder and "://" in folder:
            raise InputError(f"--log-dir {folder}: name a local folder")
        if folder:
            self._folder = folder
            with _disk_errors("--log-dir", folder):
                self._open_curves()

    def start(self, iteration, batches, mean):
        """Training begins: with an iteration, all shuffled batches, a reference to the mean image."""
        # TensorBoard forgets what a run that was cut off wrote of later iterations.
        self._write(iteration, session_log=tf.SessionLog(status=tf.SessionLog.START))
        self.resume()

    def resume(self):
        """Start the clock of a phase: what came since the last phase belongs to no iteration."""
        self._since = time.perf_counter()

    def lap(self, phase):
        """A phase of an iteration ends, and the next one begins."""
        now = time.perf_counter()
        self._seconds[f"seconds/{phase}"], self._since = now - self._since, now

    def accuracy(self, iteration, accuracy):
        """The top-1 accuracy on a random batch, 0 to 1, of the weights of an iteration."""
        self.say(f"Iteration {iteration}: accuracy = {accuracy:.1%}")
        self._add(iteration, {"accuracy": accuracy})

    def validation(self, iteration, top1, top5):
        """The accuracies on all of the held-out set, 0 to 1, of the weights of an iteration."""
        self.say(f"Iteration {iteration}: validation top-1 = {top1:.1%}, top-5 = {top5:.1%}")
        self._add(iteration, {"validation top-1": top1, "validation top-5": top5})

    def iteration(self, iteration, losses, images, norm, rate):
        """An iteration ends, with the losses of its mini-batches, the number of images in all of them,
        the norm of the mean gradient and the learning rate."""
        phases, self._seconds = self._seconds, {}
        seconds, loss = sum(phases.values()), np.mean(losses)
        speed = images / seconds
        self.say(f"Iteration {iteration}: loss = {loss:.3f}, {speed:.1f} images/s, {seconds:.2f} s")
        scalars = {"loss": loss, "gradient norm": norm, "learning rate": rate}
        self._add(iteration, scalars | {"images a second": speed} | phases)
        self.resume()

    def _add(self, iteration, scalars):
        """Write a dict of tag -> number."""
        values = [tf.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(iteration, summary=tf.Summary(value=values))

    def _write(self, iteration, **content):
        """Write an event, to disk at once: a driver that is killed loses none.

        TensorFlow's own writer ends its thread, with a traceback, at the first error of the disk. Here
        the next event opens another file, and TensorBoard reads both.
        """
        if not self._folder:
            return
        event = tf.Event(wall_time=time.time(), step=iteration, **content)
        try:
            with _disk_errors("--log-dir", self._folder):
                if not (self._curves and self._file.exists()):
                    self._open_curves()
                self._curves.write(event.SerializeToString())
                self._curves.flush()
        except InputError as error:
            self._curves = None
            if not self.lost_curves:
                self.say(f"{error}: curves are lost while that lasts, training goes on")
            self.lost_curves = True

    def _open_curves(self):
        self._curves, folder = None, Path(self._folder)
        _make_writable(folder)
        self._file = folder / f"events.out.tfevents.{time.time_ns()}"
        self._curves = tf.python_io.TFRecordWriter(str(self._file))
        version = tf.Event(wall_time=time.time(), file_version="brain.Event:2")
        self._curves.write(version.SerializeToString())


class Start(NamedTuple):
    """Where a run begins: at a checkpoint, or at iteration 0, where nothing more is known yet.

    `state` is the network's; `mini_batches` and `precision` are those of every iteration; `stored` is
    the form of the images in memory; `run` is a dict of texts: the constants of driver.py, and
    fingerprints of the data.
    """

    place: str | None
    state: dict | None = None
    iteration: int = 0
    mini_batches: int | None = None
    precision: str | None = None
    stored: str | None = None
    run: dict | None = None

    def must_match(self, run, fixed, say):
        """InputError unless the texts in `run` that are `fixed` are as saved; says what has changed."""
        was = self.run or {}
        changed = {key: was[key] for key in run if key in was and was[key] != run[key]}
        if wrong := [f"{key} (was {was})" for key, was in changed.items() if key in fixed]:
            what = f"is of another run: different are {', '.join(wrong)}"
            raise InputError(f"{self.place} {what}; restore that or name another --checkpoint-dir")
        for key, was in changed.items():
            say(f"{key} is {run[key]} from here on, was {was}")
        if new := [f"{key} = {run[key]}" for key in run if self.run and key not in self.run]:
            say(f"From here on {' and '.join(new)}: {self.place} is of before that")


OWNER = "checkpoint.owner"  # the file in S3 that names the run whose checkpoints these are


class Checkpoints:
    """Checkpoints in TensorFlow's own format, which `tf.train` reads; the newest three are kept.

    A checkpoint is the state of an AlexNet and a dict of facts about its run, as JSON. A thread writes
    it under names that nobody reads and renames them, the index last. Then it goes to S3 in the same
    order, if `place` is there; the file `checkpoint` names it last.
    """

    KEPT = 3

    def __init__(self, place, say):
        """Open a folder or `s3://bucket/prefix`; InputError if it cannot be written, or is in use."""
        self.place, self._say = place, say
        self.saved = self._newest = 0  # iterations of the newest whole checkpoint, and of the last try
        self._writer, self._writing = ThreadPoolExecutor(1), None
        self._remote = S3Folder(place) if place and place.startswith("s3://") else None
        if place:
            self._scratch = tempfile.TemporaryDirectory() if self._remote else None
            self._folder = Path(self._scratch.name if self._remote else place).resolve()
            with _disk_errors("--checkpoint-dir", place):
                _make_writable(self._folder)
                if self._remote:
                    self._remote.check_writable(OWNER)
                else:
                    self._lock_folder()
                for leftover in self._folder.glob("ckpt-*.tempstate*"):  # of a save that was killed
                    leftover.unlink()

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
        self._remote.download(OWNER, self._folder / OWNER)
        if (self._folder / OWNER).read_text() != self._name:
            raise InputError(f"{self.place}: another run saves here now")

    def _names(self):
        """Names of the complete checkpoints, oldest first: the index is there once the data is."""
        files = self._remote.names() if self._remote else [path.name for path in self._folder.iterdir()]
        found = [re.fullmatch(r"ckpt-(\d+)\.index", file) for file in files]
        return [f"ckpt-{number}" for number in sorted(int(match[1]) for match in found if match)]

    def newest(self):
        """The Start that the newest intact checkpoint is, or that of iteration 0 where there is none.

        Says which newer ones are damaged; InputError if there are none but damaged ones.
        """
        names = self._names() if self.place else []
        for name in reversed(names):
            try:
                if self._remote:
                    for file in _files(name):
                        self._remote.download(file, self._folder / file)
                reader = tf.train.load_checkpoint(str(self._folder / name))
                # Reading a tensor verifies its checksum.
                state = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
                facts = json.loads(state.pop("facts"))
                self.saved = self._newest = facts["iteration"]
                return Start(self.place, state, **{"stored": "pixels"} | facts)
            except InputError:
                raise
            except Exception as error:  # TensorFlow's reader raises anything on damaged bytes
                self._say(f"{self.place}: {name} is damaged and left out: {one_line(error)[:120]}")
        if names:
            raise InputError(f"{self.place}: no checkpoint is intact; remove them to start anew")
        return Start(self.place)

    def save(self, network, facts):
        """Write a checkpoint in the background; waits only for the one before it.

        An iteration that has been tried is not tried again. A save that fails is said, no more.
        """
        if self.place and network.iteration != self._newest:
            self.wait()
            self._newest, facts = network.iteration, facts | {"iteration": network.iteration}
            network.snapshot()
            self._writing = self._writer.submit(self._try, network, self._newest, json.dumps(facts))

    def wait(self):
        """Wait until the last save has ended; `saved` is then the iteration of the newest whole one."""
        if self._writing:
            self._writing.result()

    def _try(self, network, iteration, facts):
        try:
            with _disk_errors("--checkpoint-dir", self.place):
                self._write(network, iteration, facts)
            self.saved = iteration
        except InputError as error:
            self._say(f"The checkpoint of iteration {iteration} is not saved: {error}")

    def _write(self, network, iteration, facts):
        name = f"ckpt-{iteration}"
        if self._remote:
            self._check_owner()
        network.save(str(self._folder / name), facts)
        names = [*(other for other in self._names() if other != name), name]
        tf.train.update_checkpoint_state(str(self._folder), name, names[-self.KEPT :])
        if self._remote:
            for file in [*_files(name), "checkpoint"]:
                self._remote.upload(self._folder / file, file)
        for old in names[: -self.KEPT]:
            for file in reversed(_files(old)):
                (self._folder / file).unlink(missing_ok=True)
                if self._remote:
                    self._remote.delete(file)


class SavedModel:
    """The trained network for use elsewhere, in a folder or `s3://bucket/prefix`, in one piece."""

    def __init__(self, place):
        """Name where it goes; InputError if that cannot be written or holds something else."""
        self.place = place
        self._remote = S3Folder(place) if place and place.startswith("s3://") else None
        if self._remote:
            self._remote.check_writable("saved_model.pb")
        if self._remote or not place:
            return
        self._folder = Path(place).resolve()
        with _disk_errors("--export-dir", place):
            _make_writable(self._folder.parent)
            others = self._folder.exists() and not (self._folder / "saved_model.pb").exists()
            if others and any(self._folder.iterdir()):
                raise InputError(f"--export-dir {place}: holds something else: name a new folder")

    def exists(self):
        """Whether there is an export already."""
        if self._remote:
            return "saved_model.pb" in self._remote.names()
        return (self._folder / "saved_model.pb").exists()

    def write(self, network, mean):
        """Export an AlexNet, whose images were centred by a mean image float32 [256, 256, 3].

        Its signature "serving_default" takes `images`, uint8 [n, 256, 256, 3], and gives
        `probabilities`, float32 [n, classes]. An older export is replaced.
        """
        near = None if self._remote else self._folder.parent  # where a rename moves it in one step
        scratch = tempfile.TemporaryDirectory(prefix=".export-", dir=near)
        with _disk_errors("--export-dir", self.place), scratch as folder:
            new = Path(folder) / "new"
            _save_model(new, network, mean)
            if self._remote:
                files = [path for path in new.rglob("*") if path.is_file()]
                for path in sorted(files, key=lambda path: path.name == "saved_model.pb"):  # it last
                    self._remote.upload(path, path.relative_to(new).as_posix())
            else:
                if self._folder.exists():
                    self._folder.rename(Path(folder) / "old")
                new.rename(self._folder)


class Outcome:
    """What a run leaves behind, however it ends: checkpoints, the exported network, a last line."""

    def __init__(self, args, report):
        """Open all places of the command line; InputError if one cannot be written."""
        self._say, self._report = report.say, report
        self.checkpoints = Checkpoints(args.checkpoint_dir, report.say)
        self._model, self._curves, self._network = SavedModel(args.export_dir), args.log_dir, None
        report.draw(args.log_dir)
        if not args.checkpoint_dir and not args.export_dir:
            missing = "there is no --checkpoint-dir and no --export-dir"
            self._say(f"The trained weights end with this run: {missing}")

    def begin(self, network, facts, mean):
        """There are weights from here on: of an AlexNet, with facts about its run, and a mean image."""
        self._network, self._facts, self._mean = network, facts, mean
        self.checkpoints.claim()

    def save(self):
        """Save a checkpoint in the background."""
        self.checkpoints.save(self._network, self._facts)

    def finish(self, failed):
        """Save and export the newest weights, and say what there is; whether all of it is there.

        A run that has `failed` exports only where nothing has been exported before.
        """
        with contextlib.closing(self.checkpoints):
            if not self._network:
                return True
            if self._network.iteration:
                self.save()
            self.checkpoints.wait()
        iteration, kept, missing = self._network.iteration, [], []
        if place := self.checkpoints.place:
            saved = self.checkpoints.saved
            if saved:
                kept.append(f"checkpoints in {place}")
            if saved != iteration:
                missing.append(f"the iterations after {saved}")
        if self._model.place and iteration:
            exported = self._export(failed)
            (kept if exported else missing).append(f"network in {self._model.place}")
        if self._curves:
            (missing if self._report.lost_curves else kept).append(f"curves in {self._curves}")
        lost = f"; not saved: {', '.join(missing)}" if missing else ""
        where = "in the middle of a step" if iteration is None else f"at iteration {iteration}"
        self._say(f"Stopped {where}: {', '.join(kept) or 'nothing is saved'}{lost}")
        return not missing

    def _export(self, failed):
        """Whether the network is exported now."""
        try:
            if failed and self._model.exists():
                raise InputError(f"{self._model.place} keeps that of an earlier run")
            self._model.write(self._network, self._mean)
        except InputError as error:
            self._say(f"The network is not exported: {error}")
            return False
        return True


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


@contextlib.contextmanager
def _disk_errors(flag, place):
    """Turn what the disk or TensorFlow's writers raise into an InputError that names the flag."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{flag} {place}: {error.strerror}") from error
    except tf.errors.OpError as error:
        said = [line for line in error.message.splitlines() if "; " in line] or [one_line(error)]
        raise InputError(f"{flag} {place}: {said[0].rpartition('; ')[2][:200]}") from error


def _make_writable(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _files(checkpoint):
    return [f"{checkpoint}.data-00000-of-00001", f"{checkpoint}.index"]
