"""AlexNet (Krizhevsky, Sutskever & Hinton 2012) as one TensorFlow graph in its own session.

Every process that computes holds an `AlexNet` of its own: graphs do not serialize, weights do. All
operations are built once and the graph is frozen, so that no step can make it grow.
"""

import contextlib
import ctypes
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from imagenet import IMAGE_SIZE, InputError, S3Folder, one_line


@contextlib.contextmanager
def _silent_start():
    """Close file descriptor 2 meanwhile: TensorFlow greets there from C++ at any log level."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


with _silent_start():
    # Both are read once, when TensorFlow loads. It would use oneDNN with AVX-512 only; with AVX2, too,
    # a step is two thirds as long by it.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow.compat.v1 as tf

    tf.logging.set_verbosity(tf.logging.ERROR)  # compat.v1 is on purpose; no word of it being old

PIXEL_STD = 58.0  # about the standard deviation of ImageNet's pixels: inputs of unit variance

# One row a layer: ("conv", filters, kernel side, stride, options...) or ("dense", units).
# "norm" follows the ReLU and precedes "pool" (paper, section 3.3 to 3.5). The last dense layer, one
# unit a class, is added by AlexNet.
LAYERS = (
    ("conv", 96, 11, 4, "norm", "pool"),
    ("conv", 256, 5, 1, "norm", "pool"),
    ("conv", 384, 3, 1),
    ("conv", 384, 3, 1),
    ("conv", 256, 3, 1, "pool"),
    ("dense", 4096),
    ("dense", 4096),
)


def weight_shapes(layers, num_classes):
    """Shapes of the parameters in order: a kernel and a bias for each layer, the output last."""
    shapes, side, channels = [], IMAGE_SIZE, 3
    for kind, units, *options in layers:
        if kind == "conv":
            kernel, stride, *flags = options
            shapes += [(kernel, kernel, channels, units), (units,)]
            side = -(-side // stride)
            side = (side - 3) // 2 + 1 if "pool" in flags else side
            channels = units
        else:
            shapes += [(side * side * channels, units), (units,)]
            side, channels = 1, units
    return shapes + [(channels, num_classes), (num_classes,)]


def initial_weights(layers, num_classes, std, rng):
    """One initial matrix for each parameter: float32, in the order of `weight_shapes`.

    `std` is the standard deviation of every kernel and bias, as in the write-up (0.1), or "he": each
    kernel N(0, 2 / fan-in) (He et al. 2015, made for ReLU), the output N(0, 0.01^2), biases zero.
    """
    shapes = weight_shapes(layers, num_classes)
    if std != "he":
        return [rng.normal(scale=std, size=shape).astype(np.float32) for shape in shapes]
    stds = [np.sqrt(2 / np.prod(shape[:-1])) if len(shape) > 1 else 0.0 for shape in shapes]
    stds[-2] = 0.01
    return [
        rng.standard_normal(shape, np.float32) * np.float32(s)
        for shape, s in zip(shapes, stds, strict=True)
    ]


def keep_memory():
    """Have malloc keep what is freed for the next step instead of giving it back to the system.

    A step takes and frees some 500 MB; new pages for it can cost more than what is computed on them.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no memory outside the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at its end stays


def as_bits(arrays):
    """Arrays, those of bfloat16 as uint16: Ray copies what NumPy itself has no type for."""
    return [a.view(np.uint16) if a.dtype == tf.bfloat16.as_numpy_dtype else a for a in arrays]


def forward(images, parameters, layers, dropout=lambda x, layer: x):
    """The logits float32 [n, classes] of images float32 [n, 224, 224, 3], pixels minus their mean.

    All is computed in the type of the parameters, but normalisations and logits in float32. `dropout`
    is called with what a dense layer gives, and the layer's number.
    """
    precision, weights = parameters[0].dtype, iter(parameters)
    x = tf.cast(images / PIXEL_STD, precision)
    for i, (kind, _, *options) in enumerate(layers):
        if kind == "conv":
            _, stride, *flags = options
            x = tf.nn.relu(tf.nn.conv2d(x, next(weights), stride, "SAME") + next(weights))
            if "norm" in flags:  # paper, section 3.3, n = 5; the sum takes alpha, not alpha / n
                x = tf.cast(x, tf.float32)
                x = tf.nn.local_response_normalization(x, 2, bias=2.0, alpha=1e-4, beta=0.75)
                x = tf.cast(x, precision)
            if "pool" in flags:  # overlapping: paper, section 3.4
                x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        else:
            x = tf.reshape(x, [-1, int(np.prod(x.shape[1:]))])
            x = dropout(tf.nn.relu(tf.matmul(x, next(weights)) + next(weights)), i)
    return tf.cast(tf.matmul(x, next(weights)), tf.float32) + tf.cast(next(weights), tf.float32)


