"""What a run shows and leaves behind: its lines and learning curves, checkpoints, the trained network.

Each is told a place to write to, which may be None: then it writes nothing.
"""

import contextlib
import json
import re
import tempfile
import time
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

    def say(self, line):
        """Print a line."""
        print(line, flush=True)

    def draw(self, folder):
        """Draw learning curves, too: TensorBoard's event files. InputError if that is impossible."""
        if folder and "://" in folder:
            raise InputError(f"--log-dir {folder}: name a local folder")
        if folder:
            self._folder = folder
            with _disk_errors("--log-dir", folder), tf.Graph().as_default():
                _make_writable(Path(folder))
                self._curves = tf.summary.FileWriter(folder)

    def start(self, iteration, batches, mean):
        """Training begins: with an iteration, all shuffled batches, a reference to the mean image."""
        if self._curves:  # TensorBoard forgets what a run that was cut off wrote of later iterations
            log = tf.SessionLog(status=tf.SessionLog.START)
            self._curves.add_session_log(log, iteration)
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

    def end(self, iteration, places):
        """The run ends. `places` is a dict of what it leaves behind -> where, or None."""
        kept = [f"{what} in {place}" for what, place in places.items() if place]
        self.say(f"Stopped at iteration {iteration}: {', '.join(kept) or 'nothing is saved'}")

    def _add(self, iteration, scalars):
        """Write a dict of tag -> number, to disk at once: a driver that is killed loses none."""
        if self._curves:
            values = [tf.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            with _disk_errors("--log-dir", self._folder):
                self._curves.add_summary(tf.Summary(value=values), iteration)
                self._curves.flush()


class Start(NamedTuple):
    """Where a run begins: at a checkpoint, or at iteration 0, where nothing more is known yet.

    `state` is the network's; `mini_batches` and `precision` are those of every iteration; `run` is a
    dict of texts: the constants of driver.py, and fingerprints of the data.
    """

    place: str | None
    state: dict | None = None
    iteration: int = 0
    mini_batches: int | None = None
    precision: str | None = None
    run: dict | None = None

    def must_match(self, run, fixed, say):
        """InputError unless the texts in `run` that are `fixed` are as saved; says what has changed."""
        changed = {key: self.run.get(key) for key in run if self.run and self.run.get(key) != run[key]}
        if wrong := [f"{key} (was {was})" for key, was in changed.items() if key in fixed]:
            what = f"is of another run: different are {', '.join(wrong)}"
            raise InputError(f"{self.place} {what}; restore that or name another --checkpoint-dir")
        for key, was in changed.items():
            say(f"{key} is {run[key]} from here on, was {was}")


class Checkpoints:
    """Checkpoints in TensorFlow's own format, which `tf.train` reads; the newest three are kept.

    A checkpoint is the state of an AlexNet and a dict of facts about its run, as JSON. A thread writes
    it under names that nobody reads and renames them, the index last. Then it goes to S3 in the same
    order, if `place` is there; the file `checkpoint` names it last.
    """

    KEPT = 3

    def __init__(self, place):
        """Open a folder or `s3://bucket/prefix`; InputError if it cannot be written."""
        self.place, self._saved = place, 0
        self._writer, self._writing = ThreadPoolExecutor(1), None
        self._remote = S3Folder(place) if place and place.startswith("s3://") else None
        if place:
            self._scratch = tempfile.TemporaryDirectory() if self._remote else None
            self._folder = Path(self._scratch.name if self._remote else place).resolve()
            with _disk_errors("--checkpoint-dir", place):
                _make_writable(self._folder)
                for leftover in self._folder.glob("ckpt-*.tempstate*"):  # of a save that was killed
                    leftover.unlink()

    def _names(self):
        """Names of the complete checkpoints, oldest first: the index is there once the data is."""
        files = self._remote.names() if self._remote else [path.name for path in self._folder.iterdir()]
        found = [re.fullmatch(r"ckpt-(\d+)\.index", file) for file in files]
        return [f"ckpt-{number}" for number in sorted(int(match[1]) for match in found if match)]

    def newest(self, say):
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
                self._saved = facts["iteration"]
                return Start(self.place, state, **facts)
            except InputError:
                raise
            except Exception as error:  # TensorFlow's reader raises anything on damaged bytes
                say(f"{self.place}: {name} is damaged and left out: {one_line(error)[:120]}")
        if names:
            raise InputError(f"{self.place}: no checkpoint is intact; remove them to start anew")
        return Start(self.place)

    def save(self, iteration, network, facts):
        """Write a checkpoint in the background; waits only for the one before it.

        An iteration that is saved already, or that is 0, is not saved again.
        """
        if self.place and iteration != self._saved:
            self.wait()
            self._saved, facts = iteration, facts | {"iteration": iteration}
            self._writing = self._writer.submit(self._write, iteration, network.state(), facts)

    def wait(self):
        """Wait until the last save is complete; InputError if it failed."""
        with _disk_errors("--checkpoint-dir", self.place):
            if self._writing:
                self._writing.result()

    def _write(self, iteration, state, facts):
        name, tensors = f"ckpt-{iteration}", state | {"facts": json.dumps(facts)}
        contents = {"tensor_names": list(tensors), "tensors": list(tensors.values())}
        whole = [""] * len(tensors)
        tf.raw_ops.SaveV2(prefix=str(self._folder / name), shape_and_slices=whole, **contents)
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

    def write(self, network, mean):
        """Export an AlexNet, whose images were centred by a mean image float32 [256, 256, 3].

        Its signature "serving_default" takes `images`, uint8 [n, 256, 256, 3], and gives
        `probabilities`, float32 [n, classes]. An older export is replaced.
        """
        if not self.place:
            return
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
        raise InputError(f"{flag} {place}: {one_line(error)[:200]}") from error


def _make_writable(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _files(checkpoint):
    return [f"{checkpoint}.data-00000-of-00001", f"{checkpoint}.index"]
