"""What crosses between nodes in an iteration, and how long it takes where computing takes no time.

    python benchmarks/scaling.py [--nodes 1 2 4 8] [--workers 2] [--iterations 20]
    python benchmarks/scaling.py --nodes 1 --workers 2 4 8 16 [--precision bfloat16]
    python benchmarks/scaling.py --nodes 1 --workers 16 32 64 --thin
    python benchmarks/scaling.py --nodes 1 --workers 8 --cpus 2 --compute

driver.py itself, on several Ray nodes of some workers each on this machine; its workers return arrays
of the gradients' real size without computing them. Bytes are counted by Ray's object managers. After
each iteration the driver stands still until their counters do. Weights and gradients are sets of 16
arrays of one size, so almost all bytes are whole sets; the rest is mini-batches and small objects.
With --thin, the network is tiny, a mini-batch is one image, and accuracies are measured as ever: what
is left of an iteration is its calls and waits. The last figures then are CPU time of an iteration, in
milliseconds: of the driver, and of all other processes, which share this machine's cores. With
--compute, the workers are those of driver.py, of --cpus CPUs each: what is the speed, and how much
memory has a worker of its own?
"""

import argparse
import itertools
import os
import re
import time
import urllib.request

from measuring import (
    NUM_CLASSES,
    WORKERS,
    ask,
    loopback,
    private_memory,
    ray_workers,
    run_apart,
    spread,
    watch,
)

import functions
from machinery.cluster import joining
from machinery.cluster.nodes import ACTOR, Actor, place
from tests.support import THIN, fill_bucket

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster

THIN_NETWORK = THIN, 10  # layers and classes
MINI_BATCH = 20  # images: 3 MB
WARM_UP = 3  # iterations; without computing, one more for each set that the object store has room for
SPARE = 4  # sets that fit into a node's object store beside those of its workers
LEAST_STORE = 500 * 2**20  # bytes
SETTLED = 1.5  # seconds without a change, after which counters are final


@ray.remote(**ACTOR)
class Returner(Actor):
    """A worker without a network: it returns the weights, which have the gradients' sizes."""

    def __init__(self, network):
        pass

    def place(self):
        return place()

    def update_weights(self, iteration, weightrefs, passed_on=()):
        pass

    def compute_grad(self, iteration, refs, keep_probability, dropout_seed):
        weights, *_ = ray.get(refs)
        return weights, 0.0

    def print_accuracy(self, iteration, refs):
        return np.array([0, 1])


def counters():
    """Bytes that each node's object manager has received and sent so far: int [nodes, 2]."""
    rows = []
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        found = re.findall(r'^ray_object_manager_bytes\{.*Type="(\w+)".*\} (\S+)$', text, re.M)
        received = sum(float(value) for kind, value in found if kind == "Received")
        pushed = sum(float(value) for kind, value in found if kind.startswith("PushedFromLocal"))
        rows.append((received, pushed))
    return np.array(rows)


def settled_counters():
    """The counters, once they stand still."""
    last, since = counters(), time.monotonic()
    while time.monotonic() - since < SETTLED:
        time.sleep(0.2)
        now = counters()
        if (now != last).any():
            last, since = now, time.monotonic()
    return last


