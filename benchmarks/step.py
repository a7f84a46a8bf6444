"""A training step, measured: driver.py beside what a user would pick instead, on the same network.

    python benchmarks/step.py [--mini-batch 20] [--precision float32] [--no-norm] [--repeats 9]

Ours is driver.py itself, with 2 workers of one CPU; the others are

    session   one plain TensorFlow session of 2 threads on the mini-batches of both workers: the limit
    apart     two sessions of one thread that compute gradients and tell nobody: our limit
    mirrored  tf.distribute.MultiWorkerMirroredStrategy, 2 processes of one thread
    ddp       PyTorch's DistributedDataParallel over gloo, 2 processes of one thread, channels_last

Each keeps its input ready in memory, where driver.py draws and crops its own. All are up all the time
and take turns, so that a change of the machine's mood hits all alike; who waits uses no CPU. Prints
medians and, in brackets, the least and the most; a ratio is the median of the ratios of neighbours.
Last come the median seconds of the phases of our iteration.
"""

import argparse
import json
import os
import re
import socket
import sys
import time
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np

import demo

WORKERS = 2
NUM_CLASSES = 1000
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, KEEP_PROBABILITY = 0.0025, 0.9, 5e-4, 0.5
WARM_UP = 4  # steps

# What ours should reach, in images a second over the peer's, by (mini-batch, precision).
TARGETS = {
    (20, "float32"): {"session": 0.95, "mirrored": 1.6, "ddp": 1.25},
    (20, "bfloat16"): {"session": 0.90, "mirrored": 2.1, "ddp": 1.4},
    (128, "float32"): {"session": 0.97},
    (128, "bfloat16"): {"session": 0.97},
}


def layers(norm):
    """The network's table of layers, without the normalisations where `norm` is false."""
    import alexnet

    return tuple(tuple(option for option in row if norm or option != "norm") for row in alexnet.LAYERS)


def make_batch(mini_batch):
    """Photos' centred pixels float32 [n, 224, 224, 3] and one-hot labels."""
    import functions

    rng = np.random.default_rng(0)
    pictures = [np.asarray(demo.draw_image(label, rng))[:224, :224] for label in range(10)]
    images = functions.aligned_empty((mini_batch, 224, 224, 3))
    np.subtract([pictures[i % 10] for i in range(mini_batch)], np.float32(110), out=images)
    return images, functions.one_hot(rng.integers(0, NUM_CLASSES, mini_batch), NUM_CLASSES)


def serve(pipe, step):
    """Run as many steps as the pipe asks for, again and again; answers with the seconds of one."""
    for _ in range(WARM_UP):
        step()
    pipe.send(None)
    while count := pipe.recv():
        start = time.perf_counter()
        for _ in range(count):
            step()
        pipe.send((time.perf_counter() - start) / count)
    pipe.send(None)


# ---- the peers; each function is a process: (pipe, rank, port, mini-batch, precision, norm)


def ours(pipe, rank, port, mini_batch, precision, norm):
    """driver.py, which stands still where it would print an iteration's line until it is asked on."""
    import driver
    import functions

    class Noted(functions.Stopwatch):
        def __init__(self):
            super().__init__()
            iterations.append(self.seconds)

    functions.Stopwatch, iterations = Noted, []
    driver.NUM_WORKERS, driver.MINI_BATCH, driver.PRECISION = WORKERS, mini_batch, precision
    driver.LAYERS = layers(norm)
    driver.ACCURACY_EVERY = 10**9
    due, start = WARM_UP, None

    def gate(text, **_):
        nonlocal due, start
        if not re.match(r"Iteration \d+: loss", text):
            return
        due -= 1
        if not due:
            pipe.send(start and (time.perf_counter() - start[0]) / start[1])
            due = pipe.recv()
            if not due:
                phases = iterations[0]
                pipe.send({p: np.median([i[p] for i in iterations[WARM_UP:]]) for p in phases})
                os.kill(os.getpid(), 2)  # Ctrl-C: it stops after this step
                due = -1
            start = time.perf_counter(), due

    os.environ["RAY_ADDRESS"] = "local"  # a Ray of its own
    driver.print = gate
    with demo.s3_server() as environment:
        os.environ.update(environment)
        demo.fill_bucket(demo.s3_client(environment), "step", images_per_class=12)
        driver.main(["--s3-bucket", "step"])


