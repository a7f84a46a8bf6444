"""A training step, measured: driver.py beside what a user would pick instead, on the same network.

    python benchmarks/step.py [--mini-batch 20] [--precision float32] [--repeats 9]
    python benchmarks/step.py --what parts --repeats 4
    python benchmarks/step.py --what validation --repeats 7

Ours is driver.py as it is shipped, with 2 workers of one CPU; the others, of which --peers chooses, are

    session   one plain TensorFlow session of 2 threads on the mini-batches of both workers: the limit
    apart     two sessions of one thread that compute gradients and send them nowhere: our limit
    mirrored  tf.distribute.MultiWorkerMirroredStrategy, 2 processes of one thread
    ddp       PyTorch's DistributedDataParallel over gloo, 2 processes of one thread, channels_last

The input of the others lies ready in memory; driver.py draws and crops its own. All run all the time
and take turns of so many --steps. One that waits uses no CPU. Of ten steps, ours measures an accuracy
in one. Prints medians and, in brackets, the least and the most; a ratio is that of neighbours.

With --what parts: what --repeats times --steps of our iterations, those without an accuracy, are made
of, in milliseconds. With --what validation: `functions.validate` by our workers, from uint8 images in
the object store to counts of hits, in turns with the network alone: 2 processes of one thread, with
centred float32 images.
"""

import atexit
import json
import os
import signal
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import measuring
from measuring import WORKERS, spread, take_turns

from tests.support import draw_image, drive, free_port

import numpy as np

NUM_CLASSES, KEEP_PROBABILITY = 1000, 0.5
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.0025, 0.9, 5e-4
WARM_UP = 4  # steps that are not measured, of a peer
PARTS_WARM_UP = 10  # iterations before those whose parts are measured
BATCHES, IMAGES = 4, 500  # that are validated, and the images of one


# ---- peers, and their input


def make_batch(mini_batch):
    """Photos' centred pixels float32 [n, 224, 224, 3] and one-hot labels."""
    import functions
    from machinery.cluster.adding import aligned_empty

    rng = np.random.default_rng(0)
    pictures = [np.asarray(draw_image(label, rng))[:224, :224] for label in range(10)]
    images = aligned_empty((mini_batch, 224, 224, 3))
    np.subtract([pictures[i % 10] for i in range(mini_batch)], np.float32(110), out=images)
    return images, functions.one_hot(rng.integers(0, NUM_CLASSES, mini_batch), NUM_CLASSES)


class Peer:
    """Processes that do the same steps, and stand still until they are asked for some."""

    def __init__(self, function, count, *arguments):
        """Start so many processes of `function(pipe, rank, *arguments)`, each of which serves."""
        context, self._pipes = get_context("spawn"), []
        for rank in range(count):
            pipe, end = context.Pipe()
            context.Process(target=function, args=(end, rank, *arguments)).start()
            end.close()
            atexit.register(pipe.close)  # if this process fails, a peer that waits for it ends, too
            self._pipes.append(pipe)
        for pipe in self._pipes:  # they are warm
            pipe.recv()

    def steps(self, count):
        """The seconds that a step takes in each process, of so many in a row; 0 ends the processes."""
        for pipe in self._pipes:
            pipe.send(count)
        return [pipe.recv() for pipe in self._pipes]


def serving(pipe):
    """Yield for each step that warms up, and as the pipe asks; answers with a step's seconds."""
    yield from range(WARM_UP)
    pipe.send(None)
    while count := pipe.recv():
        start = time.perf_counter()
        yield from range(count)
        pipe.send((time.perf_counter() - start) / count)
    pipe.send(None)


def serve(pipe, step):
    """Run a step whenever it is due."""
    for _ in serving(pipe):
        step()


def initial_weights(precision="float32"):
    """What the networks of all peers begin with, as the driver sends it to workers."""
    import alexnet
    import functions
    from machinery.storage.tf1 import tf

    kind = tf.as_dtype(precision).as_numpy_dtype
    weights = alexnet.initial_weights(alexnet.LAYERS, NUM_CLASSES, "he", functions.generator(0))
    return alexnet.as_bits([weight.astype(kind) for weight in weights])


# ---- the peers; each function is a process: (pipe, rank, ports, mini-batch, precision)


