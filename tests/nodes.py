"""Ray clusters of several nodes on this machine, whose nodes die and are replaced."""

import contextlib
import itertools
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import WARM, Run, titled, wait_until

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _initialize_internal_kv

UNSEEN = {"include_dashboard": False, "include_log_monitor": False}  # no test here looks at them
STORE = {"object_store_memory": 80 * 2**20}

# What runs after this can mount something that no other process sees.
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


class Nodes:
    """A cluster of a head and other nodes, each with a small object store of its own.

    `others` are the nodes beside the head, oldest first. A head without CPUs is KubeRay's way; in
    cluster.yaml it has some.
    """

    def __init__(self, head_cpus, others, cpus, **options):
        """Start a head of so many CPUs, and so many others of `cpus` each; `options` are the head's."""
        # Ray looks often whether a node answers, and so misses a dead one in seconds.
        look = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}
        look |= WARM
        head = {"num_cpus": head_cpus, "_system_config": look} | STORE | UNSEEN | options
        self.cluster, self.cpus = Cluster(initialize_head=True, head_node_args=head), cpus
        # Ray would handle signals for each node; a thread that starts one may not, and the head does.
        self.cluster._shutdown_at_exit = False
        self.address, self.others = self.cluster.address, []
        self.folder, self.numbers = tempfile.TemporaryDirectory(), itertools.count()
        self.add_all([{}] * others)

    def add_all(self, options):
        """Start nodes at the same time, one for each dict of Ray's options."""
        with ThreadPoolExecutor() as threads:
            self.others += threads.map(self._start, options)

    def _start(self, options):
        # Nodes that start at the same time would take the same names for their sockets.
        names = "raylet_socket_name", "plasma_store_socket_name"
        sockets = {name: f"{self.folder.name}/{next(self.numbers)}" for name in names}
        options = {"num_cpus": self.cpus} | sockets | STORE | UNSEEN | options
        return self.cluster.add_node(**options)

    def head(self):
        """The process of Ray that knows all nodes, actors and modules."""
        return psutil.Process(self.cluster.head_node.all_processes["gcs_server"][0].process.pid)

    def add(self, **options):
        """Start another node; `options` are Ray's."""
        self.add_all([options])
        return self.others[-1]

    def kill(self, number=0):
        """Kill one of the others with all that runs and lies on it, even what is stopped."""
        node = self.others.pop(number)
        kill(raylet_of(node))
        self.cluster.remove_node(node, allow_graceful=False)

    def replace(self, number=0, **options):
        """Kill one of the others, and start another one."""
        self.kill(number)
        return self.add(**options)

    @contextlib.contextmanager
    def with_proc(self, cpus, *folders):
        """One more node for each folder, for a while; its processes read the files there, such as
        cpuinfo, instead of those in /proc.

        Yields the first process of each node.
        """
        ray, runs = Path(sys.executable).with_name("ray"), []
        size = f"--num-cpus={cpus} --memory={2 * 2**30}"
        size += f" --object-store-memory={STORE['object_store_memory']}"
        for folder in folders:
            mounts = [f"mount --bind {path} /proc/{path.name}" for path in folder.iterdir()]
            options = f"{size} --temp-dir={self.folder.name}/{next(self.numbers)} --block"
            start = f"{ray} start --address={self.address} {options}"
            command = [*OWN_MOUNTS, "sh", "-c", " && ".join([*mounts, start])]
            runs.append(Run(command, os.environ))
        try:
            for run in runs:
                run.wait_for("Ray runtime started", 60)
            yield [psutil.Process(run.pid) for run in runs]
        finally:
            for run in runs:
                kill(psutil.Process(run.pid))
                run.kill()

    def close(self):
        """End the cluster, and let a Ray of this process find its own head again."""
        self.cluster.shutdown()
        if ray.is_initialized():  # this process has kept one head, that of the cluster, and now none
            _initialize_internal_kv(ray._private.worker.global_worker.gcs_client)
        self.folder.cleanup()


def raylet_of(node):
    """A node's process that has started all others."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def tree(process):
    """A process and those below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def kill(process):
    """Kill a process and all below it."""
    for each in tree(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def actors(node, kind):
    """The processes of the actors of a class on one of the `others`."""
    return titled(raylet_of(node).pid, f"ray::{kind}")


def actor(node, kind):
    """The process of an actor of a class on one of the `others`, once there is one."""
    return wait_until(lambda: actors(node, kind))[0]


def memory_monitor(spare=1.5):
    """The environment of a node on which Ray ends processes if so many GiB more are used than now."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + spare * 2**30) / memory.total
    return {"RAY_memory_usage_threshold": str(threshold), "RAY_memory_monitor_refresh_ms": "100"}


def use_memory_until(condition, most=3):
    """Use more and more memory, at most so many GiB, until a function returns true."""
    used = []
    while not condition():
        assert len(used) < 8 * most, "Ray's memory monitor did not strike"
        used.append(np.ones(2**24))
        time.sleep(0.3)
