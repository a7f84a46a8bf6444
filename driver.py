"""Train AlexNet on ImageNet, straight from the tar files in an S3 bucket, data-parallel on Ray.

    python driver.py --s3-bucket BUCKET [--key-prefix P] [--label-file L] [--iterations N]

This file tells the whole story from top to bottom; functions.py, imagenet.py and alexnet.py hold the
details. Edit the hyperparameters here, in the source.
"""

import argparse
import math
import os
import signal
import sys
from functools import partial

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while the imports take their seconds

import numpy as np
import ray

import alexnet
import functions
import imagenet

NUM_WORKERS = None  # workers, and mini-batches an iteration; None: as many as the cluster has room for
CPUS_PER_WORKER = 1  # CPUs, and so TensorFlow threads, of one worker
GPUS_PER_WORKER = 0  # GPUs of one worker
WORKER_WAIT = 300  # seconds to wait for room for all workers, on a cluster that may still grow
WORKER_TIMEOUT = 300  # seconds after which a worker that does not answer is replaced
MINI_BATCH = 20  # images a worker computes one gradient on
SHUFFLE_ROUNDS = 5  # rounds of mixing the batches two by two: r rounds mix 2^r tars
ACCURACY_EVERY = 10  # iterations between two accuracies
ACCURACY_SAMPLE = 100  # images of a batch that an accuracy is measured on, at most
VALIDATE_EVERY = 1000  # iterations between two validations; the last iteration is followed by one
CHECKPOINT_EVERY = 500  # iterations between two checkpoints; the last iteration is always one
LEARNING_RATE = 0.005  # step size; the paper's 0.01 is for mini-batches of 128 images
LEARNING_RATE_DROPS = ()  # iterations from which on it is a tenth of what it was (paper, section 5)
MOMENTUM = 0.9  # share of the last step that the next one keeps (paper, section 5)
WEIGHT_DECAY = 5e-4  # pull of the kernels towards zero, added to the mean gradient (paper, section 5)
CLIP_NORM = 10.0  # a mean gradient that is longer is shortened to it, or the loss can jump back
PRECISION = None  # of products: "float32" or "bfloat16"; None: the faster one on the CPUs found
KEEP_PROBABILITY = 0.5  # of a unit, in dropout after the first two fully connected layers
INITIAL_WEIGHTS = "he"  # "he", or a standard deviation; the write-up's 0.1 learns nothing
NUM_CLASSES = 1000  # labels are 0..NUM_CLASSES-1
LAYERS = alexnet.LAYERS  # the network's table of layers
SEED = 0  # decides everything random: shuffle, mini-batches, crops, mirrors, dropout, initial weights


