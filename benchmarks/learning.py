"""Does it learn? Accuracy of driver.py beside a plain single-process AlexNet, on the same photographs.

    python benchmarks/learning.py FOLDER [--images 50000] [--precision float32] [--mini-batches 2]

FOLDER is laid out like the bucket: tars below ILSVRC2012_img_train/ and ILSVRC2012_img_val/, train.txt
and val.txt. Runs one after the other, with as many images each:

    ours       driver.py itself, 2 workers, its constants as they stand
    reference  the same network in Keras, in one process: the same initial weights, crops, rates
               and number of images, with Keras's own layers, dropout, loss and optimizer

With --losses N, the first N float32 losses of driver.py stand beside those of one TensorFlow session on
the same mini-batches, dropout masks included.

Writes learning-NAME.csv, a row a point, and learning.png, which has all such files of the folder --out;
and, with --log-dir, driver.py's own learning curves there, and all of them as curves.png.
"""

import argparse
import csv
import tempfile
from pathlib import Path

from measuring import WORKERS, driver_network, loopback, run_apart

from tests.support import decode_tar, save_start

import numpy as np

HERE = Path(__file__).resolve().parent
TRAIN, VAL = ("ILSVRC2012_img_train/", "train.txt"), ("ILSVRC2012_img_val/", "val.txt")


def serve_folder(s3, folder):
    """Put a folder's files into a bucket; its name."""
    s3.create_bucket(Bucket="photos")
    for path in Path(folder).rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "photos", path.relative_to(folder).as_posix())
    return "photos"


