"""What tests, benchmarks and the demo share: an S3 server on loopback, buckets, pictures and tars; and
what several tests share: the thin network, workers, driver.py as a process, checksums of its weights.

TensorFlow, Ray and the program are imported where they are needed: the demo draws without them.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import namedtuple
from pathlib import Path

import boto3
import numpy as np
from botocore.config import Config
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]

# A network so thin that a step takes milliseconds; its layers are those of AlexNet.
THIN = (
    ("conv", 8, 11, 4, "pool"),
    ("conv", 8, 5, 1, "pool"),
    ("conv", 8, 3, 1),
    ("conv", 8, 3, 1),
    ("conv", 8, 3, 1, "pool"),
    ("dense", 32),
    ("dense", 32),
)


# ---- pictures and tars


def draw_image(label, rng, size=(320, 280)):
    """A picture of a class: shapes of the class's hue and kind, at random places, on a noisy ground."""
    width, height = size
    ground = rng.integers(0, 120, 3) + rng.integers(0, 40, (height, width, 3))
    image = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    hue = Image.new("HSV", (1, 1), (label % 10 * 25, 230, 230)).convert("RGB").getpixel((0, 0))
    for _ in range(12):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(20, 60)
        box = (x - r, y - r, x + r, y + r)
        shape = draw.rectangle if label % 2 else draw.ellipse
        shape(box, fill=tuple(np.clip(np.add(hue, rng.integers(-25, 25, 3)), 0, 255).tolist()))
    return image


def encode(image, kind, **options):
    """An image as bytes of a format that Pillow writes."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def jpeg(image, quality=85):
    """An image as JPEG bytes."""
    return encode(image, "JPEG", quality=quality)


def photo(seed=0):
    """The JPEG bytes of a picture that the seed decides."""
    return jpeg(draw_image(seed, np.random.default_rng(seed)))


def make_tar(files):
    """A dict of name -> bytes, or TarInfo of a member that has none, as the bytes of a tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def decode_tar(data, size, stored="pixels"):
    """The bytes of a tar that is one part as images, their names, and what is left out with why."""
    from machinery.storage.tars import decode_part

    images, names, left_out, rest = decode_part(io.BytesIO(data), size, stored)
    assert rest is None
    return images, names, left_out


# ---- S3


def free_port():
    """A port of loopback that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port, process=None, seconds=60):
    """Wait until something listens on a port of loopback; RuntimeError if it does not, or has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (process and process.poll() is not None):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port}")


@contextlib.contextmanager
def s3_server(log=subprocess.DEVNULL):
    """Run moto's S3 server as a process on a free port of loopback; yields its environment."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for_port(port, server)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "demo",
            "AWS_SECRET_ACCESS_KEY": "demo",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.wait()


def s3_client(environment):
    """A boto3 S3 client of the server that `s3_server` runs."""
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name=environment["AWS_DEFAULT_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"mode": "standard"}),
    )


def fill_bucket(s3, bucket, images_per_class, num_classes=10):
    """Put class tars and train.txt into a new bucket, laid out like ImageNet's."""
    s3.create_bucket(Bucket=bucket)
    rng, lines = np.random.default_rng(0), []
    for label in range(num_classes):
        wnid = f"n{1500000 + label:08d}"
        names = [f"{wnid}_{number}.JPEG" for number in range(images_per_class)]
        files = {name: jpeg(draw_image(label, rng)) for name in names}
        s3.put_object(Bucket=bucket, Key=f"ILSVRC2012_img_train/{wnid}.tar", Body=make_tar(files))
        lines += [f"{wnid}/{name} {label}" for name in names]
    s3.put_object(Bucket=bucket, Key="train.txt", Body="\n".join(lines).encode())


# ---- runs

# Ray ends processes that are idle for a second; in tests they stay for the next task. It starts some
# ahead of time, too, which are of no use here: they lack the project's modules.
WARM = {
    "idle_worker_killing_time_threshold_ms": 600_000,
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
}

MINI_BATCH = 5  # images, so that a step of the thin network takes milliseconds


def thin_constants(patch):
    """Give driver.py the thin network by pytest's monkeypatch: its constants are there to be set."""
    import driver

    patch.setattr(driver, "LAYERS", THIN)
    patch.setattr(driver, "NUM_CLASSES", 10)
    patch.setattr(driver, "MINI_BATCH", MINI_BATCH)
    patch.setattr(driver, "ACCURACY_EVERY", 2)
    patch.setattr(driver, "PRECISION", "float32")  # on any CPU


def train(bucket, *options, **hooks):
    """driver.py in this process, on the session's Ray: the exit status. `hooks` are `driver.main`'s."""
    return drive(["--s3-bucket", bucket, *options], **hooks)


