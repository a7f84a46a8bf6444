"""Train AlexNet on ImageNet, straight from the tar files in an S3 bucket, data-parallel on Ray.

    python driver.py --s3-bucket BUCKET [--key-prefix P] [--label-file L] [--iterations N]

This file tells the whole story from top to bottom, in the chapters of the original write-up. The other
modules hold the details. Edit the hyperparameters here, in the source.
"""

import _thread
import argparse
import contextlib
import ctypes
import itertools
import math
import os
import signal
import sys
import threading
from functools import partial

if __name__ == "__main__":
    while os.open(os.devnull, os.O_RDWR) < 3:  # no file may get the number of a standard stream
        pass
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while the imports take their seconds

# The run says in a line what Ray's processes say of faults in twenty; Ray reads this when it loads.
faults = "Raylet is|The node with|A worker died|Task .* failed|.*killed due to|WARNING: .* processes"
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", f"^({faults})")

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

import alexnet
import cluster
import constants
import decoding
import functions
import imagenet
import joining
import results
import s3
import workers

NUM_WORKERS = None  # workers, and mini-batches an iteration; None: as many as the cluster has room for
CPUS_PER_WORKER = 1  # CPUs, and so TensorFlow threads, of one worker
GPUS_PER_WORKER = 0  # GPUs of one worker
WORKER_WAIT = 300  # seconds that a worker has to start, and to wait for room where there is none
WORKER_TIMEOUT = 300  # seconds of computing after which a worker that does not answer is replaced
TASK_TIMEOUT = 1800  # seconds after which a task on data that does not end, such as a tar, is run again
MINI_BATCH = 20  # images a worker computes one gradient on
STORED = None  # form of images in memory: "pixels", "jpeg" (an eighth), or None: pixels if they fit
SHUFFLE_ROUNDS = 5  # rounds of mixing the batches two by two: r rounds mix 2^r tars
ACCURACY_EVERY = 10  # iterations between two accuracies; 0: none
ACCURACY_SAMPLE = 100  # images of a batch that an accuracy is measured on, at most
VALIDATE_EVERY = 1000  # iterations between two validations, 0: none; one follows the last iteration
CHECKPOINT_EVERY = 500  # iterations between two checkpoints, 0: none. The last iteration is always one,
# and so is each validation that is the best so far.
CHECK_TARS = True  # False: a run resumes even if keys or ETags of tars are not those that it began with
LEARNING_RATE = 0.005  # step size for LEARNING_RATE_IMAGES; the paper's 0.01 is for 128
LEARNING_RATE_IMAGES = 40  # images of an iteration that it is for
LEARNING_RATE_POWER = 0  # how it follows them: 0 not at all, 0.5 as their root (Krizhevsky 2014), 1 in
# proportion (Goyal et al. 2017). 0 was best for 640 images, on ten classes (benchmarks/README.md).
WARM_UP = 5000  # images over which a higher rate is reached (Goyal et al. 2017, section 2.2)
LEARNING_RATE_DROPS = ()  # images from which on it is a tenth of what it was (paper, section 5)
MOMENTUM = 0.9  # share of the last step that the next one keeps (paper, section 5)
WEIGHT_DECAY = 5e-4  # pull of the kernels towards zero, added to the mean gradient (paper, section 5)
CLIP_NORM = 10.0  # a mean gradient that is longer is shortened to it, or the loss can jump back
PRECISION = None  # of products: "float32" or "bfloat16"; None: bfloat16 if all CPUs are faster in it
KEEP_PROBABILITY = 0.5  # of a unit, in dropout after the first two fully connected layers
INITIAL_WEIGHTS = "he"  # "he", or a standard deviation; the write-up's 0.1 learns nothing
NUM_CLASSES = 1000  # labels are 0..NUM_CLASSES-1
LAYERS = alexnet.LAYERS  # the network's table of layers
SEED = 0  # decides everything random: shuffle, mini-batches, crops, mirrors, dropout, initial weights