def session(pipe, rank, port, mini_batch, precision, norm):
    """One TensorFlow session: gradients, weight decay and momentum in one graph, nothing fetched."""
    import alexnet
    import functions

    tf = alexnet.tf

    class Plain(alexnet.AlexNet):
        def _build(self, layers, num_classes, momentum, precision):
            super()._build(layers, num_classes, momentum, "float32")
            used = [tf.cast(v, precision) for v in self.parameters]
            logits = alexnet.forward(self.images, used, layers, self._dropout)
            losses = tf.nn.softmax_cross_entropy_with_logits_v2(self.y_true, logits)
            self.loss = tf.reduce_mean(losses)
            optimizer = tf.train.MomentumOptimizer(LEARNING_RATE, momentum)
            pairs = [(g + WEIGHT_DECAY * v, v) for g, v in optimizer.compute_gradients(self.loss)]
            self.train = optimizer.apply_gradients(pairs)
            self.initializer = tf.group(
                self.initializer, tf.variables_initializer(optimizer.variables())
            )

    alexnet.keep_memory()
    table = layers(norm)
    network = Plain(table, momentum=MOMENTUM, threads=2, precision=precision)
    rng = functions.generator(0)
    network.initialize(alexnet.initial_weights(table, NUM_CLASSES, "he", rng))
    images, y_true = make_batch(mini_batch * WORKERS)
    feed = {network.images: images, network.y_true: y_true, network.keep: KEEP_PROBABILITY}
    serve(pipe, lambda: network.sess.run([network.train, network.loss], feed))


def apart(pipe, rank, port, mini_batch, precision, norm):
    """A worker's network on its own: gradients of the same weights again and again, not fetched."""
    import alexnet
    import functions

    alexnet.keep_memory()
    table = layers(norm)
    network = alexnet.AlexNet(table, threads=1, precision=precision)
    local = alexnet.AlexNet(table)
    local.initialize(alexnet.initial_weights(table, NUM_CLASSES, "he", functions.generator(0)))
    network.update_weights(local.weights(precision))
    images, y_true = make_batch(mini_batch)
    feed = {network.images: images, network.y_true: y_true, network.keep: KEEP_PROBABILITY}
    gradients = [gradient.op for gradient, _ in network.compgrads]
    serve(pipe, lambda: network.sess.run([gradients, network.loss], feed))


def mirrored(pipe, rank, port, mini_batch, precision, norm):
    """MultiWorkerMirroredStrategy, in its own loop of strategy.run, as Ray Train would run it."""
    addresses = [f"127.0.0.1:{port + i}" for i in range(WORKERS)]
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    import tensorflow as tf

    import alexnet
    import functions

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    options = {"auto_mixed_precision_onednn_bfloat16": precision == "bfloat16"}
    tf.config.optimizer.set_experimental_options(options)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    table = layers(norm)
    images, y_true = make_batch(mini_batch)
    with strategy.scope():
        rng = functions.generator(0)
        weights = alexnet.initial_weights(table, NUM_CLASSES, "he", rng)
        variables = [tf.Variable(weight) for weight in weights]
        optimizer = tf.compat.v1.train.MomentumOptimizer(LEARNING_RATE, MOMENTUM)

    def dropout(x, layer):
        return tf.nn.dropout(x, 1 - KEEP_PROBABILITY)

    def replica_step(images, y_true):
        with tf.GradientTape() as tape:
            logits = alexnet.forward(images, variables, table, dropout)
            losses = tf.nn.softmax_cross_entropy_with_logits(y_true, logits)
            loss = tf.reduce_mean(losses) / WORKERS
        gradients = tape.gradient(loss, variables)
        pairs = zip(gradients, variables, strict=True)
        decayed = [(g + WEIGHT_DECAY / WORKERS * v, v) for g, v in pairs]
        optimizer.apply_gradients(decayed)
        return loss

    @tf.function
    def step(images, y_true):
        return strategy.run(replica_step, args=(images, y_true))

    images, y_true = tf.constant(images), tf.constant(y_true)
    serve(pipe, lambda: step(images, y_true).numpy())


