"""AlexNet (Krizhevsky, Sutskever & Hinton 2012) as one TensorFlow graph in its own session.

Every process that computes holds an `AlexNet` of its own: graphs do not serialize, weights do. All
operations are built once and the graph is frozen, so that no step can make it grow.
"""

from machinery.errors import silent_stderr
from machinery.storage.images import CROP_SIZE
from machinery.storage.tf1 import tf

import numpy as np

PIXEL_STD = 58.0  # about the standard deviation of ImageNet's pixels: inputs of unit variance

# One row a layer (paper, section 3.4 and 3.5): ("conv", filters, kernel side, stride), which may have
# "pool" behind it, or ("dense", units). The last dense layer, one unit a class, is added by AlexNet.
# The paper's normalisation (section 3.3) is left out: top-1 is as good without (benchmarks/README.md).
LAYERS = (
    ("conv", 96, 11, 4, "pool"),
    ("conv", 256, 5, 1, "pool"),
    ("conv", 384, 3, 1),
    ("conv", 384, 3, 1),
    ("conv", 256, 3, 1, "pool"),
    ("dense", 4096),
    ("dense", 4096),
)


def weight_shapes(layers, num_classes):
    """Shapes of the parameters in order: a kernel and a bias for each layer, the output last."""
    shapes, side, channels = [], CROP_SIZE, 3
    for kind, units, *options in layers:
        if kind == "conv":
            kernel, stride, *flags = options
            shapes += [(kernel, kernel, channels, units), (units,)]
            side = -(-side // stride)
            side = max(0, (side - 3) // 2 + 1) if "pool" in flags else side
            channels = units
        else:
            shapes += [(side * side * channels, units), (units,)]
            side, channels = 1, units
    return shapes + [(channels, num_classes), (num_classes,)]


def are_layers(value):
    """Whether a table of layers makes a network: each row of a known form, no side of size 0."""
    try:
        flags = {flag for kind, *row in value if kind == "conv" for flag in row[3:]}
        sizes = [size for shape in weight_shapes(value, 1) for size in shape]
        kinds = [kind for kind, *_ in value]
        dense_last = kinds == sorted(kinds) and {"dense"} <= {*kinds} <= {"conv", "dense"}
    except Exception:  # a table can be wrong in any way
        return False
    return flags <= {"pool"} and dense_last and all(type(n) is int and n >= 1 for n in sizes)


def set_bytes(layers, num_classes, precision):
    """Bytes of all weights, or of all their gradients, in a precision."""
    count = sum(int(np.prod(shape)) for shape in weight_shapes(layers, num_classes))
    return count * tf.as_dtype(precision).size


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
    pairs = zip(shapes, stds, strict=True)
    return [rng.standard_normal(shape, np.float32) * np.float32(std) for shape, std in pairs]


def as_bits(arrays):
    """Arrays, those of bfloat16 as uint16: Ray copies what NumPy itself has no type for."""
    return [a.view(np.uint16) if a.dtype == tf.bfloat16.as_numpy_dtype else a for a in arrays]


def forward(images, parameters, layers, dropout=lambda x, layer: x):
    """The logits float32 [n, classes] of images float32 [n, 224, 224, 3], pixels minus their mean.

    All in between is of the parameters' type. `dropout` takes a dense layer's output and number.
    """
    precision, weights = parameters[0].dtype, iter(parameters)
    x = tf.cast(images / PIXEL_STD, precision)
    for i, (kind, _, *options) in enumerate(layers):
        if kind == "conv":
            _, stride, *flags = options
            x = tf.nn.relu(tf.nn.conv2d(x, next(weights), stride, "SAME") + next(weights))
            if "pool" in flags:  # overlapping: paper, section 3.4
                x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        else:
            x = tf.reshape(x, [-1, int(np.prod(x.shape[1:]))])
            x = dropout(tf.nn.relu(tf.matmul(x, next(weights)) + next(weights)), i)
    return tf.cast(tf.matmul(x, next(weights)), tf.float32) + tf.cast(next(weights), tf.float32)


def seeded_dropout(x, keep_probability, seed):
    """Dropout whose mask depends on a seed, int64 [2], alone: TensorFlow's own counts session runs."""
    draw = tf.random.stateless_uniform(tf.shape(x), seed, alg="philox")
    return x * tf.cast(draw < keep_probability, x.dtype) / tf.cast(keep_probability, x.dtype)


class Schedule:
    """The learning rate of each iteration, where an iteration has `images` images.

    Its peak is `rate`, which is for `base` images, times (images / base) to the `power`: 1 keeps the
    step of an image (Goyal et al. 2017, section 2.1), 0.5 the variance of a step (Krizhevsky 2014). A
    peak above `rate` is reached from there, in equal steps over the first `warm_up` images (Goyal et
    al., section 2.2). From each of `drops` on, numbers of images, it is a tenth of what it was.
    """

    def __init__(self, rate, base, power, warm_up, drops, images):
        self.peak = rate * (images / base) ** power
        self._first, self._warm_up, self._drops = min(rate, self.peak), warm_up, drops
        self._images = images

    def __call__(self, iteration):
        """The learning rate of an iteration."""
        seen = iteration * self._images
        risen = min(1, seen / self._warm_up) if self._warm_up else 1
        rate = self._first + (self.peak - self._first) * risen
        return rate / 10 ** sum(seen >= drop for drop in self._drops)

    def __str__(self):
        """What a run uses, for its first lines."""
        text = f"{self.peak:.3g}"
        if self._warm_up and self.peak > self._first:
            text += f", up from {self._first:.3g} over {self._warm_up} images"
        if self._drops:
            text += f", a tenth of it from {' and '.join(map(str, self._drops))} images on"
        return text


class Momentum:
    """The update rule, from a mean gradient to new weights: SGD with momentum (paper, section 5).

    v = m v - rate g, w = w + v, where g is the mean gradient plus `weight_decay` times the kernels (as
    in Caffe, biases do not decay), shortened to `clip_norm` if it is longer. So momentum keeps steps,
    with the rates of their time; TensorFlow's own optimizer keeps gradients. `rate` is a Schedule.
    """

    def __init__(self, rate, momentum, weight_decay, clip_norm):
        self.rate, self.momentum = rate, momentum
        self.weight_decay, self.clip_norm = weight_decay, clip_norm

    def decays(self, parameters):
        """How much of each parameter is added to its mean gradient: kernels alone decay."""
        return [self.weight_decay if len(v.shape) > 1 else 0 for v in parameters]

    def clipped(self, rate, norm):
        """The rate that makes the step of the shortened gradient: SGD is linear in the gradient."""
        return rate * self.clip_norm / norm if norm > self.clip_norm else rate

    def build(self, parameters, gradients, rate):
        """The operation that applies gradients to parameters, and the variables that it keeps."""
        zeros, kept, steps = tf.zeros_initializer(), [], []
        for v, g in zip(parameters, gradients, strict=True):
            kept.append(tf.get_variable(f"{v.op.name}/Momentum", v.shape, v.dtype, zeros))
            step = {"var": v.handle, "accum": kept[-1].handle, "lr": rate, "grad": g}
            steps.append(tf.raw_ops.ResourceApplyKerasMomentum(**step, momentum=self.momentum))
        return tf.group(*steps), kept


class AlexNet:
    """The network, its session and the operations that the driver and the workers run.

    The 16 variables are `parameters`. `placeholders` has one tensor for each, of its shape and type,
    which feeds `assignment` (initial or new weights) as well as `application` (gradients).
    """

    def __init__(self, layers, num_classes, rule=None, threads=0, gpus=0, precision="float32"):
        """Build the graph and open its session, with so many threads (0: one a CPU) and GPUs.

        `rule` is what `apply` does, if anything. `precision` is the type of parameters, products and
        gradients: float32 with a rule, since bfloat16 is too coarse to add small steps to.
        """
        self.layers, self.num_classes, self.rule = layers, num_classes, rule
        self.iteration = 0  # how many steps have made the weights; None if one has failed halfway
        graph = tf.Graph()
        with graph.as_default():
            self._build(precision)
        config = tf.ConfigProto(device_count={"GPU": gpus}, inter_op_parallelism_threads=1)
        config.intra_op_parallelism_threads = threads
        config.gpu_options.allow_growth = True
        with silent_stderr():
            seen = tf.config.list_physical_devices("GPU")[:gpus]
            tf.config.set_visible_devices(seen, "GPU")  # or its eager part, which saves, takes them all
            if len(seen) < gpus:
                hint = "it needs pip install tensorflow[and-cuda]"
                raise RuntimeError(f"TensorFlow sees {len(seen)} of {gpus} GPUs: {hint}")
            self.sess = tf.Session(graph=graph, config=config)
        graph.finalize()

    def weights(self, precision="float32"):
        """The 16 weights in a precision, bfloat16 as its bits (see `as_bits`).

        In the network's own precision they are read-only views: copies took a fifth of an iteration's
        time in float32. TensorFlow copies a variable before it changes it while a view is held.
        """
        self.sess.run(self._show[precision])
        shown, self._shown = self._shown, None
        for array in shown:
            array.flags.writeable = False
        return as_bits(shown)

    def update_weights(self, weights):
        """Take new weights of this network's precision, bfloat16 as its bits: aligned ones uncopied."""
        pairs = list(zip(self.placeholders, weights, strict=True))
        self.sess.run(self.assignment, {p: w.view(p.dtype.as_numpy_dtype) for p, w in pairs})

    def compute_grad(self, images, y_true, keep, dropout_seed):
        """The 16 gradients of the mean loss, bfloat16 as its bits, and that loss.

        images: float32 [n, 224, 224, 3], pixels minus their mean; y_true: float32 [n, classes];
        keep: the probability that dropout keeps a unit; dropout_seed: two integers, for its masks.
        """
        feed = {self.images: images, self.y_true: y_true}
        feed |= {self.keep: keep, self.dropout_seed: dropout_seed}
        gradients, loss = self.sess.run([self.compgrads, self.loss], feed)
        return as_bits(gradients), loss

    def count_hits(self, images, y_true):
        """How many images' class is the likeliest (top-1), and among the five likeliest (top-5).

        Without dropout; images and y_true as for `compute_grad`. Returns two int32.
        """
        return self.sess.run(self.hits, {self.images: images, self.y_true: y_true})

    def initial_state(self, std, rng):
        """What training starts from: `initial_weights`, and zeros for what the rule keeps."""
        zeros = {name: np.zeros(v.shape, np.float32) for name, v in self._state.items()}
        weights = initial_weights(self.layers, self.num_classes, std, rng)
        return zeros | dict(zip(self._state, weights, strict=False))  # the parameters come first

    def save(self, prefix, facts, mean):
        """Write the variables in TensorFlow's format to files whose names start so: 1.2 s for 500 MB.

        Beside them, `facts`, a text, and the mean image `mean` are saved under these names.
        """
        self.sess.run(self._saved, {self._prefix: prefix, self._facts: facts, self._mean: mean})

    def export(self, folder, mean):
        """Write a SavedModel into a new folder, for images that were centred by a mean image.

        It takes `images`, uint8 [n, 256, 256, 3], and gives `probabilities`, float32 [n, classes].
        """
        config = tf.ConfigProto(device_count={"GPU": 0})
        with tf.Graph().as_default(), tf.Session(config=config) as sess:
            images = tf.placeholder(tf.uint8, [None, *mean.shape], "images")
            parameters = [tf.get_variable(v.op.name, v.shape) for v in self.parameters]
            centred = tf.cast(images, tf.float32) - mean
            crops = tf.image.resize_with_crop_or_pad(centred, CROP_SIZE, CROP_SIZE)  # at the centre
            probabilities = tf.nn.softmax(forward(crops, parameters, self.layers))
            for variable, weight in zip(parameters, self.weights(), strict=True):
                variable.load(weight, sess)
            outputs = {"probabilities": probabilities}
            tf.saved_model.simple_save(sess, folder, {"images": images}, outputs)

    def restore(self, state, iteration=0):
        """Go on from `initial_state`, or a checkpoint's, which so many steps have made."""
        with self.sess.graph.as_default():
            for name, variable in self._state.items():
                variable.load(state[name], self.sess)
        self.iteration = iteration

    def apply(self, gradients, norm, rate):
        """One step of the update rule, on a float32 gradient for each parameter and their norm."""
        feed = dict(zip(self.placeholders, gradients, strict=True))
        made, self.iteration = self.iteration, None  # if it fails, these are weights of no iteration
        self.sess.run(self.application, feed | {self.rate: self.rule.clipped(rate, norm)})
        self.iteration = made + 1

    def _build(self, precision):
        layers, num_classes = self.layers, self.num_classes
        shapes = weight_shapes(layers, num_classes)
        self.images = tf.placeholder(tf.float32, [None, CROP_SIZE, CROP_SIZE, 3], "images")
        self.y_true = tf.placeholder(tf.float32, [None, num_classes], "y_true")
        self.keep = tf.placeholder_with_default(1.0, [], "keep_probability")
        self.dropout_seed = tf.placeholder_with_default(np.zeros(2, np.int64), [2], "dropout_seed")
        self.rate = tf.placeholder_with_default(0.0, [], "learning_rate")
        self.placeholders = [tf.placeholder(precision, shape) for shape in shapes]
        kinds = [*(kind for kind, *_ in layers), "dense"]
        names = [f"{kind}{i}/{part}" for i, kind in enumerate(kinds, 1) for part in ("kernel", "bias")]
        named, zeros = zip(names, shapes, strict=True), tf.zeros_initializer()
        self.parameters = [tf.get_variable(name, shape, precision, zeros) for name, shape in named]
        self._show = {}  # the operations that leave the weights in `_shown`, by precision
        for kind in ("float32", "bfloat16"):
            seen = [tf.cast(v, kind) for v in self.parameters]  # a function sees variables, not copies
            self._show[kind] = tf.numpy_function(lambda *a: setattr(self, "_shown", a), seen, [])
        pairs = zip(self.placeholders, self.parameters, strict=True)
        self.assignment = tf.group(*(v.assign(p, read_value=False) for p, v in pairs))

        def dropout(x, layer):
            return seeded_dropout(x, self.keep, self.dropout_seed + np.array([0, layer]))

        self.logits = logits = forward(self.images, self.parameters, layers, dropout)
        self.loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits_v2(self.y_true, logits))
        hits = tf.equal(tf.argmax(logits, 1), tf.argmax(self.y_true, 1))
        near = tf.math.in_top_k(logits, tf.argmax(self.y_true, 1), min(5, num_classes))
        self.hits = [tf.reduce_sum(tf.cast(right, tf.int32)) for right in (hits, near)]

        self.compgrads = tf.gradients(self.loss, self.parameters)
        self._state = {v.op.name: v for v in self.parameters}
        if self.rule:
            self.application, kept = self.rule.build(self.parameters, self.placeholders, self.rate)
            self._state |= {v.op.name: v for v in kept}
            self._prefix, self._facts = tf.placeholder(tf.string, []), tf.placeholder(tf.string, [])
            self._mean = tf.placeholder(tf.float32)
            saved = self._state | {"facts": self._facts, "mean": self._mean}
            options = {"shape_and_slices": [""] * len(saved), "tensors": [*saved.values()]}
            self._saved = tf.raw_ops.SaveV2(prefix=self._prefix, tensor_names=[*saved], **options)