def drive(argv, **hooks):
    """The exit status that the command line would have, of driver.py in this process."""
    import driver
    from machinery import ending

    return ending.status(lambda: driver.main(list(map(str, argv)), **hooks))


ITERATIONS = 30  # of the session's undisturbed run

# Flags by which one class of the session's photos is held out.
VALIDATED = ["--val-prefix", "ILSVRC2012_img_train/n01500003", "--val-label-file", "train.txt"]


def train_here(bucket, folder, iterations=ITERATIONS, *options, **hooks):
    """driver.py in this process, which saves in a folder or in S3."""
    return train(bucket, "--iterations", iterations, "--checkpoint-dir", folder, *options, **hooks)


def train_elsewhere(
    bucket, folder, address, *settings, iterations=ITERATIONS, flags=(), environment=None
):
    """driver.py as a process, with two workers on the Ray at an address."""
    flags = ["--s3-bucket", bucket, "--checkpoint-dir", folder, "--iterations", iterations, *flags]
    settings = ["NUM_WORKERS=2", *settings]
    return thin_driver(*settings, *flags, address=address, environment=environment)


def pool_of(count, cpus=1, patience=60, can_grow=False, actor=None):
    """A pool of workers with the thin network; `actor` may be another class."""
    import functions
    from machinery.cluster import tasks
    from machinery.cluster.pool import Pool

    tasks.limits.update(wait=patience, work=100)
    network = {"layers": THIN, "num_classes": 10, "precision": "float32", "threads": cpus, "gpus": 0}
    return Pool(count, network, actor or functions.Worker, functions.Helper, can_grow)


@contextlib.contextmanager
def two_workers(actor=None):
    """A pool of two workers, which are up, until the end of a `with`."""
    with pool_of(2, actor=actor) as pool:
        pool.wait()
        yield pool


class Given:
    """A value in the place of a helpers.Drawn mini-batch; it is never drawn again."""

    def __init__(self, value):
        """Put the value into the object store."""
        import ray

        self._ref = ray.put(value)

    def ref(self):
        """The value's reference."""
        return self._ref

    def let_go(self):
        """Keep it: there is nothing to draw it from."""


Note = namedtuple("Note", "method pid iteration weights")


def noting_worker(folder, hits=()):
    """The class of workers without TensorFlow: they note their calls in a folder, for `notes`.

    Their gradients are the weights plus 1, times a number that the mini-batch and the dropout masks
    decide: so exactness can be seen in seconds. `hits` are those of each request for an accuracy, among
    12 images: pairs of an iteration and a number, 0 for other iterations.
    """
    from machinery.cluster import nodes

    import ray

    place = folder / "notes"

    def note(method, iteration, weightrefs):
        with place.open("a") as file:
            file.write(f"{method} {os.getpid()} {iteration} {weightrefs[0].hex()}\n")

    @ray.remote(**nodes.ACTOR)
    class Worker(nodes.Actor):
        def __init__(self, network):
            pass

        def update_weights(self, iteration, weightrefs, passed_on=()):
            note("update_weights", iteration, weightrefs)

        def compute_grad(self, iteration, refs, keep_probability, dropout_seed):
            note("compute_grad", iteration, refs)
            weights, minibatch, _ = ray.get(refs)
            decide = pickle.dumps((minibatch, keep_probability, dropout_seed))
            number = np.float32(zlib.crc32(decide) / 2**32)
            return [number * (part + 1) for part in weights], 1.0

        def print_accuracy(self, iteration, refs):
            note("print_accuracy", iteration, refs)
            right = dict(hits).get(iteration, 0)
            return np.array([right, right, 12])

    return Worker


def notes(folder):
    """The calls of a run's noting workers, in their order: a list of Note."""
    return [Note(*line.split()) for line in (folder / "notes").read_text().splitlines()]


def save_start(folder, network, mini_batches, precision="float32"):
    """Save a checkpoint of iteration 0, from which a run has so many mini-batches an iteration."""
    facts = {"iteration": 0, "mini_batches": mini_batches, "precision": precision, "run": {}}
    network.save(f"{folder}/ckpt-0", json.dumps(facts), np.zeros([256, 256, 3], np.float32))
    (folder / "checkpoint.lock").touch()


def checksums(folder):
    """SHA-256 of every variable and its momentum in the newest checkpoint."""
    from machinery.storage.tf1 import tf

    reader = tf.train.load_checkpoint(str(folder))
    names = [name for name in reader.get_variable_to_shape_map() if name not in ("facts", "mean")]
    assert len(names) == 32
    return {name: hashlib.sha256(reader.get_tensor(name).tobytes()).hexdigest() for name in names}