class Momentum(tf.train.MomentumOptimizer):
    """The paper's rule, section 5: v = m v - rate g, w = w + v. Momentum keeps steps, rates and all.

    TensorFlow's own optimizer keeps sums of gradients, to which a new rate applies at once.
    """

    def _resource_apply_dense(self, gradient, variable):
        velocity = self.get_slot(variable, "momentum")
        return tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=velocity.handle,
            lr=tf.cast(self._learning_rate_tensor, variable.dtype),
            grad=gradient,
            momentum=tf.cast(self._momentum_tensor, variable.dtype),
        )


class AlexNet:
    """The network, its session and the operations that the driver and the workers run.

    The 16 variables are `parameters`; `placeholders` has one float32 tensor for each, which feeds
    `assignment` (initial or new weights) as well as `application` (gradients).
    """

    def __init__(
        self,
        layers=LAYERS,
        num_classes=1000,
        momentum=0.9,
        threads=0,
        gpus=0,
        precision="float32",
    ):
        """Build the graph and open its session, with so many threads (0: one a CPU) and GPUs.

        `precision` is the type of parameters, products and gradients, "float32" or "bfloat16". Who
        trains is in float32: bfloat16 is too coarse to add small steps to.
        """
        self.layers = layers
        graph = tf.Graph()
        with graph.as_default():
            self._build(layers, num_classes, momentum, precision)
        config = tf.ConfigProto(
            device_count={"GPU": gpus},
            intra_op_parallelism_threads=threads,
            inter_op_parallelism_threads=1,
            gpu_options=tf.GPUOptions(allow_growth=True),
        )
        with _silent_start():
            if not gpus:  # or TensorFlow's eager part, which shows weights and saves, takes them all
                tf.config.set_visible_devices([], "GPU")
            self.sess = tf.Session(graph=graph, config=config)
        graph.finalize()

    def initialize(self, weights):
        """Start to train from these weights, without momentum."""
        self.sess.run(self.initializer)
        self.update_weights(weights)

    def weights(self, precision="float32"):
        """The 16 weights in a precision, bfloat16 as its bits (see `as_bits`).

        In the network's own precision they are read-only views of its variables, which cost nothing;
        a variable that changes while a view of it is held is copied first.
        """
        self.sess.run(self._show[precision])
        shown, self._shown = self._shown, None
        for array in shown:
            array.flags.writeable = False
        return as_bits(shown)

    def update_weights(self, weights):
        """Take new weights of this network's precision, bfloat16 as its bits.

        TensorFlow uses aligned arrays in place, read-only ones too.
        """
        pairs = list(zip(self.placeholders, weights, strict=True))
        self.sess.run(self.assignment, {p: w.view(p.dtype.as_numpy_dtype) for p, w in pairs})

    def compute_grad(self, images, y_true, keep, dropout_seed):
        """The 16 gradients of the mean loss, bfloat16 as its bits, and that loss.

        images: float32 [n, 224, 224, 3], pixels minus their mean; y_true: float32 [n, classes];
        keep: the probability that dropout keeps a unit; dropout_seed: two integers.
        """
        feed = {self.images: images, self.y_true: y_true}
        feed |= {self.keep: keep, self.dropout_seed: dropout_seed}
        gradients, loss = self.sess.run([[gradient for gradient, _ in self.compgrads], self.loss], feed)
        return as_bits(gradients), loss

    def compute_accuracy(self, images, y_true):
        """The share of images whose likeliest class is right (top-1), without dropout."""
        return float(self.sess.run(self.accuracy, {self.images: images, self.y_true: y_true}))

    def count_hits(self, images, y_true):
        """How many images' class is the likeliest (top-1), and among the five likeliest (top-5)."""
        return self.sess.run(self.hits, {self.images: images, self.y_true: y_true})

    def state(self):
        """A copy of the weights and their momentum: a dict of name -> float32 array."""
        return self.sess.run(self._state)

    def restore(self, state):
        """Go on from what `state` returned."""
        feed = {load: state[name] for name, load in self._loads.items()}
        self.sess.run(self._restoration, feed)

    def apply(self, gradients, learning_rate):
        """One step of SGD with momentum on gradients, one for each parameter."""
        feed = dict(zip(self.placeholders, gradients, strict=True))
        self.sess.run(self.application, feed | {self.learning_rate: learning_rate})

    def _build(self, layers, num_classes, momentum, precision):
        shapes = weight_shapes(layers, num_classes)
        self.images = tf.placeholder(tf.float32, [None, IMAGE_SIZE, IMAGE_SIZE, 3], "images")
        self.y_true = tf.placeholder(tf.float32, [None, num_classes], "y_true")
        self.keep = tf.placeholder_with_default(1.0, [], "keep_probability")
        self.dropout_seed = tf.placeholder_with_default(np.zeros(2, np.int64), [2], "dropout_seed")
        self.learning_rate = tf.placeholder_with_default(0.0, [], "learning_rate")
        self.placeholders = [tf.placeholder(precision, shape) for shape in shapes]
        kinds = [*(kind for kind, *_ in layers), "dense"]
        names = [f"{kind}{i}/{part}" for i, kind in enumerate(kinds, 1) for part in ("kernel", "bias")]
        self.parameters = [
            tf.get_variable(name, shape, precision, tf.zeros_initializer(), use_resource=True)
            for name, shape in zip(names, shapes, strict=True)
        ]
        # A session copies the variables that it fetches, on one thread; a function gets to see them.
        self._show = {
            precision: tf.numpy_function(
                self._see, [tf.cast(v, precision) for v in self.parameters], []
            )
            for precision in ("float32", "bfloat16")
        }
        pairs = list(zip(self.placeholders, self.parameters, strict=True))
        self.assignment = tf.group(*(v.assign(p, read_value=False) for p, v in pairs))

        self.logits = logits = forward(self.images, self.parameters, layers, self._dropout)
        self.loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits_v2(self.y_true, logits))
        hits = tf.equal(tf.argmax(logits, 1), tf.argmax(self.y_true, 1))
        self.accuracy = tf.reduce_mean(tf.cast(hits, tf.float32))
        near = tf.math.in_top_k(logits, tf.argmax(self.y_true, 1), min(5, num_classes))
        self.hits = [tf.reduce_sum(tf.cast(right, tf.int32)) for right in (hits, near)]

        optimizer = Momentum(self.learning_rate, momentum)
        self.compgrads = optimizer.compute_gradients(self.loss, self.parameters)
        self.application = optimizer.apply_gradients(pairs)
        self.initializer = tf.variables_initializer(optimizer.variables())
        self._state = {v.op.name: v for v in [*self.parameters, *optimizer.variables()]}
        self._loads = {name: tf.placeholder(v.dtype, v.shape) for name, v in self._state.items()}
        self._restoration = [v.assign(self._loads[name]).op for name, v in self._state.items()]

    def _see(self, *arrays):
        self._shown = arrays

    def _dropout(self, x, layer):
        # TensorFlow's own dropout counts session runs; this mask depends on the fed seed alone.
        seed = self.dropout_seed + np.array([0, layer])
        draw = tf.random.stateless_uniform(tf.shape(x), seed, alg="philox")
        return x * tf.cast(draw < self.keep, x.dtype) / tf.cast(self.keep, x.dtype)


