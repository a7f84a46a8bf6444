"""What a run shows and leaves behind: its lines, learning curves, and what is saved of it."""

import contextlib
import dataclasses
import logging
import math
import time
from collections import deque
from datetime import timedelta

from machinery.errors import InputError, NotSaved, say
from machinery.storage import terminal
from machinery.storage.checkpoints import Checkpoints
from machinery.storage.export import SavedModel
from machinery.storage.places import open_place, write_errors
from machinery.storage.tf1 import tf

import numpy as np

FOR_EVER = 1e10  # seconds of a time left that is not said
RECENT = 50  # iterations that the time left, and the bar's speed and loss, are from


def is_due(iteration, every):
    """Whether it is time for what happens after every so many iterations; 0 is never."""
    return every > 0 and iteration % every == 0


class Report:
    """What a run says, and how long each phase of an iteration takes.

    `driver.main` takes another one: a subclass sees all that happens, and may stand still in it.
    """

    def __init__(self):
        # The folder of learning curves, TensorBoard's event files, if they are wanted.
        self.curves, self._writer, self.lost_curves, self._lost_lines = None, None, False, 0
        self._seconds, self._since = {}, 0  # of each phase of this iteration; when the last one ended
        self.last, self.epoch = math.inf, None  # the last iteration; how many an epoch has, if known
        self._recent, self._bar = deque(maxlen=RECENT), None  # _recent: (seconds, loss) of iterations

    @contextlib.contextmanager
    def lines(self):
        """While this lasts, `say` gets each line of the logger "driver", from whatever module."""
        logger, handler = logging.getLogger("driver"), logging.Handler()
        handler.emit = lambda record: self.say(record.getMessage())
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def say(self, line):
        """Print a line; one that standard output does not take is lost, and a later line says so."""
        if self._lost_lines:  # below half a line, maybe
            line = f"\n{self._lost_lines} lines are lost: standard output could not be written\n{line}"
        try:
            terminal.say(line)
            self._lost_lines = 0
        except BrokenPipeError:  # nobody reads any more
            raise
        except OSError:
            self._lost_lines += 1

    def start(self, iteration, batches, mean):
        """Training begins: with an iteration, all shuffled batches, a reference to the mean image."""
        # At this mark, TensorBoard drops points of later iterations, of a run that was cut off.
        self._write(iteration, session_log=tf.SessionLog(status=tf.SessionLog.START))
        known = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"
        self._form = known if self.last < math.inf else "{n_fmt} iterations"
        self._bar = terminal.bar(total=self.last, initial=iteration, bar_format=self._form, leave=False)
        self.resume()

    def close(self):
        """Take away the bar."""
        if self._bar is not None:
            self._bar.close()

    def resume(self):
        """Start the clock of a phase: what came since the last phase belongs to no iteration."""
        self._since = time.perf_counter()

    def lap(self, phase):
        """A phase of an iteration ends, and the next one begins."""
        now = time.perf_counter()
        self._seconds[f"seconds/{phase}"], self._since = now - self._since, now

    def accuracy(self, iteration, accuracy):
        """The top-1 accuracy on a random batch, 0 to 1, of the weights of an iteration."""
        left = "" if terminal.is_there() else self._time_left(iteration)
        self.say(f"Iteration {iteration}: accuracy = {accuracy:.1%}{left and ', '}{left}")
        self._add(iteration, {"accuracy": accuracy})

    def validation(self, iteration, top1, top5):
        """The accuracies on all of the held-out set, 0 to 1, of the weights of an iteration."""
        epoch = f" (epoch {iteration / self.epoch:.1f})" if self.epoch else ""
        self.say(f"Iteration {iteration}{epoch}: validation top-1 = {top1:.1%}, top-5 = {top5:.1%}")
        self._add(iteration, {"validation top-1": top1, "validation top-5": top5})

    def iteration(self, iteration, losses, images, norm, rate):
        """An iteration ends, with the losses of its mini-batches, the number of images in all of them,
        the norm of the mean gradient and the learning rate."""
        phases, self._seconds = self._seconds, {}
        seconds, loss = sum(phases.values()), np.mean(losses)
        speed = images / seconds
        self._recent.append((seconds, loss))
        recent, recent_losses = zip(*self._recent, strict=True)
        left = self._time_left(iteration + 1) or "{elapsed} elapsed"
        said = f"{left}, {images / np.median(recent):.1f} images/s, loss {np.mean(recent_losses):.3f}"
        self._bar.n, self._bar.bar_format = iteration + 1, f"{self._form} [{said}]"
        self.say(f"Iteration {iteration}: loss = {loss:.3f}, {speed:.1f} images/s, {seconds:.2f} s")
        scalars = {"loss": loss, "gradient norm": norm, "learning rate": rate}
        scalars |= {"epoch": iteration / self.epoch, "images a second": speed}
        self._add(iteration, scalars | phases)
        self.resume()

    def _time_left(self, iteration):
        """The time left in words, "" if not known; a lost worker does not move the median."""
        if not self._recent:
            return ""
        seconds = (self.last - iteration) * np.median([seconds for seconds, _ in self._recent])
        return f"{timedelta(seconds=round(seconds))} left" if seconds < FOR_EVER else ""

    def _add(self, iteration, scalars):
        values = [tf.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(iteration, summary=tf.Summary(value=values))

    def _write(self, iteration, **content):
        """Write an event to the disk at once; after an error to another file. TensorBoard reads both.

        TensorFlow's own writer ends its thread at an error.
        """
        if not self.curves:
            return
        event = tf.Event(wall_time=time.time(), step=iteration, **content)
        try:
            with write_errors("--log-dir", self.curves.place):
                if not (self._writer and self._file.exists()):
                    self.curves.check()
                    self._file = self.curves.path / f"events.out.tfevents.{time.time_ns()}"
                    self._writer = tf.python_io.TFRecordWriter(str(self._file))
                    version = tf.Event(wall_time=time.time(), file_version="brain.Event:2")
                    self._writer.write(version.SerializeToString())
                self._writer.write(event.SerializeToString())
                self._writer.flush()
        except InputError as error:
            self._writer = None
            if not self.lost_curves:
                self.say(f"{error}: curves are lost while that lasts, training goes on")
            self.lost_curves = True


class Outcome(contextlib.AbstractContextManager):
    """What a run leaves behind, however it ends: checkpoints, the exported network, a last line.

    The end of a `with` saves and exports the newest weights. NotSaved if all went well but that.
    """

    def __init__(self, args, report, stop):
        """Open all places of the command line; InputError if one cannot be written."""
        self._args, self._report, self._stop = args, report, stop
        self._checkpoints, self._model = Checkpoints(args.checkpoint_dir), SavedModel(args.export_dir)
        self._network, self._facts, self._mean, self._saved = None, None, None, time.monotonic()
        self._best = 0, 0  # top-1 and iteration of the best validation of this run
        self.wanted = args.val_prefix is not None or args.export_dir is not None  # a whole network is
        report.curves = open_place("--log-dir", args.log_dir, remote=False)
        if not args.checkpoint_dir and not args.export_dir:
            missing = "there is no --checkpoint-dir and no --export-dir"
            say(f"The trained weights end with this run: {missing}")

    def start(self):
        """The Start of the run."""
        return self._checkpoints.start(self._args.iterations, self.wanted)

    def begin(self, network, mean, facts=None):
        """An AlexNet has weights from here on, for images that are centred by a mean image.

        `facts` become part of the run's checkpoints; without them, nothing is trained or saved.
        """
        self._network, self._mean, self._facts = network, mean, facts
        if facts:
            self._report.last, self._report.epoch = self._args.iterations, facts.epoch
            self._checkpoints.claim(facts)

    def save_if_due(self, iteration, every, minutes):
        """Save a checkpoint after every so many iterations, and after so many minutes; 0 is never."""
        old = minutes > 0 and time.monotonic() > self._saved + 60 * minutes
        if old or is_due(iteration, every):
            self.save()

    def save(self):
        """Save a checkpoint, if there are weights of a whole step that are not saved."""
        self._saved = time.monotonic()
        if self._facts and self._network.iteration:
            self._checkpoints.save(self._network, self._facts, self._mean)

    def validation(self, top1, top5):
        """Report the accuracies on all held-out images; a run that trains saves its best weights."""
        iteration = self._network.iteration
        self._report.validation(iteration, top1, top5)
        if self._facts:
            facts = dataclasses.replace(self._facts, validated=iteration)
            self._checkpoints.save(self._network, facts, self._mean, float(top1))
            # Not before: a signal may come while the save waits for another one.
            self._facts, self._best = facts, max(self._best, (top1, iteration))

    def needs_validation(self, iteration, every):
        """Whether it is time for a validation, which has not been before the run was resumed."""
        due = iteration >= self._args.iterations or is_due(iteration, every)
        return due and self._facts.validated != iteration

    def __exit__(self, kind, error, traceback):
        try:
            with self._stop.held():
                missing = self._finish(failed=isinstance(error, Exception))
        finally:
            self._stop.ignore()
        if missing and not error:
            raise NotSaved(f"not saved: {', '.join(missing)}")

    def _finish(self, failed):
        """Save and export the newest weights, and say what there is; what is missing."""
        self._report.close()
        with contextlib.closing(self._checkpoints) as checkpoints:
            if not self._network:
                return []
            self.save()
            checkpoints.wait()
        iteration, kept, missing = self._network.iteration, [], []
        if place := checkpoints.place:
            number, top1 = checkpoints.best or (0, 0)
            if checkpoints.saved:
                best = f" (best: top-1 {top1:.1%} at iteration {number})" if number else ""
                kept.append(f"checkpoints in {place}{best}")
            if checkpoints.saved != iteration:
                missing.append(f"the iterations after {checkpoints.saved}")
            if self._best[0] > top1:
                missing.append(f"the best: top-1 {self._best[0]:.1%} at iteration {self._best[1]}")
        if self._model.place and iteration:
            try:
                self._model.write(self._network, self._mean, keep=failed)
                kept.append(f"network in {self._model.place}")
            except InputError as error:
                say(f"The network is not exported: {error}")
                missing.append(f"network in {self._model.place}")
        if curves := self._report.curves:
            (missing if self._report.lost_curves else kept).append(f"curves in {curves.place}")
        lost = f"; not saved: {', '.join(missing)}" if missing else ""
        where = "in the middle of a step" if iteration is None else f"at iteration {iteration}"
        say(f"Stopped {where}: {', '.join(kept) or 'nothing is saved'}{lost}")
        return missing