def ours(pipe, rank, ports, mini_batch, precision):
    """driver.py, which stands still at the end of an iteration until it is asked on."""
    import driver

    driver.NUM_WORKERS, driver.MINI_BATCH, driver.PRECISION = WORKERS, mini_batch, precision
    due = serving(pipe)

    def stand_still(_):
        if next(due, None) is None:
            os.kill(os.getpid(), signal.SIGINT)  # it stops after this step

    with measuring.small_bucket() as flags:
        drive(flags, report=measuring.watch(stand_still))


def session(pipe, rank, ports, mini_batch, precision):
    """One TensorFlow session: gradients, weight decay and momentum in one graph, nothing fetched."""
    import alexnet
    from machinery.storage.tf1 import tf

    def dropout(x, layer):
        return alexnet.seeded_dropout(x, KEEP_PROBABILITY, np.array([0, layer]))

    batch, weights = make_batch(mini_batch * WORKERS), initial_weights()
    with tf.Graph().as_default():
        inputs = [tf.placeholder(tf.float32, [None, *part.shape[1:]]) for part in batch]
        options = {"initializer": tf.zeros_initializer(), "use_resource": True}
        variables = [tf.get_variable(f"v{i}", w.shape, **options) for i, w in enumerate(weights)]
        cast = [tf.cast(variable, precision) for variable in variables]  # products alone are in it
        logits = alexnet.forward(inputs[0], cast, alexnet.LAYERS, dropout)
        loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits_v2(inputs[1], logits))
        optimizer = tf.train.MomentumOptimizer(LEARNING_RATE, MOMENTUM)
        pairs = optimizer.compute_gradients(loss, variables)
        train = optimizer.apply_gradients([(g + WEIGHT_DECAY * v, v) for g, v in pairs])
        config = tf.ConfigProto(device_count={"GPU": 0}, inter_op_parallelism_threads=1)
        config.intra_op_parallelism_threads = WORKERS
        running = tf.Session(config=config)
        running.run(tf.global_variables_initializer())
        for variable, weight in zip(variables, weights, strict=True):
            variable.load(weight, running)
    feed = dict(zip(inputs, batch, strict=True))
    serve(pipe, lambda: running.run([train, loss], feed))


def apart(pipe, rank, ports, mini_batch, precision):
    """A worker's network on its own: gradients of the same weights again and again, not fetched."""
    import alexnet

    network = alexnet.AlexNet(alexnet.LAYERS, NUM_CLASSES, threads=1, precision=precision)
    network.update_weights(initial_weights(precision))
    images, y_true = make_batch(mini_batch)
    feed = {network.images: images, network.y_true: y_true, network.keep: KEEP_PROBABILITY}
    gradients = [gradient.op for gradient in network.compgrads]
    serve(pipe, lambda: network.sess.run([gradients, network.loss], feed))