class Checkpoints:
    """Checkpoints in TensorFlow's own format, which `tf.train` reads; the newest three are kept.

    A checkpoint is the state of an AlexNet and a dict of facts about its run, as JSON. A thread writes
    it under names that nobody reads and renames them, the index last; then it goes to S3, if it shall,
    in the same order; the file `checkpoint` names it last.
    """

    KEPT = 3

    def __init__(self, place):
        """Open a folder or `s3://bucket/prefix`; InputError if it cannot be written."""
        self.place = place
        self._remote = S3Folder(place) if place.startswith("s3://") else None
        self._scratch = tempfile.TemporaryDirectory() if self._remote else None
        self._folder = Path(self._scratch.name if self._remote else place).resolve()
        self._writer, self._writing = ThreadPoolExecutor(1), None
        with _disk_errors("--checkpoint-dir", place):
            _make_writable(self._folder)
            for leftover in self._folder.glob("ckpt-*.tempstate*"):  # of a save that was killed
                leftover.unlink()

    def _names(self):
        """Names of the complete checkpoints, oldest first: the index is there once the data is."""
        files = self._remote.names() if self._remote else [path.name for path in self._folder.iterdir()]
        found = [re.fullmatch(r"ckpt-(\d+)\.index", file) for file in files]
        return [f"ckpt-{number}" for number in sorted(int(match[1]) for match in found if match)]

    def newest(self, report=print):
        """State and facts of the newest intact checkpoint; (None, None) in an empty folder.

        Reports each damaged one that is newer; InputError if there is none but damaged ones.
        """
        names = self._names()
        for name in reversed(names):
            try:
                if self._remote:
                    for file in _files(name):
                        self._remote.download(file, self._folder / file)
                reader = tf.train.load_checkpoint(str(self._folder / name))
                # Reading a tensor verifies its checksum.
                state = {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
                return state, json.loads(state.pop("facts"))
            except InputError:
                raise
            except Exception as error:  # TensorFlow's reader raises anything on damaged bytes
                report(f"{self.place}: {name} is damaged and left out: {one_line(error)[:120]}")
        if names:
            raise InputError(f"{self.place}: no checkpoint is intact; remove them to start anew")
        return None, None

    def resume(self, run, same, report=print):
        """State and facts as `newest`, if `run` is the run that was saved: its facts under "run".

        Of that dict of texts, the keys in `same` must be equal, else InputError names those that are
        not; any other that has changed is reported.
        """
        state, facts = self.newest(report)
        if state:
            changed = {key: facts["run"].get(key) for key in run if facts["run"].get(key) != run[key]}
            if wrong := [f"{key} (was {was})" for key, was in changed.items() if key in same]:
                raise InputError(
                    f"{self.place} is of another run: different are {', '.join(wrong)}; "
                    "restore that or name another --checkpoint-dir"
                )
            for key, was in changed.items():
                report(f"{key} is {run[key]} from here on, was {was}")
        return state, facts

    def save(self, iteration, state, facts):
        """Write a checkpoint behind training's back; waits only for the one before it."""
        self.wait()
        self._writing = self._writer.submit(self._write, f"ckpt-{iteration}", state, facts)

    def wait(self):
        """Wait until the last save is complete; InputError if it failed."""
        with _disk_errors("--checkpoint-dir", self.place):
            if self._writing:
                self._writing.result()

    def _write(self, name, state, facts):
        tensors = state | {"facts": json.dumps(facts)}
        tf.raw_ops.SaveV2(
            prefix=str(self._folder / name),
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(tensors),
            tensors=list(tensors.values()),
        )
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


class LearningCurves:
    """Scalars over the iterations, as TensorBoard's event files in a folder."""

    def __init__(self, folder):
        """Open the folder; InputError if it cannot be written."""
        self.folder = folder
        if "://" in folder:
            raise InputError(f"--log-dir {folder}: name a local folder")
        with _disk_errors("--log-dir", folder), tf.Graph().as_default():
            _make_writable(Path(folder))
            self._writer = tf.summary.FileWriter(folder)

    def start(self, iteration):
        """Begin at an iteration: what a run that was cut off wrote of later ones is forgotten."""
        self._writer.add_session_log(tf.SessionLog(status=tf.SessionLog.START), iteration)

    def add(self, iteration, scalars):
        """Write a dict of tag -> number, to disk at once: a driver that is killed loses none."""
        values = [tf.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        with _disk_errors("--log-dir", self.folder):
            self._writer.add_summary(tf.Summary(value=values), iteration)
            self._writer.flush()


class SavedModel:
    """The trained network for use elsewhere, in a folder or `s3://bucket/prefix`, in one piece."""

    def __init__(self, place):
        """Name where it goes; InputError if that cannot be written or holds something else."""
        self.place = place
        self._remote = S3Folder(place) if place.startswith("s3://") else None
        self._folder = Path(place).resolve()
        if self._remote:
            self._remote.check_writable("saved_model.pb")
            return
        with _disk_errors("--export-dir", place):
            _make_writable(self._folder.parent)
            others = self._folder.exists() and not (self._folder / "saved_model.pb").exists()
            if others and any(self._folder.iterdir()):
                raise InputError(f"--export-dir {place}: holds something else: name a new folder")

    def write(self, network, mean):
        """Export an AlexNet whose images were centred by a mean image float32 [256, 256, 3].

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


def _save_model(folder, network, mean):
    margins = [(side - IMAGE_SIZE) // 2 for side in mean.shape[:2]]
    top, left = (slice(margin, margin + IMAGE_SIZE) for margin in margins)
    with tf.Graph().as_default(), tf.Session(config=tf.ConfigProto(device_count={"GPU": 0})) as sess:
        images = tf.placeholder(tf.uint8, [None, *mean.shape], "images")
        parameters = [
            tf.get_variable(v.op.name, v.shape, use_resource=True) for v in network.parameters
        ]
        centred = tf.cast(images[:, top, left], tf.float32) - mean[top, left]
        probabilities = tf.nn.softmax(forward(centred, parameters, network.layers))
        fed = [v.initializer.inputs[1] for v in parameters]  # instead of random initial weights
        sess.run([v.initializer for v in parameters], dict(zip(fed, network.weights(), strict=True)))
        tf.saved_model.simple_save(
            sess, str(folder), {"images": images}, {"probabilities": probabilities}
        )


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
