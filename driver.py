"""Train AlexNet on ImageNet, straight from the tar files in an S3 bucket, data-parallel on Ray.

    python driver.py --s3-bucket BUCKET [--key-prefix P] [--label-file L] [--iterations N]

This file tells the whole story from top to bottom, in the chapters of the original write-up. The other
modules hold the details. Edit the hyperparameters here, in the source.
"""

import argparse
import dataclasses
import itertools
import math
import os
import signal
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    while os.open(os.devnull, os.O_RDWR) < 3:  # no file may get the number of a standard stream
        pass
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while the imports take their seconds

import alexnet
import functions
import imagenet
from machinery import constants, ending, results
from machinery.cluster import joining, nodes, tasks
from machinery.cluster.pool import Pool
from machinery.errors import say

import ray

NUM_WORKERS = None  # workers, and mini-batches an iteration; None: as many as the cluster has room for
CPUS_PER_WORKER = 1  # CPUs, and so TensorFlow threads, of one worker
GPUS_PER_WORKER = 0  # GPUs of one worker
WORKER_WAIT = 300  # seconds that a worker has to start, and to wait for room where there is none
WORKER_TIMEOUT = 300  # seconds of computing after which a worker that does not answer is replaced
TASK_TIMEOUT = 1800  # seconds after which a task on data, such as a tar, ends itself and is run again
MINI_BATCH = 20  # images a worker computes one gradient on
STORED = None  # form of images in memory: "pixels", "jpeg" (an eighth), or None: pixels if they fit
SHUFFLE_ROUNDS = 5  # rounds of mixing the batches two by two: r rounds mix 2^r tars
ACCURACY_EVERY = 10  # iterations between two accuracies; 0: none
ACCURACY_SAMPLE = 100  # images of a batch that an accuracy is measured on, at most
VALIDATE_EVERY = 1000  # iterations between two validations, 0: none; one follows the last iteration
CHECKPOINT_EVERY = 500  # iterations between two checkpoints, 0: none; last and best are always kept
CHECKPOINT_MINUTES = 10  # minutes after which a checkpoint is due in any case, 0: never
CHECK_TARS = True  # False: a run resumes even if keys or ETags of tars are not those that it began with
LEARNING_RATE = 0.005  # step size for LEARNING_RATE_IMAGES; the paper's 0.01 is for 128
LEARNING_RATE_IMAGES = 40  # images of an iteration that it is for
LEARNING_RATE_POWER = 0  # how it follows them: 0 not at all, 0.5 as their root (Krizhevsky 2014), 1 in
# proportion (Goyal et al. 2017). On ten classes, none was better (benchmarks/README.md).
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


def train(args, start, report, outcome, stop, cluster):
    """The write-up, chapter by chapter: load, label, shuffle, then synchronous data-parallel SGD."""
    # ---- Where to begin: at a checkpoint of the same network and seed, or at iteration 0
    start.must_match(*settings_of(start.facts))

    # ---- Loading ImageNet, and a held-out set if there is one: tasks run from here on
    listed = imagenet.find(args.source, args.key_prefix, args.label_file)
    listed_held_out = imagenet.find(args.source, args.val_prefix, args.val_label_file)
    start.facts = plan = plan_of(start.facts, args.source, listed.tars + listed_held_out.tars)
    images = plan.mini_batches * MINI_BATCH  # of an iteration
    training = load(listed, plan.stored)
    start.must_match(training.fingerprints, ["labels", "tars"] if CHECK_TARS else ["labels"])
    held_out = load(listed_held_out, plan.stored)
    start.validate_on(held_out.fingerprints)

    # ---- AlexNet: one network in each worker, and the local one, which is trained
    pool = start_workers(min(how_many_workers(), plan.mini_batches), plan.precision, cluster)
    local = alexnet.AlexNet(LAYERS, NUM_CLASSES, rule=update_rule(images))
    rng = functions.generator(SEED, "initial weights")
    local.restore(start.take_state() or local.initial_state(INITIAL_WEIGHTS, rng), start.iteration)

    # ---- Matching images and labels, and shuffling: ImageNet comes sorted by class
    batches, held_out = functions.match(training), functions.match(held_out)
    mean = ray.put(functions.mean_image(batches))
    functions.shuffle(batches, SHUFFLE_ROUNDS, SEED)

    # ---- Training: iteration i is about the weights that i steps have made
    pool.wait()
    epoch = sum(batch.count for batch in batches) / images
    announce(start, pool.count, epoch, local.rule.rate, cluster.can_grow)
    outcome.begin(local, ray.get(mean), start.go_on(pool.machine(), epoch))
    settings = pool.helpers, batches, plan.mini_batches, SEED
    draw = partial(functions.draw_minibatches, *settings, MINI_BATCH)
    draw_sample = partial(functions.draw_sample, *settings, ACCURACY_SAMPLE)
    upcoming = draw(start.iteration)
    report.start(start.iteration, batches, mean)
    for iteration in itertools.count(start.iteration):
        # The local network's weights go into the object store once, and from there to every worker.
        pool.update_weights(iteration, ray.put(local.weights(plan.precision)))
        minibatches, upcoming = upcoming, draw(iteration + 1)  # ahead of time, beside all that follows
        report.lap("broadcast")

        # What these weights are worth: a validation, a checkpoint, or the end of the run.
        if held_out and outcome.needs_validation(iteration, VALIDATE_EVERY):
            outcome.validation(*functions.validate(pool, held_out, mean))
        outcome.save_if_due(iteration, CHECKPOINT_EVERY, CHECKPOINT_MINUTES)
        if iteration >= args.iterations:
            break
        report.resume()

        # A gradient from each random mini-batch, and now and then an accuracy on a random batch.
        sample = draw_sample(iteration) if results.is_due(iteration, ACCURACY_EVERY) else []
        losses, top1 = functions.compute_grad(pool, minibatches, sample, mean, KEEP_PROBABILITY, SEED)
        if sample:
            report.accuracy(iteration, top1)
        report.lap("compute")

        # Their mean, plus weight decay, trains the local network.
        gradients, norm = pool.mean_gradients(local.rule.decays(local.parameters))
        report.lap("gather")
        rate = local.rule.rate(iteration)
        with stop.held():  # a step is made whole
            local.apply(gradients, norm, rate)
        report.lap("apply")
        report.iteration(iteration, losses, images, norm, rate)