def ddp(pipe, rank, port, mini_batch, precision, norm):
    """DistributedDataParallel over gloo; buckets are views of gradients, the graph is static."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=WORKERS)
    # The same layers; "SAME" padding of 11x11/4 is one wider behind than before; alpha is of the sum.
    modules, channels, side = [nn.ZeroPad2d((3, 4, 3, 4))], 3, 224
    for kind, units, *rest in layers(norm):
        if kind == "conv":
            kernel, stride, *flags = rest
            padding = 0 if stride > 1 else kernel // 2
            modules += [nn.Conv2d(channels, units, kernel, stride, padding), nn.ReLU(inplace=True)]
            modules += [nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)] if "norm" in flags else []
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
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
    )
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


# ---- taking turns

PEERS = {
    "ours": (ours, 1),
    "session": (session, 1),
    "apart": (apart, 2),
    "mirrored": (mirrored, 2),
    "ddp": (ddp, 2),
}


class Peer:
    """The processes of a peer, which stand still until they are asked for steps."""

    def __init__(self, name, *arguments):
        function, count = PEERS[name]
        context, port = get_context("spawn"), free_ports()
        self._pipes = []
        for rank in range(count):
            pipe, end = context.Pipe()
            context.Process(target=function, args=(end, rank, port, *arguments)).start()
            end.close()
            self._pipes.append(pipe)
        self._answers()

    def _answers(self):
        return [pipe.recv() for pipe in self._pipes]

    def seconds(self, steps):
        """Seconds that one step takes, of so many in a row."""
        for pipe in self._pipes:
            pipe.send(steps)
        return max(self._answers())

    def end(self):
        """End the processes; the median seconds of each phase, of ours."""
        for pipe in self._pipes:
            pipe.send(0)
        return self._answers()[0]


def free_ports():
    """The first of two ports in a row that are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def spread(values, digits):
    """Median, least and most of some numbers."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (np.min, np.median, np.max))
    return f"{middle} [{low}..{high}]"


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure a training step beside other ways to do it.")
    parser.add_argument("--mini-batch", type=int, default=20, help="images of one worker's gradient")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-norm", action="store_true", help="without the paper's normalisation")
    parser.add_argument("--peers", nargs="+", default=list(PEERS)[1:], choices=list(PEERS)[1:])
    parser.add_argument("--repeats", type=int, default=9, help="turns (default: 9)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn (default: 5)")
    args = parser.parse_args()
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as alexnet.py does, for all
    arguments = args.mini_batch, args.precision, not args.no_norm
    names = ["ours", *args.peers]
    peers = {name: Peer(name, *arguments) for name in names}
    speeds = {name: [] for name in names}
    for _ in range(args.repeats):
        for name, peer in peers.items():
            speeds[name].append(WORKERS * args.mini_batch / peer.seconds(args.steps))
    phases = [peer.end() for peer in peers.values()][0]
    norm = "without normalisation" if args.no_norm else "the paper's normalisation"
    print(f"2 workers of mini-batch {args.mini_batch}, {args.precision}, {norm}: images/s")
    targets = TARGETS.get((args.mini_batch, args.precision), {})
    for name, values in speeds.items():
        ratio = np.divide(speeds["ours"], values)
        line = f"{name:10} {spread(values, 1):>24}"
        if name != "ours":
            line += f"   ours / {name} = {spread(ratio, 2)}"
        if name in targets:
            line += f", target {targets[name]}: "
            line += "met" if np.median(ratio) >= targets[name] else "MISSED"
        print(line)
    print("of our iteration:", ", ".join(f"{name} {value:.3f}" for name, value in phases.items()))


if __name__ == "__main__":
    main()