def identify(images, labels):
    """What an image and its label are: a pair of a hash and a number for each."""
    return [
        (hashlib.sha256(image.tobytes()).hexdigest(), int(label))
        for image, label in zip(images, labels, strict=True)
    ]


def fingerprint(batches):
    """A fingerprint of a multiset of images with their labels, given as lists of `identify`."""
    pairs = list(itertools.chain(*batches))
    return f"{len(pairs)} images: {hashlib.sha256(repr(sorted(pairs)).encode()).hexdigest()}"


# ---- processes


class Run:
    """A program as a process of its own, and its lines as they come."""

    def __init__(self, command, environment, **options):
        """Start it; `options` are Popen's."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        streams |= {"stdin": subprocess.PIPE, "bufsize": 1}
        self.process = subprocess.Popen(command, env=environment, **streams, **options)
        self.pid, self._lines, self._news = self.process.pid, [], threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in itertools.chain(self.process.stdout, ["[end]"]):
            with self._news:
                self._lines.append(line)
                self._news.notify_all()

    def output(self):
        """All that has come so far, standard error too."""
        return "".join(self._lines)

    def wait_for(self, text, seconds=120, after=""):
        """Wait until the output holds a text, which comes after an earlier state of the output."""

        def came():
            return text in self.output()[len(after) :]

        with self._news:
            self._news.wait_for(lambda: came() or "[end]" in self._lines, seconds)
        assert came(), f"{text!r} did not come:\n{self.output()}"

    @contextlib.contextmanager
    def paused(self, *moment):
        """What is done while thin_driver.py stands still: at an iteration and a phase, or at a line."""
        place = "{1} of iteration {0}" if len(moment) > 1 else "{0}"
        self.wait_for(f"Paused after {place.format(*moment)}\n")
        yield
        with contextlib.suppress(BrokenPipeError):  # it may have ended meanwhile
            self.process.stdin.write("\n")

    def wait(self, seconds=200):
        """Wait for the end; the exit status."""
        status = self.process.wait(seconds)
        self.wait_for("[end]", 30)
        return status

    def kill(self):
        """End it at once."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


@contextlib.contextmanager
def thin_driver(*arguments, address="local", environment=None, **options):
    """A Run of thin_driver.py with settings and flags, on the Ray at an address; killed at the end.

    Its output is printed then, which pytest shows if the test has failed.
    """
    command = [sys.executable, "-u", str(ROOT / "tests" / "thin_driver.py"), *map(str, arguments)]
    environment = os.environ | {"RAY_ADDRESS": address} | (environment or {})
    run = Run(command, environment, **options)
    try:
        yield run
    finally:
        run.kill()
        print(run.output())


class Screen(io.StringIO):
    """A text file that says it is a terminal."""

    def isatty(self):
        return True


def workers_of(pid):
    """The worker processes below a process."""
    return titled(pid, "ray::Worker")


def titled(pid, start):
    """The processes below a process that call themselves something that starts so."""
    import psutil  # Ray brings it

    with contextlib.suppress(psutil.Error):
        below = psutil.Process(pid).children(recursive=True)
        return [process for process in below if title(process).startswith(start)]
    return []


def wait_until(condition, seconds=60):
    """Wait until a function returns something true; that. AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "this did not come true"
        time.sleep(0.02)
    return value


def title(process):
    """What a process calls itself: Ray's name what they do; nothing if it has ended."""
    import psutil

    with contextlib.suppress(psutil.Error, IndexError):
        return process.cmdline()[0]
    return ""


def fingerprints(output):
    """The fingerprints of all images that thin_driver.py has printed."""
    return re.findall(r"^\d+ images: \w{64}$", output, re.M)


def contents(bucket, stored="pixels"):
    """What must be in the object store: the fingerprint of a bucket's images, each with its label."""
    import imagenet

    source, pairs = imagenet.source_of(bucket), []
    labels = imagenet.read_labels(source, "train.txt", 10)
    for tar in imagenet.list_tars(source, "")[0]:
        images, names, _ = decode_tar(source.read(tar.key), (256, 256), stored)
        pairs.append(identify(images, [labels[name] for name in names]))
    return fingerprint(pairs)


# What only a terminal understands; what Ray's processes say, a line of C++ with its file and line, or
# an error that nobody has caught.
CONTROLS = r"[\x00-\x08\x0b-\x1f]|"
NOISE = CONTROLS + r"\(raylet|\(gcs_server|core_worker|\.cc:\d+|Traceback|^\[?[EFW]\d{4} |^\s+File "


def assert_clean(output):
    """A user who reads a run's output sees the run's lines, and nothing of Ray's or TensorFlow's."""
    noise = [line for line in output.splitlines() if re.search(NOISE, line)]
    assert not noise, "\n".join(noise)