def train(args, stop, joined):
    """The write-up, step by step: load, label, shuffle, then synchronous data-parallel SGD."""
    checkpoints = args.checkpoint_dir and alexnet.Checkpoints(args.checkpoint_dir)
    model = args.export_dir and alexnet.SavedModel(args.export_dir)
    curves = args.log_dir and alexnet.LearningCurves(args.log_dir)
    if not checkpoints and not model:
        print("The trained weights end with this run: there is no --checkpoint-dir and no --export-dir")
    bucket = args.s3_bucket

    # Load ImageNet: one remote task a tar downloads and decodes it into the object store.
    tars, others = imagenet.list_tars(bucket, args.key_prefix)
    print(f"s3://{bucket}/{args.key_prefix}*: {len(tars)} tars, {len(others)} other keys left out")
    functions.announce_memory(imagenet.estimate_images(bucket, tars))
    data = functions.data_task_options()
    loaded = imagenet.load_tarfiles_from_s3(bucket, tars, [256, 256], **data)

    # Labels: the dictionary of the label file goes into the object store once, for every `convert`.
    imagepairs = imagenet.read_labels(bucket, args.label_file, NUM_CLASSES)
    pairs = ray.put(imagepairs)
    converted = [functions.convert.options(**data).remote(names, pairs) for _, names, _ in loaded]

    # A held-out set, to validate on, is loaded like it.
    held_out = args.val_prefix is not None and functions.load_held_out(
        bucket, args.val_prefix, args.val_label_file, NUM_CLASSES, **data
    )

    # A checkpoint, if there is one, must be of this network, seed and data; it fixes the mini-batches.
    run = {name: repr(value) for name, value in globals().items() if name.isupper()}
    run |= {"tars": imagenet.digest(tars), "labels": imagenet.digest(imagepairs)}
    same = ["LAYERS", "NUM_CLASSES", "SEED", "MINI_BATCH", "SHUFFLE_ROUNDS", "tars", "labels"]
    state, facts = checkpoints.resume(run, same) if checkpoints else (None, None)
    num_workers = NUM_WORKERS or max(1, functions.room_for_workers(CPUS_PER_WORKER, GPUS_PER_WORKER))
    facts = facts or {"iteration": 0, "mini_batches": num_workers, "precision": None}
    iteration, mini_batches = facts["iteration"], facts["mini_batches"]
    precision = PRECISION or facts["precision"] or functions.fastest_precision(GPUS_PER_WORKER)

    # AlexNet: a local network, which is trained, and one in each worker; they start while data loads.
    network = {"layers": LAYERS, "num_classes": NUM_CLASSES}
    helpers = functions.Helpers()
    workers = functions.Workers(
        min(num_workers, mini_batches),
        {"cpus": CPUS_PER_WORKER, "gpus": GPUS_PER_WORKER},
        network | {"threads": CPUS_PER_WORKER, "gpus": GPUS_PER_WORKER, "precision": precision},
        helpers,
        timeout=WORKER_TIMEOUT,
        cluster_can_grow=joined,
    )
    alexnet.keep_memory()
    local = alexnet.AlexNet(**network, momentum=MOMENTUM)
    if state:
        local.restore(state)
    else:
        rng = functions.generator(SEED, "initial weights")
        local.initialize(alexnet.initial_weights(LAYERS, NUM_CLASSES, INITIAL_WEIGHTS, rng))

    # Match images and labels.
    batches = functions.match(bucket, loaded, converted, "--key-prefix, --label-file", **data)
    held_out = held_out and functions.match(bucket, *held_out, "--val-prefix, --val-label-file", **data)
    del loaded, converted  # or their references would keep every batch twice
    mean = functions.mean_image(batches, **data)

    # Shuffle: ImageNet comes sorted by class, so batches are mixed two by two, in several rounds.
    for number in range(SHUFFLE_ROUNDS):
        batches = functions.shuffle_round(batches, SEED, number, **data)
        ray.wait([batch.labels for batch in batches], num_returns=len(batches), fetch_local=False)
        print(f"Shuffle round {number + 1} of {SHUFFLE_ROUNDS} done")

    workers.wait(WORKER_WAIT)
    print(
        f"{workers.count} workers; an iteration is {mini_batches} mini-batches of {MINI_BATCH} images, "
        f"in {precision}"
    )
    if state:
        print(f"Resumed from {args.checkpoint_dir} at iteration {iteration}")
    if curves:
        curves.start(iteration)

    draw = partial(helpers.draw_minibatches, batches, MINI_BATCH, mini_batches, SEED)
    minibatches, stop.at_once = draw(iteration), False
    while not stop.signum and iteration < args.iterations:
        watch = functions.Stopwatch()

        # The local network's weights go into the object store once, and from there to every worker.
        workers.update_weights(iteration, ray.put(local.weights(precision)))
        upcoming = draw(iteration + 1)  # the next mini-batches, ahead of time, beside all that follows

        # The accuracy of these weights on a random batch, beside the training.
        if due := iteration % ACCURACY_EVERY == 0:
            sample = helpers.draw_sample(batches, ACCURACY_SAMPLE, SEED, iteration)
            workers.print_accuracy(sample, mean)
        watch.lap("broadcast")

        # A gradient from each random mini-batch.
        losses = workers.compute_grad(minibatches, mean, KEEP_PROBABILITY, SEED)
        watch.lap("compute")

        # Their mean, plus weight decay, trains the local network.
        gradients, norm = workers.mean_gradients(WEIGHT_DECAY)
        watch.lap("gather")
        rate = LEARNING_RATE / 10 ** sum(iteration >= drop for drop in LEARNING_RATE_DROPS)
        local.apply(gradients, rate * CLIP_NORM / max(norm, CLIP_NORM))
        watch.lap("apply")

        seconds = sum(watch.seconds.values())
        loss, speed = np.mean(losses), mini_batches * MINI_BATCH / seconds
        print(f"Iteration {iteration}: loss = {loss:.3f}, {speed:.1f} images/s, {seconds:.2f} s")
        if curves:
            scalars = {"loss": loss, "gradient norm": norm, "learning rate": rate}
            scalars |= {"images a second": speed} | watch.seconds
            curves.add(iteration, scalars | ({"accuracy": workers.accuracy} if due else {}))
        iteration, minibatches = iteration + 1, upcoming

        last = stop.signum or iteration == args.iterations
        if checkpoints and (last or iteration % CHECKPOINT_EVERY == 0):
            facts |= {"iteration": iteration, "precision": precision, "run": run}
            checkpoints.save(iteration, local.state(), facts)
        if held_out and (iteration == args.iterations or iteration % VALIDATE_EVERY == 0):
            workers.update_weights(iteration, ray.put(local.weights(precision)))
            top1, top5 = workers.validate(held_out, mean)
            print(f"Iteration {iteration}: validation top-1 = {top1:.1%}, top-5 = {top5:.1%}")
            if curves:
                curves.add(iteration, {"validation top-1": top1, "validation top-5": top5})

    # What the run leaves behind.
    if checkpoints:
        checkpoints.wait()
    if model:
        model.write(local, ray.get(mean))
    places = {"checkpoints": args.checkpoint_dir, "network": args.export_dir, "curves": args.log_dir}
    left = [f"{what} in {place}" for what, place in places.items() if place]
    print(f"Stopped at iteration {iteration}: {', '.join(left) or 'nothing is saved'}")