def train(args, start, stop, report, outcome, tasks, actor, can_grow):
    """The write-up, chapter by chapter: load, label, shuffle, then synchronous data-parallel SGD."""
    say, bucket = report.say, args.s3_bucket

    # ---- Where to begin: at a checkpoint of the same network and seed, or at iteration 0
    edited = {name: repr(value) for name, value in globals().items() if name.isupper()}
    edited["STORED"] = repr(STORED or start.stored)
    fixed = ["LAYERS", "NUM_CLASSES", "SEED", "MINI_BATCH", "STORED", "SHUFFLE_ROUNDS"]
    start.must_match(edited, fixed, say)

    # ---- What an iteration is: the first start decides
    num_workers = how_many_workers()
    mini_batches = start.mini_batches or num_workers
    precision = PRECISION or start.precision or cluster.fastest_precision(**resources())

    # ---- Loading ImageNet, and a held-out set if there is one: tasks run from here on
    tars, held_out_tars = (find(bucket, prefix, say) for prefix in (args.key_prefix, args.val_prefix))
    stored = form_of_images(bucket, tars + held_out_tars, start.stored, mini_batches, precision, say)
    training = load(bucket, args.key_prefix, tars, args.label_file, stored, tasks)
    start.must_match(source := training.source, fixed_data(), say)
    held_out = load(bucket, args.val_prefix, held_out_tars, args.val_label_file, stored, tasks)
    start = start.validated_on(held_out and held_out.source, say)

    # ---- AlexNet: one network in each worker, and the local one, which is trained
    helpers = cluster.Helpers()
    pool = start_workers(min(num_workers, mini_batches), precision, helpers, report, can_grow, actor)
    rule = update_rule(images := mini_batches * MINI_BATCH)
    local = alexnet.AlexNet(LAYERS, NUM_CLASSES, rule)
    rng = functions.generator(SEED, "initial weights")
    local.restore(start.state or local.initial_state(INITIAL_WEIGHTS, rng), start.iteration)
    start.forget_state()  # 500 MB that nobody needs from here on

    # ---- Matching images and labels, and shuffling: ImageNet comes sorted by class
    batches = functions.match(training, say, tasks)
    held_out = functions.match(held_out, say, tasks) if held_out else []
    del training  # or its references would keep every batch twice
    mean = ray.put(mean_image := functions.mean_image(batches, say, tasks))
    functions.shuffle(batches, SHUFFLE_ROUNDS, SEED, say, tasks)

    # ---- Training: iteration i is about the weights that i steps have made
    pool.wait()
    what = f"{mini_batches} mini-batches of {MINI_BATCH} images, in {precision}"
    report.plan(args.iterations, epoch := sum(batch.count for batch in batches) / images)
    say(f"{pool.count} workers; an iteration is {what}, an epoch is {epoch:.5g} iterations")
    say(f"The learning rate is {rule.rate}")
    if start.iteration:
        say(f"Resumed from {args.checkpoint_dir} at iteration {start.iteration}")
    elif can_grow and not NUM_WORKERS:
        say("The number of mini-batches stays so. To wait for more workers, set NUM_WORKERS")
    start.must_match(machine := pool.machine(), [], say)
    run = edited | {"STORED": repr(stored)} | source | machine
    facts = {"mini_batches": mini_batches, "precision": precision, "stored": stored, "run": run}
    outcome.begin(local, mean_image, start.of_validations() | facts | {"epoch": epoch})
    draw = partial(helpers.draw_minibatches, batches, MINI_BATCH, mini_batches, SEED)
    minibatches = draw(start.iteration)
    report.start(start.iteration, batches, mean)
    for iteration in itertools.count(start.iteration):
        # The local network's weights go into the object store once, and from there to every worker.
        pool.update_weights(iteration, ray.put(local.weights(precision)))
        upcoming = draw(iteration + 1)  # the next mini-batches, ahead of time, beside all that follows
        report.lap("broadcast")

        # What these weights are worth: a checkpoint, a validation, or the end of the run.
        last = iteration >= args.iterations
        due = (last or is_due(iteration, VALIDATE_EVERY)) and not outcome.is_validated(iteration)
        if held_out and due:
            outcome.validation(*pool.validate(held_out, mean))
        if is_due(iteration, CHECKPOINT_EVERY):
            outcome.save()
        if last:
            break
        report.resume()

        # A gradient from each random mini-batch, and now and then an accuracy on a random batch.
        if is_due(iteration, ACCURACY_EVERY):
            sample = helpers.draw_sample(batches, ACCURACY_SAMPLE, mini_batches, SEED, iteration)
            pool.print_accuracy(sample, mean)
        losses = pool.compute_grad(minibatches, mean, KEEP_PROBABILITY, SEED)
        report.lap("compute")

        # Their mean, plus weight decay, trains the local network.
        gradients, norm = pool.mean_gradients(rule.decays(alexnet.weight_shapes(LAYERS, NUM_CLASSES)))
        report.lap("gather")
        rate = rule.rate(iteration)
        with stop.held():  # a step is made whole
            local.apply(gradients, norm, rate)
        report.lap("apply")
        report.iteration(iteration, losses, images, norm, rate)
        minibatches = upcoming