def mirrored(pipe, rank, ports, mini_batch, precision):
    """MultiWorkerMirroredStrategy, in its own loop of strategy.run, as Ray Train would run it."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    import alexnet

    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    options = {"auto_mixed_precision_onednn_bfloat16": precision == "bfloat16"}
    tf.config.optimizer.set_experimental_options(options)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        variables = [tf.Variable(weight) for weight in initial_weights()]
        optimizer = tf.compat.v1.train.MomentumOptimizer(LEARNING_RATE, MOMENTUM)

    def dropout(x, layer):
        return tf.nn.dropout(x, 1 - KEEP_PROBABILITY)

    def replica_step(images, y_true):
        with tf.GradientTape() as tape:
            logits = alexnet.forward(images, variables, alexnet.LAYERS, dropout)
            losses = tf.nn.softmax_cross_entropy_with_logits(y_true, logits)
            loss = tf.reduce_mean(losses) / WORKERS
        pairs = zip(tape.gradient(loss, variables), variables, strict=True)
        optimizer.apply_gradients([(g + WEIGHT_DECAY / WORKERS * v, v) for g, v in pairs])
        return loss

    @tf.function
    def step(*batch):
        return strategy.run(replica_step, args=batch)

    batch = [tf.constant(part) for part in make_batch(mini_batch)]
    serve(pipe, lambda: step(*batch).numpy())


def ddp(pipe, rank, ports, mini_batch, precision):
    """DistributedDataParallel over gloo; buckets are views of gradients, the graph is static."""
    from alexnet import LAYERS

    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    address = f"tcp://127.0.0.1:{ports[0]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=WORKERS)
    # The same layers; "SAME" padding of 11x11/4 is one wider behind than before.
    modules, channels, side = [nn.ZeroPad2d((3, 4, 3, 4))], 3, 224
    for kind, units, *rest in LAYERS:
        if kind == "conv":
            kernel, stride, *flags = rest
            padding = 0 if stride > 1 else kernel // 2
            modules += [nn.Conv2d(channels, units, kernel, stride, padding), nn.ReLU(inplace=True)]
            side //= stride
            if "pool" in flags:
                modules.append(nn.MaxPool2d(3, 2))
                side = (side - 3) // 2 + 1
            channels = units
        else:
            modules += [] if side == 1 else [nn.Flatten()]
            modules += [nn.Linear(channels * side * side, units), nn.ReLU(inplace=True)]
            modules.append(nn.Dropout(1 - KEEP_PROBABILITY))
            channels, side = units, 1
    model = nn.Sequential(*modules, nn.Linear(channels, NUM_CLASSES))
    assert sum(p.numel() for p in model.parameters()) == 62_378_344
    model = model.to(memory_format=torch.channels_last)
    model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    decay = {"weight_decay": WEIGHT_DECAY, "fused": True}
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, **decay)
    images, y_true = make_batch(mini_batch)
    images = torch.from_numpy(images / 58).permute(0, 3, 1, 2)  # channels last, as it lies
    classes = torch.from_numpy(y_true.argmax(1))

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), classes)
        loss.backward()
        optimizer.step()
        return loss.item()

    serve(pipe, step)


PEERS = {peer.__name__: peer for peer in (session, apart, mirrored, ddp)}


def compare(args):
    """Have ours and its peers take turns, and print their speeds."""
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as tf1.py does, for all
    peers = {}
    for peer in (ours, *(PEERS[name] for name in args.peers)):
        count, ports = 1 if peer in (ours, session) else WORKERS, [free_port() for _ in range(WORKERS)]
        peers[peer.__name__] = Peer(peer, count, ports, args.mini_batch, args.precision)
    ways = {name: lambda peer=peer: max(peer.steps(args.steps)) for name, peer in peers.items()}
    seconds = take_turns(ways, args.repeats, warm_up=0)
    for peer in peers.values():
        peer.steps(0)
    print(f"2 workers of mini-batch {args.mini_batch}, {args.precision}: images/s, and ours / it")
    for name, taken in seconds.items():
        speed = spread(WORKERS * args.mini_batch / np.array(taken), ".1f")
        print(f"{name:10} {speed:>24} {spread(np.divide(taken, seconds['ours']), '.2f'):>20}")


# ---- the parts of our iteration


def noting(folder):
    """functions.Worker, which also notes each gradient: iteration, and moments of its parts."""
    import functions
    from machinery.cluster.nodes import ACTOR

    import ray

    @ray.remote(**ACTOR)
    class Worker(functions.Worker.__ray_metadata__.modified_class):
        def __init__(self, network):
            super().__init__(network)
            self.loaded, self.notes = (0, 0), (folder / str(os.getpid())).open("w", buffering=1)
            compute = self.network.compute_grad

            def timed(*inputs):
                begun = time.perf_counter()
                result = compute(*inputs)
                self.computed = begun, time.perf_counter()
                return result

            self.network.compute_grad = timed

        def update_weights(self, iteration, weightrefs, passed_on=()):
            start = time.perf_counter()
            if self.iteration != iteration:
                super().update_weights(iteration, weightrefs, passed_on)
                self.loaded = start, time.perf_counter()

        def compute_grad(self, iteration, *arguments):
            called = time.perf_counter()
            result = super().compute_grad(iteration, *arguments)
            print(json.dumps([iteration, *self.loaded, called, *self.computed]), file=self.notes)
            return result

    return Worker


def parts_of(moments, notes):
    """The parts of an iteration, in seconds: of its moments, and of those of its workers [n, 5]."""
    seconds, (loads, loaded, called, begun, computed) = measuring.phases(moments), notes.T
    return {
        "broadcast: weights into the object store": seconds["broadcast"],
        "workers begin: calls, and loading the weights": called.mean() - moments["broadcast"],
        "   of it loading": (loaded - loads).mean(),
        "the mean image is subtracted": (begun - called).mean(),
        "the network's gradients, in its session": (computed - begun).mean(),
        "the mean worker waits for the last one": (computed.max() - computed).mean(),
        "gradients into the object store, answers": moments["compute"] - computed.max(),
        "gather: mean, decay and norm": seconds["gather"],
        "apply: the optimizer": seconds["apply"],
    }


def parts(args):
    """Print what an iteration of ours is made of."""
    import driver

    driver.NUM_WORKERS, driver.MINI_BATCH, driver.PRECISION = WORKERS, args.mini_batch, args.precision
    count, iterations = PARTS_WARM_UP + args.repeats * args.steps, []
    with tempfile.TemporaryDirectory() as place, measuring.small_bucket() as flags:
        flags += ["--iterations", str(count)]
        driver.main(flags, report=measuring.watch(iterations.append), actor=noting(Path(place)))
        noted = [json.loads(line) for path in Path(place).iterdir() for line in path.open()]
    measured, with_accuracy = [], []
    for number in range(PARTS_WARM_UP, count):
        if number % driver.ACCURACY_EVERY:
            notes = np.array([row[1:] for row in noted if row[0] == number])
            measured.append(parts_of(iterations[number], notes))
        else:
            with_accuracy.append(sum(measuring.phases(iterations[number]).values()))
    rows = {name: [iteration[name] for iteration in measured] for name in measured[0]}
    whole = [sum(v for name, v in i.items() if not name.startswith(" ")) for i in measured]
    rows |= {"the iteration": whole, "an iteration with an accuracy": with_accuracy}
    for name, values in rows.items():
        print(f"{name:48} {spread(1000 * np.array(values), '.0f')}")


# ---- validation


def forward(pipe, rank, precision):
    """A peer of a validation: as many forward passes as the pipe asks for."""
    import alexnet
    import functions

    network = alexnet.AlexNet(alexnet.LAYERS, NUM_CLASSES, threads=1, precision=precision)
    network.update_weights(initial_weights(precision))
    rng, count = np.random.default_rng(0), functions.VALIDATION_PIECE
    images = rng.normal(0, 58, (count, 224, 224, 3)).astype(np.float32)
    y_true = functions.one_hot(rng.integers(0, NUM_CLASSES, count), NUM_CLASSES)
    serve(pipe, lambda: network.count_hits(images, y_true))


def validation(args):
    """Have validations and bare forward passes take turns, and print their speeds."""
    import driver
    import functions
    from machinery.cluster import joining, nodes

    import ray

    peer = Peer(forward, WORKERS, args.precision)
    cluster = joining.join(driver.runtime_env(), functions.Worker, num_cpus=WORKERS)
    nodes.places.first_look("functions")
    pool = driver.start_workers(WORKERS, args.precision, cluster)
    pool.wait()
    pool.update_weights(0, ray.put(initial_weights(args.precision)))
    rng, batches = np.random.default_rng(0), []
    for _ in range(BATCHES):
        images = ray.put(rng.integers(0, 256, (IMAGES, 256, 256, 3), np.uint8))
        labels = ray.put(rng.integers(0, NUM_CLASSES, IMAGES))
        batches.append(functions.Batch(images, labels, IMAGES))
    mean = ray.put(np.full((256, 256, 3), 120, np.float32))

    def validate():
        start = time.perf_counter()
        functions.validate(pool, batches, mean)
        return IMAGES * BATCHES / (time.perf_counter() - start)

    def forward_passes():
        count = functions.VALIDATION_PIECE * WORKERS
        return count / max(peer.steps(IMAGES * BATCHES // count))

    speeds = take_turns({"validation": validate, "forward passes": forward_passes}, args.repeats)
    peer.steps(0)
    for name, values in speeds.items():
        print(f"{name:15} {spread(values, '.1f')} images/s")
    ratios = np.divide(speeds["forward passes"], speeds["validation"])
    print(f"time, ours / it: {spread(ratios, '.2f')}")


def main():
    """Measure what --what says."""
    measures = {measure.__name__: measure for measure in (compare, parts, validation)}
    flags = {"what": tuple(measures), "precision": measuring.PRECISIONS, "peers": list(PEERS)}
    args = measuring.read_flags(__doc__, **flags, mini_batch=20, repeats=9, steps=10)
    measures[args.what](args)


if __name__ == "__main__":
    main()