def configured(args):
    """The module driver, with the constants that the command line decides."""
    import driver

    driver.NUM_WORKERS, driver.MINI_BATCH, driver.SEED = WORKERS, args.mini_batch, args.seed
    driver.PRECISION = args.precision
    driver.VALIDATE_EVERY = max(1, args.validate_every // images_of(args))
    for name in ("LEARNING_RATE_POWER", "INITIAL_WEIGHTS", "STORED"):
        value = getattr(args, name.lower())
        setattr(driver, name, getattr(driver, name) if value is None else value)
    driver.LEARNING_RATE_DROPS = tuple(args.drops)
    return driver


def images_of(args):
    """Images of an iteration."""
    return args.mini_batches * args.mini_batch


def drive(args, iterations, report, *flags):
    """Run driver.py on the folder, watched by a report."""
    driver = configured(args)
    with loopback() as s3, tempfile.TemporaryDirectory() as saved:
        save_start(saved, driver_network(), args.mini_batches, args.precision)
        bucket = serve_folder(s3, args.folder)
        places = ["--key-prefix", TRAIN[0], "--label-file", TRAIN[1]]
        limit = ["--iterations", str(iterations), "--checkpoint-dir", saved]
        driver.main(["--s3-bucket", bucket, *places, *limit, *flags], report=report)


def ours(args):
    """A list of (images, tag, value) of a run of driver.py."""
    from machinery.results import Report

    batch, rows = images_of(args), []

    class Kept(Report):
        """Says and draws all as ever, and keeps the losses and validations."""

        def iteration(self, iteration, losses, *others):
            super().iteration(iteration, losses, *others)
            rows.append((iteration * batch, "loss", np.mean(losses)))

        def validation(self, iteration, top1, top5):
            super().validation(iteration, top1, top5)
            rows.append((iteration * batch, "validation top-1", top1))
            rows.append((iteration * batch, "validation top-5", top5))

    held_out = ["--val-prefix", VAL[0], "--val-label-file", VAL[1]]
    drawn = ["--log-dir", str(args.log_dir)] if args.log_dir else []
    drive(args, args.images // batch, Kept(), *held_out, *drawn)
    if drawn:
        draw_events(read_events(args.log_dir), args.out)
    return rows


def read_events(folder):
    """A list of (iteration, tag, value) from the one file of learning curves in a folder."""
    from machinery.storage.tf1 import tf

    (events,) = Path(folder).iterdir()
    return [
        (event.step, value.tag, value.simple_value)
        for event in tf.train.summary_iterator(str(events))
        for value in event.summary.value
    ]


def decoded(folder, prefix, label_file):
    """All images of a part uint8 [n, 256, 256, 3] and their labels [n]."""
    import imagenet

    pairs = imagenet.parse_labels((Path(folder) / label_file).read_bytes(), 1000, label_file)
    images, labels = [], []
    for tar in sorted((Path(folder) / prefix).glob("*.tar")):
        some, names, _ = decode_tar(tar.read_bytes(), (256, 256))
        images.append(some)
        labels += [pairs[imagenet.in_directory(name).partition("/")[2]] for name in names]
    return np.concatenate(images), np.array(labels)


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
    clip, rule = {"global_clipnorm": driver.CLIP_NORM}, driver.update_rule(images_of(args))
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

    @tf.function
    def logits_of(images):
        return model(images, training=False)

    images, labels = decoded(args.folder, *TRAIN)
    held_out, truth = decoded(args.folder, *VAL)
    mean = np.mean(images, axis=0, dtype=np.float64).astype(np.float32)
    rng, order, rows, batch = np.random.default_rng(args.seed), [], [], images_of(args)

    def validate(seen):
        parts = range(0, len(held_out), 50)
        centred = (held_out[i : i + 50, 16:240, 16:240] - mean[16:240, 16:240] for i in parts)
        ranks = np.concatenate([logits_of(part).numpy() for part in centred]).argsort(axis=1)[:, ::-1]
        for k in (1, 5):
            hits = (ranks[:, :k] == truth[:, None]).any(axis=1)
            rows.append((seen, f"validation top-{k}", hits.mean()))
        loss, top1 = rows[-3][2], rows[-2][2]
        print(f"reference: {seen} images, loss = {loss:.3f}, top-1 = {top1:.1%}", flush=True)

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
            validate((iteration + 1) * batch)
    return rows


def first_losses(args):
    """The first float32 losses of driver.py, and those of one session on the same mini-batches."""
    import functions
    from machinery.cluster.adding import mean_of, tree_of
    from machinery.cluster.helpers import Helpers
    from machinery.results import Report

    import ray

    driver = configured(args)
    # A worker's number of threads, which a process's first session fixes: others round otherwise,
    # and training amplifies the difference.
    network, rows = driver_network(threads=driver.CPUS_PER_WORKER), []
    means = [np.empty_like(weight) for weight in network.weights()]

    class Beside(Report):
        """Does each iteration again, in one session."""

        def start(self, iteration, batches, mean):
            super().start(iteration, batches, mean)
            self.batches, self.mean = batches, ray.get(mean)
            self.helpers = Helpers(functions.Helper)

        def iteration(self, iteration, losses, *others):
            super().iteration(iteration, losses, *others)
            what = {"size": driver.MINI_BATCH, "count": args.mini_batches, "seed": driver.SEED}
            drawn = functions.draw_minibatches(self.helpers, self.batches, **what, iteration=iteration)
            minibatches = ray.get([minibatch.ref() for minibatch in drawn])
            gradients, own_losses = [], []
            for index, minibatch in enumerate(minibatches):
                images = functions.subtract_mean(minibatch, self.mean)
                y_true = functions.one_hot(minibatch.labels, driver.NUM_CLASSES)
                seed = functions.dropout_seed(driver.SEED, iteration, index)
                got = network.compute_grad(images, y_true, driver.KEEP_PROBABILITY, seed)
                gradients.append(got[0])
                own_losses.append(got[1])
            tree, sets = tree_of(len(gradients)), dict(enumerate(gradients))
            norm = mean_of(tree, sets, len(sets), network.weights(), network.decays(), means)
            network.apply(means, norm, network.rule.rate(iteration))
            rows.append((iteration, np.mean(losses), np.mean(own_losses)))
            self.resume()  # the time of this is no part of an iteration

    drive(args, args.losses, Beside())
    return rows


def draw_curves(out):
    """Draw all CSV files of a folder into one picture."""
    from matplotlib.figure import Figure  # here: the other processes do without

    figure = Figure((11, 4.2), layout="tight")
    left, right = figure.subplots(1, 2)
    for path in sorted(out.glob("learning-*.csv")):
        rows = [(int(x), tag, float(y)) for x, tag, y in list(csv.reader(path.open()))[1:]]
        name = path.stem.removeprefix("learning-")
        losses = [(x, y) for x, tag, y in rows if tag == "loss"]
        width = min(50, len(losses))
        smooth = np.convolve([y for _, y in losses], np.ones(width) / width, "valid")
        left.plot([x for x, _ in losses[width - 1 :]], smooth, label=name)
        top1 = [(x, 100 * y) for x, tag, y in rows if tag == "validation top-1"]
        right.plot(*zip(*top1, strict=True), marker=".", label=name)
    left.set(xlabel="images", ylabel="training loss, mean of 50 iterations", ylim=(0, 7))
    right.set(xlabel="images", ylabel="validation top-1, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out / "learning.png", dpi=110)


def draw_events(rows, out):
    """Draw every tag of (iteration, tag, value) in a panel of its own."""
    from matplotlib.figure import Figure

    tags = list(dict.fromkeys(tag for _, tag, _ in rows))
    height = -(-len(tags) // 4)
    figure = Figure((13, 2.3 * height), layout="tight")
    axes = figure.subplots(height, 4)
    for panel in axes.flat[len(tags) :]:
        panel.axis("off")
    for panel, tag in zip(axes.flat, tags, strict=False):
        iterations, values = zip(*((x, y) for x, name, y in rows if name == tag), strict=True)
        panel.plot(iterations, values, linewidth=0.7)
        high = 1.2 * np.percentile(values, 98)  # the first steps are slow, and their losses high
        panel.set(title=tag, ylim=(0, high or 1))
        panel.grid(alpha=0.3)
    figure.savefig(out / "curves.png", dpi=90)


RUNS = {"ours": ours, "reference": reference}


def main():
    """Run what is asked for, write curves and print the last figures."""
    parser = argparse.ArgumentParser(description="Train beside a reference, and compare.")
    add = parser.add_argument
    add("folder")
    add("--images", type=int, default=50_000, help="images of a run")
    add("--mini-batch", type=int, default=20, help="images of one worker's gradient")
    add("--mini-batches", type=int, default=WORKERS, help="gradients of an iteration")
    add("--precision", default="float32", choices=["float32", "bfloat16"])
    add("--seed", type=int, default=0)
    add("--stored", choices=["pixels", "jpeg"], help="form of the images, instead of driver.py's")
    add("--learning-rate-power", type=float, help="how the rate follows the images of an iteration")
    add("--initial-weights", type=float, help="a standard deviation, as the write-up's 0.1")
    add("--drops", type=int, nargs="*", default=[], help="images after which the rate is divided by 10")
    add("--validate-every", type=int, default=5000, help="images")
    add("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    add("--name", default="", help="added to the names of the files")
    add("--log-dir", type=Path, help="empty folder for driver.py's own curves")
    add("--losses", type=int, default=0, help="compare so many first losses with a session")
    add("--out", type=Path, default=HERE, help="folder of the CSV files and the picture")
    args = parser.parse_args()
    if args.losses:
        rows = run_apart(first_losses, argparse.Namespace(**vars(args) | {"precision": "float32"}))
        for iteration, a, b in rows:
            print(f"iteration {iteration}: loss {a:.5f}, one session {b:.5f}")
        worst = max(abs(a - b) for _, a, b in rows)
        print(f"{len(rows)} losses: the largest difference is {worst:.1e}")
    for name in args.runs:
        rows = run_apart(RUNS[name], args)
        file = "-".join(filter(None, ["learning", name, args.precision, args.name])) + ".csv"
        with (args.out / file).open("w", newline="") as target:
            csv.writer(target).writerows([("images", "tag", "value"), *rows])
        loss = np.mean([y for _, tag, y in rows if tag == "loss"][-100:])
        last = {tag: y for _, tag, y in rows}
        top1, top5 = (last[f"validation top-{k}"] for k in (1, 5))
        print(f"{name}, {args.precision}: {args.images} images, last 100 losses {loss:.3f}, ", end="")
        print(f"validation top-1 {top1:.1%}, top-5 {top5:.1%}", flush=True)
    if args.runs:
        draw_curves(args.out)


if __name__ == "__main__":
    main()