def evaluate(args, start, report, outcome, tasks, actor, can_grow):
    """What can be done where all iterations are made: a checkpoint's accuracy, and its export.

    Its mean image centres the held-out images, so that no training image is needed. Nothing is saved.
    """
    say, bucket = report.say, args.s3_bucket
    about = f"this is about iteration {start.iteration}"
    hint = about if is_wanted(args) else "--iterations can be more"
    say(f"Nothing to train: {start.place} has iteration {start.reached} already; {hint}")
    if not is_wanted(args):
        return
    network = {"LAYERS": repr(LAYERS), "NUM_CLASSES": repr(NUM_CLASSES)}
    start.must_match(network, list(network), say)
    local = alexnet.AlexNet(LAYERS, NUM_CLASSES)
    local.restore(start.state, start.iteration)
    start.forget_state()
    mean = find_mean(args, start, tasks, say) if start.mean is None else start.mean
    outcome.begin(local, mean)
    report.plan(start.iteration, start.epoch)
    if args.val_prefix is not None:
        tars, precision = find(bucket, args.val_prefix, say), PRECISION or start.precision
        stored = form_of_images(bucket, tars, start.stored, start.mini_batches, precision, say)
        held_out = load(bucket, args.val_prefix, tars, args.val_label_file, stored, tasks)
        pool = start_workers(how_many_workers(), precision, cluster.Helpers(), report, can_grow, actor)
        held_out = functions.match(held_out, say, tasks)
        pool.wait()
        pool.update_weights(start.iteration, ray.put(local.weights(precision)))
        outcome.validation(*pool.validate(held_out, ray.put(mean)))


def find_mean(args, start, tasks, say):
    """The mean of all training images, for a checkpoint that was saved without it."""
    say(f"{start.place} has no mean image yet: the training set is loaded to compute it")
    tars = find(args.s3_bucket, args.key_prefix, say)
    training = load(args.s3_bucket, args.key_prefix, tars, args.label_file, start.stored, tasks)
    start.must_match(training.source, fixed_data(), say)
    return functions.mean_image(functions.match(training, say, tasks), say, tasks)


def fixed_data():
    """What must be as it was at the first start: fingerprints of a functions.DataSet."""
    return ["labels", "tars"] if CHECK_TARS else ["labels"]


def is_wanted(args):
    """Whether a checkpoint is to be evaluated or exported."""
    return args.val_prefix is not None or args.export_dir is not None


def resources():
    """The CPUs and GPUs of one worker."""
    return {"cpus": CPUS_PER_WORKER, "gpus": GPUS_PER_WORKER}


def how_many_workers():
    """NUM_WORKERS, or as many as the cluster has room for."""
    return NUM_WORKERS or max(1, sum(cluster.room_for_workers(**resources()).values()))


def start_workers(count, precision, helpers, report, can_grow, actor):
    """A pool of workers, each of which begins to build its network."""
    network = {"layers": LAYERS, "num_classes": NUM_CLASSES}
    timeouts = WORKER_TIMEOUT, WORKER_WAIT
    what = count, resources(), network, precision, helpers, timeouts, report, can_grow
    return workers.Workers(*what, actor)


