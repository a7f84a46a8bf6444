"""Does it learn? Accuracy of driver.py beside a plain single-process AlexNet, on the same photographs.

    python benchmarks/learning.py FOLDER [--images 50000] [--precision float32] [--mini-batches 2]

FOLDER is laid out like the bucket: tars below ILSVRC2012_img_train/ and ILSVRC2012_img_val/, train.txt
and val.txt. --runs, one after the other, with as many images each:

    ours       driver.py itself, 2 workers, its constants as they stand
    reference  the same network in Keras, in one process: the same initial weights, crops, rates
               and number of images, with Keras's own layers, dropout, loss and optimizer

An iteration has so many --mini-batches of --mini-batch images. After so many images, --drops divide the
rate by 10, and --validate-every validates. --stored, --learning-rate-power and --initial-weights (a
standard deviation, as the write-up's 0.1) stand in the place of driver.py's constants.

With --evaluate N, driver.py trains for 20 iterations and validates, and then the same checkpoint is
evaluated N times; both as a user runs them, as processes of their own. Prints the seconds of the whole
command, and those of the validation alone: from the line of the last iteration to its own.

With --losses N, the first N float32 losses of driver.py stand beside those of one TensorFlow session on
the same mini-batches, dropout masks included.

Writes learning-RUN-PRECISION-NAME.csv, a row a point, and learning.png, which has all such files; and,
with --log-dir, an empty folder, driver.py's own learning curves there, and all of them as curves.png.
"""

import csv
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measuring import PRECISIONS, TRAIN, WORKERS, read_flags, run_apart, spread

from tests.support import ROOT, decode_tar, save_start

import numpy as np

HERE, VAL = Path(__file__).resolve().parent, "ILSVRC2012_img_val/"
HELD_OUT = "--val-prefix", VAL
KEPT = "loss", "validation top-1", "validation top-5"


def data_flags(folder):
    """driver.py's flags for the photos of a folder that it trains on."""
    return ["--s3-bucket", str(Path(folder).resolve()), "--key-prefix", TRAIN]