def evaluate(args, start, report, outcome, stop, cluster):
    """Where all iterations are made: a checkpoint's accuracy and export, without training images."""
    iteration, wanted = start.iteration, outcome.wanted
    hint = f"this is about iteration {iteration}" if wanted else "--iterations can be more"
    say(f"Nothing to train: {start.place} has iteration {start.reached} already; {hint}")
    if not wanted:
        return
    network = {"LAYERS": repr(LAYERS), "NUM_CLASSES": repr(NUM_CLASSES)}
    start.must_match(network, fixed=list(network))
    local = alexnet.AlexNet(LAYERS, NUM_CLASSES)
    local.restore(start.take_state(), iteration)
    outcome.begin(local, start.mean)
    report.epoch = start.facts.epoch
    if args.val_prefix is not None:
        listed = imagenet.find(args.source, args.val_prefix, args.val_label_file)
        plan = plan_of(start.facts, args.source, listed.tars)
        held_out = load(listed, plan.stored)
        pool = start_workers(how_many_workers(), plan.precision, cluster)
        held_out = functions.match(held_out)
        pool.wait()
        pool.update_weights(iteration, ray.put(local.weights(plan.precision)))
        outcome.validation(*functions.validate(pool, held_out, ray.put(start.mean)))


def settings_of(facts):
    """The constants as texts, of a run that has the Facts of a checkpoint, and which must stay so."""
    edited = {name: repr(globals()[name]) for name in [*constants.RULES, "LAYERS"]}
    fixed = ["LAYERS", "NUM_CLASSES", "SEED", "MINI_BATCH", "STORED", "SHUFFLE_ROUNDS"]
    return edited | {"STORED": repr(STORED or facts.stored)}, fixed


def plan_of(facts, source, tars):
    """Facts with mini-batches, precision and form of the images: as they were, or as fits the nodes."""
    mini_batches = facts.mini_batches or how_many_workers()
    precision = PRECISION or facts.precision
    precision = precision or nodes.fastest_precision(CPUS_PER_WORKER, GPUS_PER_WORKER)
    one_set = alexnet.set_bytes(LAYERS, NUM_CLASSES, precision)
    room = partial(nodes.room_for_images, mini_batches, one_set)
    stored = imagenet.form_of_images(source, tars, STORED or facts.stored, room)
    return dataclasses.replace(facts, mini_batches=mini_batches, precision=precision, stored=stored)


def load(listed, stored):
    """Start to load a data set's tars and labels: a functions.Loading, which `match` waits for."""
    if not listed.tars:
        return functions.Loading(listed, [], None, None)
    # One remote task a tar downloads and decodes it into the object store, a large tar in parts.
    loaded = imagenet.load_tarfiles_from_s3(listed.source, listed.tars, stored=stored)
    # The label file's table goes into the object store once, for every `convert`.
    labels = imagenet.read_labels(listed.source, listed.label_file, NUM_CLASSES)
    imagepairs = ray.put(functions.label_table(labels))
    etags = {tar.key: tar.etag for tar in listed.tars}
    fingerprints = {"tars": imagenet.digest(etags), "labels": imagenet.digest(labels)}
    return functions.Loading(listed, loaded, imagepairs, fingerprints)


