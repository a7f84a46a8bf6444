"""Passing an object on, measured: from one node to others over links of a limited rate.

    sudo python benchmarks/links.py [--nodes 12] [--rate 400mbit] [--megabytes 50] [--repeats 7]

Each Ray node runs in a network namespace of its own on this machine, whose link `tc` limits in both
directions. `Helpers.pass_on` takes turns with fetching by all nodes at once. Needs root, `ip` and `tc`.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import spread

NETWORK, PORT = "10.77.0", 6399


def run(command):
    """Run a command line; RuntimeError with what it printed if it fails."""
    ended = subprocess.run(command.split(), capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{command}: {ended.stdout}{ended.stderr}")
    return ended.stdout


def namespace(number):
    """A namespace's name."""
    return f"links{number}"


@contextlib.contextmanager
def namespaces(count, rate):
    """Namespaces with addresses NETWORK.1 and so on, on a bridge; all that runs in them is ended."""
    limit = f"root tbf rate {rate} burst 1mb latency 100ms"
    try:
        run("ip link add links-bridge type bridge")
        run("ip link set links-bridge up")
        for number in range(count):
            here = f"ip netns exec {namespace(number)}"
            run(f"ip netns add {namespace(number)}")
            run(f"ip link add out{number} type veth peer name in{number}")
            run(f"ip link set in{number} netns {namespace(number)}")
            run(f"ip link set out{number} master links-bridge up")
            run(f"{here} ip addr add {NETWORK}.{number + 1}/24 dev in{number}")
            run(f"{here} ip link set in{number} up")
            run(f"{here} ip link set lo up")
            run(f"{here} tc qdisc add dev in{number} {limit}")
            run(f"tc qdisc add dev out{number} {limit}")
        yield
    finally:
        for number in range(count):
            with contextlib.suppress(RuntimeError):
                run(f"ip link del out{number}")
            with contextlib.suppress(RuntimeError):
                for pid in run(f"ip netns pids {namespace(number)}").split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                run(f"ip netns del {namespace(number)}")
        with contextlib.suppress(RuntimeError):
            run("ip link del links-bridge")


def start_nodes(count, folder):
    """Start a Ray node in each namespace; the first one is the head."""
    ray = Path(sys.executable).with_name("ray")
    size = "--num-cpus=1 --object-store-memory=600000000 --disable-usage-stats"
    for number in range(count):
        role = f"--address={NETWORK}.1:{PORT}" if number else f"--head --port={PORT}"
        role += "" if number else " --include-dashboard=false"
        place = f"--node-ip-address={NETWORK}.{number + 1} --temp-dir={folder}/{number}"
        run(f"ip netns exec {namespace(number)} {ray} start {role} {place} {size}")


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
    ways = {
        "passed on": lambda ref: [there for there in helpers.pass_on(ref, others).values() if there],
        "all at once": lambda ref: [helpers.on(node).fetch.remote([ref], []) for node in others],
    }
    seconds = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, way in ways.items():
            ref = ray.put(np.full(megabytes * 10**6, repeat, np.uint8))
            start = time.perf_counter()
            ray.get(way(ref))
            seconds[name] += [time.perf_counter() - start] if repeat else []
            del ref
            time.sleep(1)  # for the object stores to free it
    for name, values in seconds.items():
        print(f"{name:12} {spread(values)} s to {len(others)} nodes", flush=True)
    print("ratio:", spread(np.divide(seconds["passed on"], seconds["all at once"])))


def main():
    """Set up the nodes, and measure in a process on the first one."""
    parser = argparse.ArgumentParser(description="Measure passing an object on over limited links.")
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--rate", default="400mbit", help="of each link, as tc writes it")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        measure(args.megabytes, args.repeats)
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-benchmark-alone-0123456789abc"}
    folder = tempfile.mkdtemp()
    try:
        with namespaces(args.nodes, args.rate):
            start_nodes(args.nodes, folder)
            inside = f"ip netns exec {namespace(0)} {sys.executable} {__file__} --inside"
            options = f"--megabytes {args.megabytes} --repeats {args.repeats}"
            subprocess.run(f"{inside} {options}".split(), check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
