"""Which Ray a run is on: a cluster that it joins, or one of its own that it starts.

This is the only file that uses private names of Ray.
"""

import contextlib
import json
import os
import platform
import re
import secrets
import threading
from pathlib import Path

from machinery.cluster import nodes
from machinery.errors import ClusterError, one_line, say, silent_stderr

import ray
from ray._private.utils import read_ray_address
from ray._raylet import GcsClient

# Ray has tokens from version 2.52 on.
AuthenticationError = getattr(ray.exceptions, "AuthenticationError", ())


class Cluster(contextlib.ExitStack):
    """The Ray that a run is on, until the end of a `with`; what is entered into it ends before it."""

    def __init__(self, actor, can_grow):
        super().__init__()
        self.actor = actor  # the class of the workers
        self.can_grow = can_grow  # an autoscaler may add nodes


def join(runtime_env, actor, held=contextlib.nullcontext, **start_options):
    """Join the Ray cluster that `find_address` names, or start one: a Cluster.

    A Ray that this process has started already is taken as it is. `runtime_env` brings the project's
    modules to every node. Ray can crash if its start is interrupted: it is within a `held()`.
    `start_options` are for a cluster that it starts.
    """
    nodes.head, nodes.places = nodes.Head(), nodes.Places()
    nodes.modules.clear()
    if ray.is_initialized():
        if not {"py_modules", "working_dir"}.intersection(ray.get_runtime_context().runtime_env):
            if len(nodes.head.nodes()) > 1:
                hint = "start Ray by ray.init(runtime_env=driver.runtime_env()), with your address"
                raise ClusterError(f"the nodes of this Ray do not have driver.py's modules: {hint}")
            here = str(Path(runtime_env["py_modules"][0]).parent)
            nodes.modules["runtime_env"] = {"env_vars": {"PYTHONPATH": here}}
        return Cluster(actor, can_grow=True)
    address = find_address()
    own = address == "local"
    options = {"include_dashboard": False} | start_options if own else {}
    options |= {"logging_level": "ERROR", "log_to_driver": False, "runtime_env": runtime_env}
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # the run says in a line what Ray says in twenty
    if own and not os.access(Path(os.environ.get("HOME", "/"), ".ray"), os.W_OK):
        # Ray would write a token there, but a container's user can lack a home, or not write to it.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
    with held():
        try:
            with contextlib.nullcontext() if own else _silent_core():
                ray.init(address, **options)
        except Exception as error:  # of another version, no node here, a path that is too long, ...
            ray.shutdown()
            joined = f"the Ray cluster at {address} cannot be joined"
            what = "Ray does not start here" if own else joined
            hint = "; in TMPDIR, name a folder with a short path that can be written"
            hint = hint if own and isinstance(error, OSError) else ""
            why = "" if own else _other_versions(address)
            raise ClusterError(f"{what}: {why or one_line(error)[:300]}{hint}") from error
    cluster = Cluster(actor, can_grow=not own)
    cluster.callback(ray.shutdown)
    return cluster


def find_address():
    """The address of the Ray cluster to join, or "local" for a Ray of one's own.

    RAY_ADDRESS names it, or else the last `ray start` here: a program's own Ray ends with the program.
    ClusterError if there is none where RAY_ADDRESS says.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return named
    if named not in ("", "auto"):
        if not re.fullmatch(r"(\[.*\]|[^:/]+):\d{1,5}", named):
            hint = "name the cluster's own address, HOST:6379 (http:// is for `ray job submit` alone)"
            raise ClusterError(f"RAY_ADDRESS={one_line(named)}: {hint}")
        if not _answers(named):
            hint = f"check it, and that Ray {ray.__version__} runs there"  # another one may not answer
            raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS={named}: {hint}")
        return named
    started = read_ray_address()  # `ray start` writes it down, and `ray.init` does not
    if started and _answers(started):
        say(f"Joining the Ray cluster at {started}, which `ray start` has started here")
        return started
    if named:
        raise ClusterError("RAY_ADDRESS=auto: no Ray that `ray start` has started runs here")
    if started:
        gone = f"The Ray cluster at {started}, which `ray start` has started here, does not answer"
        say(f"{gone}: this run has a Ray of its own (`ray stop` forgets the other one)")
    return "local"


def _answers(address):
    """Whether a Ray cluster's head answers at an address. Ray itself would try for 14 minutes.

    ClusterError if it wants a token, as clusters of `ray start` do.
    """
    if not nodes.is_open(address):
        return False

    def ask_head():
        try:
            answers.append(GcsClient(address=address).get_all_node_info(timeout=nodes.ANSWER))
        except Exception as error:  # no answer is one, too
            answers.append(error)

    answers, asking = [], threading.Thread(target=ask_head, daemon=True)
    with _silent_core():
        asking.start()
        asking.join(nodes.ANSWER)
    if any(isinstance(answer, AuthenticationError) for answer in answers):
        hint = "export RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token"
        raise ClusterError(f"the Ray cluster at {address} refuses this run: {hint}")
    return not all(isinstance(answer, Exception) for answer in answers)


def _other_versions(address):
    """What to say of a cluster that has another Ray or Python than this process has; empty if none."""
    with contextlib.suppress(Exception), _silent_core():  # the head may be gone
        key = {"key": b"CLUSTER_METADATA", "namespace": b"cluster", "timeout": nodes.ANSWER}
        cluster = json.loads(GcsClient(address=address).internal_kv_get(**key))
        there = f"Ray {cluster['ray_version']} and Python {cluster['python_version']}"
        here = f"Ray {ray.__version__} and Python {platform.python_version()}"
        if there != here:
            hint = "run driver.py with those of the cluster, or as a job there (`ray job submit`)"
            return f"it has {there}, and this program {here}: {hint}"
    return ""


@contextlib.contextmanager
def _silent_core():
    """Have the part of Ray in C++ that starts in this process say nothing of the cluster's faults."""
    level = os.environ.get("RAY_BACKEND_LOG_LEVEL")
    os.environ["RAY_BACKEND_LOG_LEVEL"] = level or "fatal"
    try:
        with silent_stderr():  # or it would say that there is a level
            yield
    finally:
        if not level:  # processes of a Ray that is started here write their logs as usual
            del os.environ["RAY_BACKEND_LOG_LEVEL"]