def how_many_workers():
    """NUM_WORKERS, or as many as the cluster has room for."""
    return NUM_WORKERS or max(1, sum(nodes.room_for_workers(CPUS_PER_WORKER, GPUS_PER_WORKER).values()))


def start_workers(count, precision, cluster):
    """A pool of workers, each of which begins to build its network. They end with the cluster."""
    network = {"layers": LAYERS, "num_classes": NUM_CLASSES, "precision": precision}
    network |= {"threads": CPUS_PER_WORKER, "gpus": GPUS_PER_WORKER}
    pool = Pool(count, network, cluster.actor, functions.Helper, cluster.can_grow)
    return cluster.enter_context(pool)


def update_rule(images):
    """The update rule of a run whose iterations have so many images."""
    rates = {"rate": LEARNING_RATE, "base": LEARNING_RATE_IMAGES, "power": LEARNING_RATE_POWER}
    schedule = alexnet.Schedule(**rates, warm_up=WARM_UP, drops=LEARNING_RATE_DROPS, images=images)
    return alexnet.Momentum(schedule, MOMENTUM, WEIGHT_DECAY, CLIP_NORM)


def announce(start, workers, epoch, rate, can_grow):
    """Say what is about to be trained, and from where on."""
    what = f"{start.facts.mini_batches} mini-batches of {MINI_BATCH} images, in {start.facts.precision}"
    say(f"{workers} workers; an iteration is {what}, an epoch is {epoch:.5g} iterations")
    say(f"The learning rate is {rate}")
    if start.iteration:
        say(f"Resumed from {start.place} at iteration {start.iteration}")
    elif can_grow and not NUM_WORKERS:
        say("The number of mini-batches stays so. To wait for more workers, set NUM_WORKERS")


def runtime_env():
    """What brings the modules to every node: for `ray.init`, in a notebook on several nodes, too."""
    names = ["alexnet.py", "functions.py", "imagenet.py", "machinery"]
    paths = [str(Path(__file__).resolve().parent / name) for name in names]
    return {"py_modules": paths, "excludes": ["__pycache__"]}


def read_flags(argv):
    """The flags of a command line."""
    parser = argparse.ArgumentParser(description="Train AlexNet on the ImageNet tars in an S3 bucket.")
    for flag, default, text in (
        ("--s3-bucket", "sparknet", "bucket that holds the image data, or a folder"),
        ("--key-prefix", "ILSVRC2012_img_train/n015", "prefix of the tars' keys"),
        ("--label-file", "train.txt", "key of the file of labels"),
        ("--val-prefix", None, "prefix of the tars of a held-out set to validate on"),
        ("--val-label-file", "val.txt", "key of the file of its labels"),
        ("--checkpoint-dir", None, "save to and resume from a folder or s3://bucket/prefix"),
        ("--export-dir", None, "export the network as a SavedModel, to a folder or s3://bucket/prefix"),
        ("--log-dir", None, "write learning curves for TensorBoard to a folder"),
    ):
        parser.add_argument(flag, default=default, help=text)
    hint = "iterations in all; see README.md on evaluating"
    parser.add_argument("--iterations", type=int, default=math.inf, help=hint)
    args = parser.parse_args(argv)
    if args.iterations < 1:
        parser.error("--iterations must be 1 or more")
    return args


def main(argv=None, report=None, actor=functions.Worker):
    """Train as the command line says.

    `report` is a results.Report, `actor` the class of the workers: who watches a run hands in others.
    Raises InputError or ClusterError where it cannot train, NotSaved where it has trained but cannot
    save, KeyboardInterrupt after a signal, BrokenPipeError once nobody reads the output.
    """
    args, report = read_flags(argv), report or results.Report()
    with report.lines(), ending.Stop() as stop:
        constants.check(globals(), alexnet.are_layers)
        args.source = imagenet.source_of(args.s3_bucket)
        with joining.join(runtime_env(), actor, stop.held) as cluster:
            tasks.limits.update(task=TASK_TIMEOUT, wait=WORKER_WAIT, work=WORKER_TIMEOUT)
            nodes.places.first_look(functions.__name__)
            with results.Outcome(args, report, stop) as outcome:
                nodes.head.when_silent = outcome.save
                start = outcome.start()
                run = evaluate if start.trained else train
                run(args, start, report, outcome, stop, cluster)


if __name__ == "__main__":
    ending.leave(ending.status(main))
