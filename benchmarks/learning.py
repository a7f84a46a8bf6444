"""Does it learn? Accuracy of driver.py beside a plain single-process AlexNet, on the same photographs.

    python benchmarks/learning.py FOLDER [--images 50000] [--precision float32] [--mini-batch 20]

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
import io
import os
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np

import demo

WORKERS = 2
TRAIN, VAL = ("ILSVRC2012_img_train/", "train.txt"), ("ILSVRC2012_img_val/", "val.txt")


def serve_folder(s3, folder):
    """Put a folder's files into a bucket; its name."""
    s3.create_bucket(Bucket="photos")
    for path in Path(folder).rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "photos", path.relative_to(folder).as_posix())
    return "photos"


def configure(driver, args):
    """Set the constants that the command line decides, and how often to validate."""
    driver.NUM_WORKERS, driver.MINI_BATCH, driver.SEED = WORKERS, args.mini_batch, args.seed
    driver.PRECISION = args.precision
    driver.VALIDATE_EVERY = max(1, args.validate_every // (WORKERS * args.mini_batch))
    for name in ("LEARNING_RATE", "INITIAL_WEIGHTS"):
        value = getattr(args, name.lower())
        setattr(driver, name, getattr(driver, name) if value is None else value)
    if args.drops:
        driver.LEARNING_RATE_DROPS = tuple(n // (WORKERS * args.mini_batch) for n in args.drops)


def drive(args, iterations, *flags):
    """Run driver.py on the folder."""
    import driver

    configure(driver, args)
    os.environ["RAY_ADDRESS"] = "local"  # a Ray of its own
    with demo.s3_server() as environment:
        os.environ.update(environment)
        bucket = serve_folder(demo.s3_client(environment), args.folder)
        places = ["--key-prefix", TRAIN[0], "--label-file", TRAIN[1]]
        status = driver.main(["--s3-bucket", bucket, *places, "--iterations", str(iterations), *flags])
    if status:
        sys.exit(status)


def ours(args):
    """A list of (images, tag, value) of a run of driver.py."""
    batch = WORKERS * args.mini_batch
    with tempfile.TemporaryDirectory() as folder:
        folder = args.log_dir or folder
        held_out = ["--val-prefix", VAL[0], "--val-label-file", VAL[1], "--log-dir", str(folder)]
        drive(args, args.images // batch, *held_out)
        rows = read_events(folder)
        if args.log_dir:
            draw_events(rows, args.out)
        return [
            (iteration * batch, tag, value)
            for iteration, tag, value in rows
            if tag == "loss" or tag.startswith("validation")
        ]


def read_events(folder):
    """A list of (iteration, tag, value) from the one file of learning curves in a folder."""
    from alexnet import tf

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
        some, names, _ = imagenet.decode_tar(io.BytesIO(tar.read_bytes()), (256, 256))
        images.append(some)
        labels += [pairs[name] for name in names]
    return np.concatenate(images), np.array(labels)


def reference(args):
    """The same list, of the network in Keras."""
    import tensorflow as tf

    import alexnet
    import driver
    import functions

    configure(driver, args)
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
            if "norm" in flags:
                norm = {"depth_radius": 2, "bias": 2.0, "alpha": 1e-4, "beta": 0.75}
                network.append(keras.Lambda(tf.nn.local_response_normalization, arguments=norm))
            network += [keras.MaxPool2D(3, 2)] if "pool" in flags else []
        else:
            network += [keras.Flatten()] if network[-1].__class__ is keras.MaxPool2D else []
            network.append(keras.Dense(units, "relu", kernel_regularizer=decay))
            network.append(keras.Dropout(1 - driver.KEEP_PROBABILITY))
    model = tf.keras.Sequential([*network, keras.Dense(driver.NUM_CLASSES, kernel_regularizer=decay)])
    rng = functions.generator(args.seed, "initial weights")
    start = alexnet.initial_weights(alexnet.LAYERS, driver.NUM_CLASSES, driver.INITIAL_WEIGHTS, rng)
    model.set_weights([w.reshape(v.shape) for w, v in zip(start, model.get_weights(), strict=True)])
    clip = {"global_clipnorm": driver.CLIP_NORM}
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
    rng, order, rows, batch = np.random.default_rng(args.seed), [], [], WORKERS * args.mini_batch

    def validate(seen):
        parts = range(0, len(held_out), 50)
        centred = (held_out[i : i + 50, 16:240, 16:240] - mean[16:240, 16:240] for i in parts)
        ranks = np.concatenate([logits_of(part).numpy() for part in centred]).argsort(axis=1)[:, ::-1]
        for k in (1, 5):
            hits = (ranks[:, :k] == truth[:, None]).any(axis=1)
            rows.append((seen, f"validation top-{k}", hits.mean()))
        print(
            f"reference: {seen} images, loss = {rows[-3][2]:.3f}, top-1 = {rows[-2][2]:.1%}", flush=True
        )

    for iteration in range(args.images // batch):
        if len(order) < batch:
            order = [*order, *rng.permutation(len(images))]
        chosen, order = order[:batch], order[batch:]
        crops = []
        for image in chosen:
            top, left, mirrored = rng.integers(0, [33, 33, 2])
            crop = (
                images[image, top : top + 224, left : left + 224]
                - mean[top : top + 224, left : left + 224]
            )
            crops.append(crop[:, ::-1] if mirrored else crop)
        drops = sum(iteration >= drop for drop in driver.LEARNING_RATE_DROPS)
        optimizer.learning_rate.assign(driver.LEARNING_RATE / 10**drops)
        loss = step(np.stack(crops), labels[chosen]).numpy()
        rows.append((iteration * batch, "loss", loss))
        if (iteration + 1) % driver.VALIDATE_EVERY == 0 or iteration + 1 == args.images // batch:
            validate((iteration + 1) * batch)
    return rows


def first_losses(args):
    """The first float32 losses of driver.py, and those of one session on the same mini-batches."""
    import ray

    import alexnet
    import driver
    import functions

    minibatches, losses, mean_images, means = [], [], [], []
    draw, compute = functions.Helpers.draw_minibatches, functions.Workers.compute_grad

    def noted_draw(self, *arguments):
        drawn = draw(self, *arguments)
        minibatches.append(ray.get(drawn))
        return drawn

    def noted_compute(self, minibatch, mean, *arguments):
        losses.append(compute(self, minibatch, mean, *arguments))
        mean_images[:] = [ray.get(mean).copy()]
        return losses[-1]

    functions.Helpers.draw_minibatches, functions.Workers.compute_grad = noted_draw, noted_compute
    # A worker's number of threads, which a process's first session fixes: others round otherwise,
    # and training amplifies the difference.
    options = {"num_classes": driver.NUM_CLASSES, "momentum": driver.MOMENTUM}
    network = alexnet.AlexNet(**options, threads=driver.CPUS_PER_WORKER)
    drive(args, args.losses)
    rng = functions.generator(driver.SEED, "initial weights")
    start = alexnet.initial_weights(alexnet.LAYERS, driver.NUM_CLASSES, driver.INITIAL_WEIGHTS, rng)
    network.initialize(start)
    rows = []
    for iteration, theirs in enumerate(losses):
        got = []
        for index, (pixels, labels, crops) in enumerate(minibatches[iteration]):
            images = functions.subtract_mean(pixels, crops, mean_images[0])
            y_true = functions.one_hot(labels, driver.NUM_CLASSES)
            seed = functions.dropout_seed(driver.SEED, iteration, index)
            got.append(network.compute_grad(images, y_true, driver.KEEP_PROBABILITY, seed))
        weights = network.weights()
        means = means or [np.empty_like(weight) for weight in weights]
        gradients = [gradients for gradients, _ in got]
        norm = functions.mean_of(gradients, len(got), weights, driver.WEIGHT_DECAY, means)
        network.apply(means, driver.LEARNING_RATE * driver.CLIP_NORM / max(norm, driver.CLIP_NORM))
        rows.append((iteration, np.mean(theirs), np.mean([loss for _, loss in got])))
    return rows


def run(function, args):
    """What a function returns in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (args,))


def smooth(values, width):
    """Running means of so many values."""
    return np.convolve(values, np.ones(width) / width, "valid")


def off_screen():
    """matplotlib's pyplot, set to draw into files; imported only where something is drawn."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw_curves(out):
    """Draw all CSV files of a folder into one picture."""
    pyplot = off_screen()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for path in sorted(out.glob("learning-*.csv")):
        rows = [(int(x), tag, float(y)) for x, tag, y in list(csv.reader(path.open()))[1:]]
        name = path.stem.removeprefix("learning-")
        losses = [(x, y) for x, tag, y in rows if tag == "loss"]
        width = min(50, len(losses))
        left.plot(
            [x for x, _ in losses[width - 1 :]], smooth([y for _, y in losses], width), label=name
        )
        top1 = [(x, 100 * y) for x, tag, y in rows if tag == "validation top-1"]
        right.plot(*zip(*top1, strict=True), marker=".", label=name)
    left.set(xlabel="images", ylabel="training loss, mean of 50 iterations", ylim=(0, 7))
    right.set(xlabel="images", ylabel="validation top-1, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(out / "learning.png", dpi=110)


def draw_events(rows, out):
    """Draw every tag of (iteration, tag, value) in a panel of its own."""
    pyplot = off_screen()
    tags = list(dict.fromkeys(tag for _, tag, _ in rows))
    figure, axes = pyplot.subplots(-(-len(tags) // 4), 4, figsize=(13, 2.3 * -(-len(tags) // 4)))
    for panel in axes.flat[len(tags) :]:
        panel.axis("off")
    for panel, tag in zip(axes.flat, tags, strict=False):
        iterations, values = zip(*((x, y) for x, name, y in rows if name == tag), strict=True)
        panel.plot(iterations, values, linewidth=0.7)
        high = 1.2 * np.percentile(values, 98)  # the first steps are slow, and their losses high
        panel.set(title=tag, ylim=(0, high))
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=90)


def main():
    """Run what is asked for, write curves and print the last figures."""
    parser = argparse.ArgumentParser(description="Train beside a reference, and compare.")
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=50_000, help="images of a run")
    parser.add_argument("--mini-batch", type=int, default=20, help="images of one worker's gradient")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, help="instead of driver.py's")
    parser.add_argument(
        "--initial-weights", type=float, help="a standard deviation, as the write-up's 0.1"
    )
    parser.add_argument(
        "--drops", type=int, nargs="*", help="images after which the rate is divided by 10"
    )
    parser.add_argument("--validate-every", type=int, default=5000, help="images")
    parser.add_argument(
        "--runs", nargs="*", default=["ours", "reference"], choices=["ours", "reference"]
    )
    parser.add_argument("--name", default="", help="added to the names of the files")
    parser.add_argument("--log-dir", type=Path, help="empty folder for driver.py's own curves")
    parser.add_argument(
        "--losses", type=int, default=0, help="compare so many first losses with a session"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder of the CSV files and the picture"
    )
    args = parser.parse_args()
    if args.losses:
        rows = run(first_losses, argparse.Namespace(**vars(args) | {"precision": "float32"}))
        for iteration, a, b in rows:
            print(f"iteration {iteration}: loss {a:.5f}, one session {b:.5f}")
        worst = max(abs(a - b) for _, a, b in rows)
        print(f"{len(rows)} losses: the largest difference is {worst:.1e}")
    for name in args.runs:
        rows = run({"ours": ours, "reference": reference}[name], args)
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
