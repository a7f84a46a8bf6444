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

import contextlib
import itertools
import os
import re
import time
import urllib.request

import measuring
from measuring import WORKERS, spread

import functions
from machinery.cluster import joining
from machinery.cluster.nodes import ACTOR, Actor
from tests.support import THIN, workers_of

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster

THIN_NETWORK = THIN, 10  # layers and classes
MINI_BATCH = 20  # images: 3 MB
WARM_UP = 3  # iterations; without computing, one more for each set that the object store has room for
SPARE = 4  # sets that fit into a node's object store beside those of its workers
LEAST_STORE = 500 * 2**20  # bytes
LOOKS = 8  # in a row without a change, 0.2 s apart, after which counters are final


@ray.remote(**ACTOR)
class Returner(Actor):
    """A worker without a network: it returns the weights, which have the gradients' sizes."""

    def __init__(self, network):
        pass

    def update_weights(self, iteration, weightrefs, passed_on=()):
        pass

    def compute_grad(self, iteration, refs, keep_probability, dropout_seed):
        weights, *_ = ray.get(refs)
        return weights, 0.0

    def print_accuracy(self, iteration, refs):
        return np.array([0, 0, 1])


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
    seen = [counters()]
    while len(seen) < LOOKS or (seen[-1] != seen[-LOOKS]).any():
        time.sleep(0.2)
        seen.append(counters())
    return seen[-1]


def cpu_seconds():
    """CPU seconds so far of this process and of those that it has started: a dict by process id."""
    times = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it has ended
            times[process.pid] = sum(process.cpu_times()[:2])  # user and system
    return times


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
    seconds, counts, memory, used = [], [], [0], []
    # A worker maps the pages of the object store one by one, when it first writes to them.
    warm_up = WARM_UP + (0 if args.compute or args.thin else workers + SPARE)

    def stand_still(moments):
        seconds.append(measuring.phases(moments))
        counts.append(settled_counters() if nodes > 1 else np.zeros((1, 2)))
        if len(seconds) in (warm_up, warm_up + args.iterations):
            used.append(cpu_seconds())
        if len(seconds) == warm_up:
            memory.extend(measuring.private_memory(worker.pid) for worker in workers_of(os.getpid()))

    store = max(int(1.2 * (workers + SPARE) * one_set), LEAST_STORE)
    size = {"num_cpus": workers * args.cpus, "object_store_memory": store}
    with measuring.small_bucket(images_per_class=60) as flags:
        quick = {"metrics_report_interval_ms": 500}
        machines = Cluster(initialize_head=True, head_node_args=size | {"_system_config": quick})
        for _ in range(nodes - 1):
            machines.add_node(**size)
        os.environ["RAY_ADDRESS"] = machines.address
        joining.join(driver.runtime_env(), None)
        head = [node["NodeID"] for node in ray.nodes()].index(ray.get_runtime_context().get_node_id())
        flags += ["--iterations", str(warm_up + args.iterations)]
        actor = functions.Worker if args.compute else Returner
        driver.main(flags, report=measuring.watch(stand_still), actor=actor)
        ray.shutdown()
        machines.shutdown()
    moved = np.diff(counts, axis=0)[-args.iterations :]
    before, after = used
    cpu = {pid: (after[pid] - before[pid]) / args.iterations for pid in before.keys() & after.keys()}
    cpu = 1000 * np.array([cpu.pop(os.getpid()), sum(cpu.values())])
    return head, seconds[-args.iterations :], moved, max(memory), cpu


def main():
    """Measure and print the table."""
    flags = {"nodes": [1, 2, 4, 8], "workers": [WORKERS], "precision": measuring.PRECISIONS}
    flags |= {"thin": False, "compute": False, "cpus": 1, "iterations": 20}
    args = measuring.read_flags(__doc__, **flags)
    import alexnet

    network = THIN_NETWORK if args.thin else (alexnet.LAYERS, 1000)
    one_set = alexnet.set_bytes(*network, args.precision)
    print(f"Sets of {one_set / 1e6:.1f} MB, of the driver's node and all; MB of anything else; seconds")
    print("nodes workers   into  out of    all  else, MB            an iteration  of it, by phase")
    for nodes, workers in itertools.product(args.nodes, args.workers):
        what = nodes, workers, one_set, args
        head, seconds, moved, memory, cpu = measuring.run_apart(measure, *what)
        into, out, everything = moved[:, head, 0], moved[:, head, 1], moved[:, :, 0].sum(axis=1)
        sets = [np.median(values // one_set) for values in (into, out, everything)]
        rest, taken = np.median(everything % one_set) / 1e6, [sum(p.values()) for p in seconds]
        phases = {phase: np.median([p[phase] for p in seconds]) for phase in seconds[0]}
        row = "{:5} {:7} {:6.0f} {:7.0f} {:6.0f} {:9.1f}".format(nodes, workers, *sets, rest)
        by_phase = ", ".join(f"{phase} {value:.3f}" for phase, value in phases.items())
        used = "; CPU ms {:.0f} and {:.0f}".format(*cpu) if args.thin else ""
        print(f"{row} {spread(taken, '.2f'):>23}  {by_phase}{used}", flush=True)
        if args.compute:
            speed = spread([nodes * workers * MINI_BATCH / value for value in taken], ".1f")
            print(f"{speed} images/s, a worker has {memory:.0f} MB of its own", flush=True)


if __name__ == "__main__":
    main()