def cpu_seconds():
    """CPU seconds so far of this process and of those that it has started: a dict by process id."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = {process.pid: ask(process.cpu_times, None) for process in processes}
    return {pid: taken.user + taken.system for pid, taken in times.items() if taken}


def measure(nodes, workers, one_set, args):
    """Run driver.py on so many nodes of so many workers; returns the number of the driver's node; of
    each iteration a dict of phase -> seconds, and the bytes: int [iterations, nodes, 2]; the MB of
    memory that a worker has; and the CPU ms of an iteration, of the driver and of all others."""
    import driver

    driver.NUM_WORKERS, driver.CPUS_PER_WORKER = workers * nodes, args.cpus
    driver.PRECISION, driver.LEARNING_RATE, driver.WEIGHT_DECAY = args.precision, 1e-30, 0.0
    if args.thin:
        (driver.LAYERS, driver.NUM_CLASSES), driver.MINI_BATCH = THIN_NETWORK, 1
    else:
        driver.MINI_BATCH, driver.ACCURACY_EVERY = MINI_BATCH, 10**9
    seconds, counts, memory, used = [], [], [], []
    # A worker maps the pages of the object store one by one, when it first writes to them.
    warm_up = WARM_UP + (0 if args.compute or args.thin else workers + SPARE)

    def stand_still(phases):
        seconds.append(phases)
        counts.append(settled_counters() if nodes > 1 else np.zeros((1, 2)))
        if len(seconds) in (warm_up, warm_up + args.iterations):
            used.append(cpu_seconds())
        if len(seconds) == warm_up:
            others = set(ray_workers(["Worker"]))
            memory.extend(private_memory(pid) for pid in set(ray_workers()) - others)

    store = int(1.2 * (workers + SPARE) * one_set)
    size = {"num_cpus": workers * args.cpus, "object_store_memory": max(store, LEAST_STORE)}
    with loopback() as s3:
        fill_bucket(s3, "scaling", images_per_class=60)
        quick = {"metrics_report_interval_ms": 500}
        machines = Cluster(initialize_head=True, head_node_args=size | {"_system_config": quick})
        for _ in range(nodes - 1):
            machines.add_node(**size)
        os.environ["RAY_ADDRESS"] = machines.address
        joining.join(driver.runtime_env(), None)
        head = [node["NodeID"] for node in ray.nodes()].index(ray.get_runtime_context().get_node_id())
        flags = ["--s3-bucket", "scaling", "--iterations", str(warm_up + args.iterations)]
        actor = functions.Worker if args.compute else Returner
        driver.main(flags, report=watch(stand_still), actor=actor)
        ray.shutdown()
        machines.shutdown()
    moved = np.diff(counts, axis=0)[-args.iterations :]
    before, after = used
    cpu = {pid: (after[pid] - before[pid]) / args.iterations for pid in before.keys() & after.keys()}
    cpu = 1000 * np.array([cpu.pop(os.getpid()), sum(cpu.values())])
    return head, seconds[-args.iterations :], moved, max(memory, default=0), cpu


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure what crosses between nodes.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--workers", type=int, nargs="+", default=[WORKERS], help="of a node")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--thin", action="store_true", help="calls and waits alone")
    parser.add_argument("--compute", action="store_true", help="workers that compute")
    parser.add_argument("--cpus", type=int, default=1, help="of a worker")
    parser.add_argument("--iterations", type=int, default=20)
    args = parser.parse_args()
    import alexnet

    network = THIN_NETWORK if args.thin else (alexnet.LAYERS, NUM_CLASSES)
    one_set = alexnet.set_bytes(*network, args.precision)
    print(f"A set of weights or gradients: {one_set / 1e6:.1f} MB")
    print(
        "Whole sets into and out of the driver's node, and of all nodes; MB of anything else; seconds"
    )
    print("nodes workers   into  out of    all  else, MB            an iteration  of it, by phase")
    for nodes, workers in itertools.product(args.nodes, args.workers):
        head, seconds, moved, memory, cpu = run_apart(measure, nodes, workers, one_set, args)
        into, out, everything = moved[:, head, 0], moved[:, head, 1], moved[:, :, 0].sum(axis=1)
        sets = [np.median(values // one_set) for values in (into, out, everything)]
        rest, taken = np.median(everything % one_set) / 1e6, [sum(p.values()) for p in seconds]
        phases = {phase: np.median([p[phase] for p in seconds]) for phase in seconds[0]}
        row = "{:5} {:7} {:6.0f} {:7.0f} {:6.0f} {:9.1f}".format(nodes, workers, *sets, rest)
        by_phase = ", ".join(f"{phase} {value:.3f}" for phase, value in phases.items())
        used = "; CPU ms {:.0f} and {:.0f}".format(*cpu) if args.thin else ""
        print(f"{row} {spread(taken, '.2f'):>23}  {by_phase}{used}", flush=True)
        if args.compute:
            speeds = [nodes * workers * MINI_BATCH / value for value in taken]
            print(
                f"{spread(speeds, '.1f')} images/s, a worker has {memory:.0f} MB of its own", flush=True
            )


if __name__ == "__main__":
    main()