def is_due(iteration, every):
    """Whether it is time for what happens after every so many iterations; 0 is never."""
    return every > 0 and iteration % every == 0


def update_rule(images):
    """The update rule of a run whose iterations have so many images."""
    rates = LEARNING_RATE, LEARNING_RATE_IMAGES, LEARNING_RATE_POWER, WARM_UP, LEARNING_RATE_DROPS
    return alexnet.Momentum(alexnet.Schedule(*rates, images), MOMENTUM, WEIGHT_DECAY, CLIP_NORM)


def find(bucket, prefix, say):
    """The tars of a data set; none if there is no prefix."""
    if prefix is None:
        return []
    tars, others = imagenet.list_tars(bucket, prefix)
    say(f"s3://{bucket}/{prefix}*: {len(tars)} tars, {others} other keys left out")
    return tars


def form_of_images(bucket, tars, before, mini_batches, precision, say):
    """The form in which all images are stored: STORED, or the form of `before`, or what fits."""
    one_set = alexnet.set_bytes(LAYERS, NUM_CLASSES, precision)
    images = imagenet.estimate_images(bucket, tars)
    in_batch = min(images / len(tars), decoding.PART.images)
    batches = {form: in_batch * size for form, size in imagenet.STORED_BYTES.items()}
    room = {f: cluster.room_for_images(mini_batches, one_set, batch) for f, batch in batches.items()}
    stored = STORED or before or imagenet.form_that_fits(images, room["pixels"])
    say(imagenet.memory_needed(images, stored, room[stored]))
    return stored


def load(bucket, prefix, tars, label_file, stored, tasks):
    """Start to load a data set's tars and labels: a functions.DataSet, which `match` waits for.

    None if there are no tars. `stored` is the form of the images, `tasks` are the cluster's DataTasks.
    """
    if not tars:
        return None
    # One remote task a tar downloads and decodes it into the object store, a large tar in parts.
    loaded = imagenet.load_tarfiles_from_s3(bucket, tars, [imagenet.IMAGE_SIZE] * 2, tasks, stored)
    # The label file's table goes into the object store once, for every `convert`.
    labels = imagenet.read_labels(bucket, label_file, NUM_CLASSES)
    imagepairs = ray.put(functions.LabelTable(labels))
    etags = {tar.key: tar.etag for tar in tars}
    source = {"tars": imagenet.digest(etags), "labels": imagenet.digest(labels)}
    return functions.DataSet(bucket, prefix, label_file, loaded, imagepairs, source)


class Stop:
    """What SIGINT, SIGTERM and SIGHUP do: they raise KeyboardInterrupt, but not while it is `held`."""

    def __init__(self):
        """No signal has come yet. The thread that calls this is the one to be stopped."""
        self.signum, self.error, self._held = 0, None, False
        self._thread = threading.current_thread()
        self.in_main = self._thread is threading.main_thread()

    def __call__(self, signum, frame):
        """Handle a signal; a second one does not wait for anything."""
        again, self.signum = self.signum, signum
        if again or not self._held:
            raise KeyboardInterrupt  # no other exception comes out of Ray's waits

    def fail(self, error):
        """End the run with an error that any thread has found, unless something ends it already."""
        if not self.signum and not self.error:
            self.error = error
            if self.in_main:
                _thread.interrupt_main()
            elif not self._held:
                end = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), end)

    @contextlib.contextmanager
    def held(self):
        """What must not be left halfway: a signal that comes meanwhile stops the run at its end."""
        before, self._held = (self.signum, self.error), True
        try:
            yield
        finally:
            self._held = False
        if (self.signum, self.error) != before:
            raise KeyboardInterrupt