def configured(args):
    """The module driver, with the constants that the command line decides."""
    import driver

    driver.NUM_WORKERS, driver.MINI_BATCH, driver.SEED = WORKERS, args.mini_batch, args.seed
    driver.PRECISION, driver.LEARNING_RATE_DROPS = args.precision, tuple(args.drops)
    driver.VALIDATE_EVERY = max(1, args.validate_every // args.batch)
    for name in ("learning_rate_power", "initial_weights", "stored"):
        if (value := getattr(args, name)) is not None:
            setattr(driver, name.upper(), value)
    return driver


def initial_network(driver, images, **options):
    """The network that driver.py trains with so many images an iteration, with its initial weights."""
    import alexnet
    import functions

    rule = driver.update_rule(images)
    network = alexnet.AlexNet(driver.LAYERS, driver.NUM_CLASSES, rule, **options)
    rng = functions.generator(driver.SEED, "initial weights")
    network.restore(network.initial_state(driver.INITIAL_WEIGHTS, rng))
    return network


def drive(args, iterations, report, *flags):
    """Run driver.py on the folder, watched by a report."""
    driver = configured(args)
    with tempfile.TemporaryDirectory() as saved:
        network = initial_network(driver, args.batch)
        save_start(Path(saved), network, args.mini_batches, args.precision)
        limit = ["--iterations", str(iterations), "--checkpoint-dir", saved]
        driver.main([*data_flags(args.folder), *limit, *flags], report=report)


def ours(args):
    """A list of (images, tag, value) of a run of driver.py, which are in its learning curves."""
    from machinery.storage.tf1 import tf

    with tempfile.TemporaryDirectory() as place:
        folder, points = args.log_dir or Path(place), []
        drive(args, args.images // args.batch, None, "--log-dir", str(folder), *HELD_OUT)
        [file] = folder.iterdir()
        for event in tf.train.summary_iterator(str(file)):
            points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    if args.log_dir:  # a panel for each tag; the first steps are slow, and their losses high
        panels = {}
        for tag in dict.fromkeys(tag for _, tag, _ in points):
            some = [(step, value) for step, name, value in points if name == tag]
            panels[tag] = 1.2 * np.percentile([value for _, value in some], 98), {tag: some}
        draw(HERE / "curves.png", 3.2, panels)
    return [(step * args.batch, tag, value) for step, tag, value in points if tag in KEPT]


def decoded(folder, prefix, label_file):
    """All images of a part uint8 [n, 256, 256, 3] and their labels [n]."""
    import imagenet

    source = imagenet.source_of(str(Path(folder).resolve()))
    label_of = imagenet.read_labels(source, label_file, 1000)
    tars, _ = imagenet.list_tars(source, prefix)
    images, names, _ = zip(*(decode_tar(source.read(tar.key), (256, 256)) for tar in tars), strict=True)
    names = [imagenet.in_directory(name).partition("/")[2] for some in names for name in some]
    return np.concatenate(images), np.array([label_of[name] for name in names])


def reference(args):
    """The same list, of the network in Keras."""
    import alexnet
    import functions

    import tensorflow as tf

    driver = configured(args)
    bfloat16 = {"auto_mixed_precision_onednn_bfloat16": args.precision == "bfloat16"}
    tf.config.optimizer.set_experimental_options(bfloat16)
    tf.keras.utils.set_random_seed(args.seed)
    keras, decay = tf.keras.layers, tf.keras.regularizers.L2(driver.WEIGHT_DECAY / 2)
    network = [tf.keras.Input((224, 224, 3)), keras.Rescaling(1 / alexnet.PIXEL_STD)]
    for kind, units, *rest in alexnet.LAYERS:
        if kind == "conv":
            kernel, stride, *flags = rest
            options = {"activation": "relu", "padding": "same", "kernel_regularizer": decay}
            network.append(keras.Conv2D(units, kernel, stride, **options))
            network += [keras.MaxPool2D(3, 2)] if "pool" in flags else []
        else:
            network += [keras.Flatten()] if network[-1].__class__ is keras.MaxPool2D else []
            network.append(keras.Dense(units, "relu", kernel_regularizer=decay))
            network.append(keras.Dropout(1 - driver.KEEP_PROBABILITY))
    model = tf.keras.Sequential([*network, keras.Dense(driver.NUM_CLASSES, kernel_regularizer=decay)])
    rng = functions.generator(args.seed, "initial weights")
    start = alexnet.initial_weights(alexnet.LAYERS, driver.NUM_CLASSES, driver.INITIAL_WEIGHTS, rng)
    model.set_weights([w.reshape(v.shape) for w, v in zip(start, model.get_weights(), strict=True)])
    clip, rule = {"global_clipnorm": driver.CLIP_NORM}, driver.update_rule(args.batch)
    optimizer = tf.keras.optimizers.SGD(driver.LEARNING_RATE, driver.MOMENTUM, **clip)
    loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(images, labels):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
            total = loss + tf.add_n(model.losses)
        gradients = tape.gradient(total, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    images, labels = decoded(args.folder, TRAIN, "train.txt")
    held_out, truth = decoded(args.folder, VAL, "val.txt")
    mean = np.mean(images, axis=0, dtype=np.float64).astype(np.float32)
    held_out = held_out[:, 16:240, 16:240] - mean[16:240, 16:240]
    rng, order, rows, batch = np.random.default_rng(args.seed), [], [], args.batch
    for iteration in range(args.images // batch):
        if len(order) < batch:
            order = [*order, *rng.permutation(len(images))]
        chosen, order = order[:batch], order[batch:]
        crops = rng.integers(0, [33, 33, 2], (batch, 3))
        minibatch = functions.crop_images(images, labels, chosen, crops)
        optimizer.learning_rate.assign(rule.rate(iteration))
        loss = step(functions.subtract_mean(minibatch, mean), minibatch.labels).numpy()
        rows.append((iteration * batch, "loss", loss))
        if (iteration + 1) % driver.VALIDATE_EVERY == 0 or iteration + 1 == args.images // batch:
            ranks = model.predict(held_out, batch_size=50, verbose=0).argsort(axis=1)[:, ::-1]
            for k in (1, 5):
                hits = (ranks[:, :k] == truth[:, None]).any(axis=1)
                rows.append(((iteration + 1) * batch, f"validation top-{k}", hits.mean()))
            print(f"reference: {rows[-1][0]} images, loss {loss:.3f}", flush=True)
    return rows


def first_losses(args):
    """The first float32 losses of driver.py, and those of one session on the same mini-batches."""
    import functions
    from machinery.cluster.adding import mean_of, tree_of
    from machinery.cluster.helpers import Helpers
    from machinery.results import Report

    import ray

    args.precision = "float32"
    driver = configured(args)
    # A worker's number of threads, which a process's first session fixes: others round otherwise,
    # and training amplifies the difference.
    network, rows = initial_network(driver, args.batch, threads=driver.CPUS_PER_WORKER), []
    means = [np.empty_like(weight) for weight in network.weights()]

    class Beside(Report):
        """Does each iteration again, in one session."""

        def start(self, iteration, batches, mean):
            super().start(iteration, batches, mean)
            self.mean = ray.get(mean)
            self.settings = Helpers(functions.Helper), batches, args.mini_batches, driver.SEED

        def iteration(self, iteration, losses, *others):
            super().iteration(iteration, losses, *others)
            drawn = functions.draw_minibatches(*self.settings, driver.MINI_BATCH, iteration)
            computed = []
            for index, minibatch in enumerate(ray.get([each.ref() for each in drawn])):
                images = functions.subtract_mean(minibatch, self.mean)
                y_true = functions.one_hot(minibatch.labels, driver.NUM_CLASSES)
                rng = functions.generator(driver.SEED, "dropout", iteration, index)
                seed = rng.integers(2**31, size=2).tolist()
                computed.append(network.compute_grad(images, y_true, driver.KEEP_PROBABILITY, seed))
            gradients, own_losses = zip(*computed, strict=True)
            tree, sets = tree_of(len(gradients)), dict(enumerate(gradients))
            decays = network.rule.decays(network.parameters)
            norm = mean_of(tree, sets, len(sets), network.weights(), decays, means)
            network.apply(means, norm, network.rule.rate(iteration))
            rows.append((iteration, np.mean(losses), np.mean(own_losses)))
            self.resume()  # the time of this is no part of an iteration

    drive(args, args.losses, Beside())
    return rows


def run(flags):
    """Seconds to the end of the first iteration, of the validation, and of all; its line."""
    start, first, before, validation, lines = time.monotonic(), 0, 0, 0, [""]
    command = [sys.executable, "-u", str(ROOT / "driver.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            now = time.monotonic() - start
            if line.startswith("Iteration 0: loss"):
                first = now
            if re.match(r"Iteration \d+ .*validation", line):
                validation = now - before
                lines.append(line.rstrip())
            before = now
    if process.returncode:
        sys.exit(f"driver.py has failed with status {process.returncode}")
    return first, validation, time.monotonic() - start, lines[-1]


def evaluate(args):
    """Print what the evaluation of a checkpoint of the full network takes, and whether it is exact."""
    with tempfile.TemporaryDirectory() as saved:
        limit = ["--iterations", "20", "--checkpoint-dir", saved]
        again = partial(run, [*data_flags(args.folder), *HELD_OUT, *limit])
        loading, validation, _, trained = again()
        *_, whole, evaluated = zip(*(again() for _ in range(args.evaluate)), strict=True)
    print(f"{trained}; evaluated: {'the same' if set(evaluated) == {trained} else evaluated}")
    print(f"training, to the end of its first iteration, s: {loading:.1f}; validation {validation:.1f}")
    rest = np.array(whole) - validation
    print(f"evaluation, s: {spread(whole, '.1f')}; besides validating: {spread(rest, '.1f')}")


def draw(path, size, panels):
    """Draw a dict of title -> (highest value, dict of name -> points) into a picture, a panel each."""
    from matplotlib.figure import Figure  # here: the other processes do without

    columns = min(4, len(panels))
    figure = Figure((size * columns, 0.75 * size * -(-len(panels) // columns)), layout="tight")
    for number, (title, (high, lines)) in enumerate(panels.items(), 1):
        panel = figure.add_subplot(-(-len(panels) // columns), columns, number)
        for name, points in lines.items():
            panel.plot(*zip(*points, strict=True), linewidth=0.8, label=name)
        panel.set(title=title, ylim=(0, high or 1))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=100)


def draw_curves():
    """Draw all CSV files into one picture."""
    losses, top1 = {}, {}
    for path in sorted(HERE.glob("learning-*.csv")):
        rows = [(int(x), tag, float(y)) for x, tag, y in list(csv.reader(path.open()))[1:]]
        seen, values = zip(*((x, y) for x, tag, y in rows if tag == "loss"), strict=True)
        width, name = min(50, len(values)), path.stem.removeprefix("learning-")
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        losses[name] = list(zip(seen[width - 1 :], smooth, strict=True))
        top1[name] = [(x, 100 * y) for x, tag, y in rows if tag == "validation top-1"]
    panels = {"training loss, mean of 50 iterations": (7, losses), "validation top-1, %": (100, top1)}
    draw(HERE / "learning.png", 5.5, panels)


RUNS = {"ours": ours, "reference": reference}


def main():
    """Run what is asked for, write curves and print the last figures."""
    flags = {"images": 50_000, "mini_batch": 20, "mini_batches": WORKERS, "precision": PRECISIONS}
    flags |= {"stored": (None, "pixels", "jpeg"), "learning_rate_power": float, "drops": []}
    flags |= {"initial_weights": float, "validate_every": 5000, "seed": 0, "losses": 0, "name": ""}
    flags |= {"evaluate": 0, "log_dir": Path}
    args = read_flags(__doc__, "folder", runs=list(RUNS), **flags)
    args.batch = args.mini_batches * args.mini_batch  # images of an iteration
    if args.evaluate:
        evaluate(args)
    if args.losses:
        rows = run_apart(first_losses, args)
        for iteration, a, b in rows:
            print(f"iteration {iteration}: loss {a:.5f}, one session {b:.5f}")
        worst = max(abs(a - b) for _, a, b in rows)
        print(f"{len(rows)} losses: the largest difference is {worst:.1e}")
    for name in args.runs:
        rows = run_apart(RUNS[name], args)
        file = "-".join(filter(None, ["learning", name, args.precision, args.name])) + ".csv"
        with (HERE / file).open("w", newline="") as target:
            csv.writer(target).writerows([("images", "tag", "value"), *rows])
        loss = np.mean([y for _, tag, y in rows if tag == "loss"][-100:])
        last = {tag: y for _, tag, y in rows}
        print(f"{name}, {args.precision}: {args.images} images, last 100 losses {loss:.3f}, ", end="")
        print(", ".join(f"{tag} {last[tag]:.1%}" for tag in KEPT[1:]), flush=True)
    if args.runs:
        draw_curves()


if __name__ == "__main__":
    main()
