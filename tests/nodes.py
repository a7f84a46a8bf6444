"""Ray clusters of several nodes on this machine, whose nodes die and are replaced."""

import contextlib
import os
import sys
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from tests.support import WARM, Run, titled, wait_until

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
        self.address, self.others = self.cluster.address, []
        for _ in range(others):
            self.add()

    def add(self, **options):
        """Start another node; `options` are Ray's."""
        self.others.append(self.cluster.add_node(num_cpus=self.cpus, **STORE, **UNSEEN, **options))
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
    def with_cpuinfo(self, cpus, path):
        """One more node for a while, whose processes read a file instead of /proc/cpuinfo."""
        ray = Path(sys.executable).with_name("ray")
        options = f"--num-cpus={cpus} --object-store-memory={STORE['object_store_memory']} --block"
        start = f"mount --bind {path} /proc/cpuinfo && {ray} start --address={self.address} {options}"
        run = Run([*OWN_MOUNTS, "sh", "-c", start], os.environ)
        try:
            run.wait_for("Ray runtime started", 60)  # two that start at once can time out
            yield psutil.Process(run.pid)
        finally:
            kill(psutil.Process(run.pid))
            run.kill()

    def close(self):
        """End the cluster."""
        self.cluster.shutdown()


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