def explain(error):
    """The one line that a user needs of an error: its own, or that of the remote cause."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, OutOfDiskError | ObjectStoreFullError):
        hint = "free the disk that Ray spills to, add nodes, or train on fewer tars (--key-prefix)"
        return f"a node's object store and disk are full: {hint}"
    if isinstance(cause, s3.InputError | joining.ClusterError):
        return str(cause)
    if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
        return f"Ray cannot go on: {cluster.first_line(cause)}"
    raise error


def read_flags(argv):
    """The flags of a command line."""
    parser = argparse.ArgumentParser(description="Train AlexNet on the ImageNet tars in an S3 bucket.")
    for flag, default, text in (
        ("--s3-bucket", "sparknet", "bucket that holds the image data"),
        ("--key-prefix", "ILSVRC2012_img_train/n015", "prefix of the tars' keys"),
        ("--label-file", "train.txt", "key of the file of labels"),
        ("--val-prefix", None, "prefix of the tars of a held-out set to validate on"),
        ("--val-label-file", "val.txt", "key of the file of its labels"),
        ("--checkpoint-dir", None, "save to and resume from a folder or s3://bucket/prefix"),
        ("--export-dir", None, "export the network as a SavedModel, to a folder or s3://bucket/prefix"),
        ("--log-dir", None, "write learning curves for TensorBoard to a folder"),
    ):
        parser.add_argument(flag, default=default, help=text)
    parser.add_argument(
        "--iterations",
        type=int,
        default=math.inf,
        help="iterations in all; see README.md on evaluating",
    )
    args = parser.parse_args(argv)
    if args.iterations < 1:
        parser.error("--iterations must be 1 or more")
    return args


def main(argv=None, report=None, actor=functions.Worker):
    """Train as the command line says.

    `report` is a results.Report: what watches the run, or measures it, hands in its own. `actor` is the
    class of the workers: a benchmark of all but computing hands in one that computes nothing. Returns
    the exit status: 0; 2 where it cannot train; 3 where not all is saved; 129, 130, 143 after a signal;
    141 once nobody reads the output.
    """
    args, report = read_flags(argv), report or results.Report()
    stop, own_ray = Stop(), not ray.is_initialized()
    report.listen(stop.fail)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if stop.in_main else ()
    handlers = {number: signal.getsignal(number) for number in signals}
    if handlers.get(signal.SIGHUP) == signal.SIG_IGN:
        del handlers[signal.SIGHUP]  # nohup: the run outlives its terminal
    for number in handlers:
        signal.signal(number, stop)
    try:
        constants.check(globals())
        args.s3_bucket = s3.bucket_name(args.s3_bucket)
        address = joining.find_address(report.say) if own_ray else None
        with stop.held():  # Ray can crash if its start is interrupted
            can_grow = joining.connect(address)
            for number in handlers:
                signal.signal(number, stop)  # again: Ray's start sets a handler of its own
        outcome = results.Outcome(args, report)
        with contextlib.closing(cluster.DataTasks(report.say, TASK_TIMEOUT, stop.fail)) as tasks:
            try:
                start = outcome.checkpoints.start(args.iterations, wanted=is_wanted(args))
                if start.trained:
                    evaluate(args, start, report, outcome, tasks, actor, can_grow)
                else:
                    train(args, start, stop, report, outcome, tasks, actor, can_grow)
            finally:  # whatever the end is, what is trained is saved
                failed = stop.error or isinstance(sys.exc_info()[1], Exception)
                with stop.held():
                    whole = outcome.finish(failed)
        status = 0 if whole else 3
    except KeyboardInterrupt:
        status = 128 + (stop.signum or signal.SIGINT)
        if isinstance(stop.error, BrokenPipeError):
            status = 128 + signal.SIGPIPE
        elif stop.error:
            status = 2
            print(f"error: {stop.error}", file=sys.stderr)
    except SystemExit as end:  # while it starts, Ray answers SIGTERM so
        status = 128 + end.code
    except (s3.InputError, joining.ClusterError, RayError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        status = 2
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # the end takes a moment, and is not interrupted
        if own_ray:
            ray.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status


if __name__ == "__main__":
    status = main()
    with contextlib.suppress(OSError, AttributeError):  # it may be closed
        sys.stdout.flush()
    os._exit(status)  # a save that a second signal has given up may still wait for S3, in a thread
