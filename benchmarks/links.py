"""Passing an object on, measured: from one node to others over links of a limited rate.

    sudo python benchmarks/links.py [--nodes 12] [--rate 400mbit] [--megabytes 50] [--repeats 7]

Each Ray node runs in a network namespace of its own on this machine, whose link `tc` limits in both
directions (--rate is as tc writes it). `Helpers.pass_on` takes turns with fetching by all nodes at
once. Needs root, `ip` and `tc`. With --inside it only measures, in the first namespace.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measuring import read_flags, spread, take_turns

NETWORK, PORT = "10.77.0", 6399
SIZE = "--num-cpus=1 --object-store-memory=600000000 --disable-usage-stats"


def run(command, must=True):
    """Run a command line, which must not fail: RuntimeError with what it printed."""
    ended = subprocess.run(command.split(), capture_output=True, text=True)
    if must and ended.returncode:
        raise RuntimeError(f"{command}: {ended.stdout}{ended.stderr}")
    return ended.stdout


@contextlib.contextmanager
def namespaces(count, rate):
    """Namespaces links0 and so on, with the addresses NETWORK.1 and so on, on a bridge; all that runs
    in them is ended."""
    limit = f"root tbf rate {rate} burst 1mb latency 100ms"
    try:
        run("ip link add links-bridge type bridge")
        run("ip link set links-bridge up")
        for number in range(count):
            here = f"ip netns exec links{number}"
            run(f"ip netns add links{number}")
            run(f"ip link add out{number} type veth peer name in{number}")
            run(f"ip link set in{number} netns links{number}")
            run(f"ip link set out{number} master links-bridge up")
            run(f"{here} ip addr add {NETWORK}.{number + 1}/24 dev in{number}")
            run(f"{here} ip link set in{number} up")
            run(f"{here} ip link set lo up")
            run(f"{here} tc qdisc add dev in{number} {limit}")
            run(f"tc qdisc add dev out{number} {limit}")
        yield
    finally:
        for number in range(count):
            run(f"kill -9 {run(f'ip netns pids links{number}', must=False)}", must=False)
            run(f"ip netns del links{number}", must=False)
        run("ip link del links-bridge", must=False)


def start_nodes(count, folder):
    """Start a Ray node in each namespace; the first one is the head."""
    ray = Path(sys.executable).with_name("ray")
    for number in range(count):
        head = f"--head --port={PORT} --include-dashboard=false"
        role = f"--address={NETWORK}.1:{PORT}" if number else head
        place = f"--node-ip-address={NETWORK}.{number + 1} --temp-dir={folder}/{number}"
        run(f"ip netns exec links{number} {ray} start {role} {place} {SIZE}")


def measure(megabytes, repeats):
    """In the first namespace: print the seconds that an object takes to all other nodes."""
    import driver
    import functions
    from machinery.cluster import joining, nodes
    from machinery.cluster.helpers import Helpers

    import numpy as np
    import ray

    os.environ["RAY_ADDRESS"] = f"{NETWORK}.1:{PORT}"
    joining.join(driver.runtime_env(), None)
    helpers = Helpers(functions.Helper)
    others = [node["NodeID"] for node in nodes.head.nodes() if node["NodeID"] != helpers.here]
    ray.get([helpers.on(node).fetch.remote([], []) for node in others])

    def seconds(way):
        ref = ray.put(np.ones(megabytes * 10**6, np.uint8))
        start = time.perf_counter()
        ray.get(way(ref))
        taken = time.perf_counter() - start
        del ref
        time.sleep(1)  # for the object stores to free it
        return taken

    ways = {
        "passed on": lambda ref: [*helpers.pass_on(ref, others).values()],
        "all at once": lambda ref: [helpers.on(node).fetch.remote([ref], []) for node in others],
    }
    taken = take_turns({name: partial(seconds, way) for name, way in ways.items()}, repeats)
    for name, values in taken.items():
        print(f"{name:12} {spread(values)} s to {len(others)} nodes", flush=True)
    print("ratio:", spread(np.divide(taken["passed on"], taken["all at once"])))


def main():
    """Set up the nodes, and measure in a process on the first one."""
    flags = {"nodes": 12, "rate": "400mbit", "megabytes": 50, "repeats": 7, "inside": False}
    args = read_flags(__doc__, **flags)
    if args.inside:
        measure(args.megabytes, args.repeats)
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-benchmark-alone-0123456789abc"}
    with tempfile.TemporaryDirectory() as folder, namespaces(args.nodes, args.rate):
        start_nodes(args.nodes, folder)
        inside = [sys.executable, *sys.argv, "--inside"]
        subprocess.run(["ip", "netns", "exec", "links0", *inside], check=True)


if __name__ == "__main__":
    main()