class Stop:
    """SIGINT and SIGTERM: stop at once while `at_once`, else after the step; a second one at once."""

    def __init__(self):
        self.signum, self.at_once = 0, False

    def __call__(self, signum, frame):
        if self.signum or self.at_once:
            self.signum = signum
            raise KeyboardInterrupt
        self.signum = signum
        print("Stopping after this step", flush=True)


def main(argv=None):
    """Train as the command line says. Returns the exit status: 0, 2 (nothing to train), 130 or 143."""
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
    parser.add_argument("--iterations", type=int, default=math.inf, help="stop after so many in all")
    args = parser.parse_args(argv)
    if args.iterations < 1:
        parser.error("--iterations must be 1 or more")
    stop, own_ray = Stop(), not ray.is_initialized()
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        joined = functions.connect()  # a step that is not interrupted: Ray can crash
        for number in handlers:
            signal.signal(number, stop)  # again: Ray's start sets a handler of its own
        stop.at_once = True
        if stop.signum:
            raise KeyboardInterrupt
        train(args, stop, joined)
    except KeyboardInterrupt:
        stop.signum = stop.signum or signal.SIGINT
    except (imagenet.InputError, functions.WorkerError, ray.exceptions.RayError) as error:
        print(f"error: {functions.explain(error)}", file=sys.stderr)
        return 2
    finally:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # the end takes a moment, and is not interrupted
        if own_ray:
            ray.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 + stop.signum if stop.signum else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # into a pipe or a file too
    sys.exit(main())
