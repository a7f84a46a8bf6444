"""A training step, measured: driver.py beside what a user would pick instead, on the same network.

    python benchmarks/step.py [--mini-batch 20] [--precision float32] [--repeats 9]

Ours is driver.py as it is shipped, with 2 workers of one CPU; the others are

    session   one plain TensorFlow session of 2 threads on the mini-batches of both workers: the limit
    apart     two sessions of one thread that compute gradients and send them nowhere: our limit
    mirrored  tf.distribute.MultiWorkerMirroredStrategy, 2 processes of one thread
    ddp       PyTorch's DistributedDataParallel over gloo, 2 processes of one thread, channels_last

The input of the others lies ready in memory; driver.py draws and crops its own. All run all the time
and take turns, so that a change of the machine's speed affects all of them. One that waits uses no CPU.
A turn is ten iterations, of which ours measures an accuracy in one.
Prints medians and, in brackets, the least and the most. A ratio is the median of the ratios of
neighbours. The last line has the median seconds of the phases of our iteration.
"""

import argparse
import json
import os
import signal
import time
from functools import partial

import measuring
from measuring import KEEP_PROBABILITY, NUM_CLASSES, WARM_UP, WORKERS, initial_weights, serve, spread

from tests.support import draw_image, drive, fill_bucket, free_port

import numpy as np

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.0025, 0.9, 5e-4

# What ours should reach, in images a second over the peer's, by (mini-batch, precision).
TARGETS = {
    (20, "float32"): {"session": 1.0, "mirrored": 2.0, "ddp": 1.8},
    (20, "bfloat16"): {"session": 1.0, "mirrored": 2.6, "ddp": 2.5},
    (128, "float32"): {"session": 1.05},
    (128, "bfloat16"): {"session": 1.05},
}


def make_batch(mini_batch):
    """Photos' centred pixels float32 [n, 224, 224, 3] and one-hot labels."""
    import functions
    from machinery.cluster.adding import aligned_empty

    rng = np.random.default_rng(0)
    pictures = [np.asarray(draw_image(label, rng))[:224, :224] for label in range(10)]
    images = aligned_empty((mini_batch, 224, 224, 3))
    np.subtract([pictures[i % 10] for i in range(mini_batch)], np.float32(110), out=images)
    return images, functions.one_hot(rng.integers(0, NUM_CLASSES, mini_batch), NUM_CLASSES)


# ---- the peers; each function is a process: (pipe, rank, ports, mini-batch, precision)


def ours(pipe, rank, ports, mini_batch, precision):
    """driver.py, which stands still at the end of an iteration until it is asked on."""
    import driver

    driver.NUM_WORKERS, driver.MINI_BATCH, driver.PRECISION = WORKERS, mini_batch, precision
    iterations, count, due, start = [], None, WARM_UP, None

    def stand_still(phases):
        nonlocal count, due, start
        iterations.append(phases)
        due -= 1
        if due:
            return
        pipe.send(count and (time.perf_counter() - start) / count)
        count = due = pipe.recv()
        if not count:
            measured = iterations[WARM_UP:]
            pipe.send({name: np.median([i[name] for i in measured]) for name in phases})
            os.kill(os.getpid(), signal.SIGINT)  # it stops after this step
        start = time.perf_counter()

    with measuring.loopback() as s3:
        fill_bucket(s3, "step", images_per_class=12)
        drive(["--s3-bucket", "step"], report=measuring.watch(stand_still))


def session(pipe, rank, ports, mini_batch, precision):
    """One TensorFlow session: gradients, weight decay and momentum in one graph, nothing fetched."""
    from machinery.storage.tf1 import tf

    with tf.Graph().as_default():
        network = measuring.plain_network(precision)
        optimizer = tf.train.MomentumOptimizer(LEARNING_RATE, MOMENTUM)
        pairs = optimizer.compute_gradients(network.loss, network.variables)
        train = optimizer.apply_gradients([(g + WEIGHT_DECAY * v, v) for g, v in pairs])
        running = measuring.open_session(network, threads=WORKERS)
    images, y_true = make_batch(mini_batch * WORKERS)
    feed = {network.images: images, network.y_true: y_true}
    serve(pipe, lambda: running.run([train, network.loss], feed))


def apart(pipe, rank, ports, mini_batch, precision):
    """A worker's network on its own: gradients of the same weights again and again, not fetched."""
    import alexnet

    network = alexnet.AlexNet(threads=1, precision=precision)
    network.update_weights(initial_weights(precision))
    images, y_true = make_batch(mini_batch)
    feed = {network.images: images, network.y_true: y_true, network.keep: KEEP_PROBABILITY}
    gradients = [gradient.op for gradient, _ in network.compgrads]
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
    images, y_true = make_batch(mini_batch)
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


# ---- taking turns

PEERS = {peer.__name__: peer for peer in (ours, session, apart, mirrored, ddp)}
ALONE = ours, session  # of one process; the others have as many as there are workers


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure a training step beside other ways to do it.")
    parser.add_argument("--mini-batch", type=int, default=20, help="images of one worker's gradient")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="+", default=list(PEERS)[1:], choices=list(PEERS)[1:])
    parser.add_argument("--repeats", type=int, default=9, help="turns (default: 9)")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of a turn; of ten, one has an accuracy"
    )
    args = parser.parse_args()
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as tf1.py does, for all
    arguments, peers = (args.mini_batch, args.precision), {}
    for name in ("ours", *args.peers):
        count, ports = 1 if PEERS[name] in ALONE else WORKERS, [free_port() for _ in range(WORKERS)]
        peers[name] = measuring.Peer(PEERS[name], count, ports, *arguments)
    ways = {name: partial(peer.seconds, args.steps) for name, peer in peers.items()}
    seconds = measuring.take_turns(ways, args.repeats, warm_up=0)
    phases = [peer.end() for peer in peers.values()][0]
    print(f"2 workers of mini-batch {args.mini_batch}, {args.precision}: images/s")
    targets = TARGETS.get((args.mini_batch, args.precision), {})
    for name, taken in seconds.items():
        line = f"{name:10} {spread(WORKERS * args.mini_batch / np.array(taken), '.1f'):>24}"
        ratios = np.divide(taken, seconds["ours"])
        if name != "ours":
            line += f"   ours / {name} = {spread(ratios, '.2f')}"
        if name in targets:
            met = measuring.verdict(ratios, f">= {targets[name]}")
            line += f", target {targets[name]}: {met}"
        print(line)
    print("of our iteration:", ", ".join(f"{name} {value:.3f}" for name, value in phases.items()))


if __name__ == "__main__":
    main()
