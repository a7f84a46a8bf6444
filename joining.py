"""Which Ray a run is on: a cluster that it joins, or one of its own that it starts."""

import contextlib
import functools
import json
import os
import re
import socket
import tempfile
from pathlib import Path

import ray
from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
from ray._private.utils import read_ray_address
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError

from decoding import one_line
from watching import ANSWER, silent_stderr, within

# What runs on other nodes, too.
CARRIED_MODULES = (
    "adding",
    "alexnet",
    "decoding",
    "functions",
    "imagenet",
    "s3",
    "terminal",
    "watching",
)

CONNECT = 5  # seconds in which a process on a healthy node can be connected to


class ClusterError(Exception):
    """A cluster that cannot be joined, or on which workers do not stay up. The message is one line."""


def find_address(say):
    """The address of the Ray cluster to join, or "local" for a Ray of one's own.

    RAY_ADDRESS names it, or else the last `ray start` on this machine: a Ray that another program has
    started for itself ends with that program. ClusterError if there is none where RAY_ADDRESS says.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return "local"
    if named and named != "auto":
        if not re.fullmatch(r"(\[.*\]|[^:/]+):\d{1,5}", named):
            hint = "name the cluster's own address, HOST:6379 (http:// is for `ray job submit` alone)"
            raise ClusterError(f"RAY_ADDRESS={one_line(named)}: {hint}")
        if not _answers(named):
            raise ClusterError(f"no Ray cluster answers at RAY_ADDRESS={named}: check it")
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
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError, ValueError):  # no such port, or no name that a host can have
        return False

    def ask_head():
        try:
            return GcsClient(address=address).get_all_node_info(timeout=ANSWER)
        except AuthenticationError as error:
            return error

    with _silent_core():
        answers = within(ANSWER, ask_head)
    if any(isinstance(answer, AuthenticationError) for answer in answers):
        hint = "export RAY_AUTH_MODE=token, and have its token in ~/.ray/auth_token"
        raise ClusterError(f"the Ray cluster at {address} refuses this run: {hint}")
    return bool(answers)


def connect(address="local", **start_options):
    """Join the Ray cluster at an address (True), or start one (False); True if Ray runs here already.

    The runtime environment carries the project's modules to every node, and nothing else; none if this
    is a Ray job whose working directory brings them. `start_options` are for a cluster that it starts.
    """
    if ray.is_initialized():
        return True
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"  # the run says in a line what Ray says in twenty
    options = {"logging_level": "ERROR", "log_to_driver": False}
    options["runtime_env"] = {} if _brought() else {"py_modules": _modules()}
    own = address == "local"
    try:
        with contextlib.nullcontext() if own else _silent_core():
            more = {"include_dashboard": False} | start_options if own else {}
            ray.init(address, **options, **more)
    except Exception as error:  # of another version, without a node here, a path that is too long, ...
        ray.shutdown()
        what = "Ray does not start here" if own else f"the Ray cluster at {address} cannot be joined"
        raise ClusterError(f"{what}: {one_line(error)[:300]}") from error
    return not own


def _brought():
    """Whether this is a Ray job whose working directory holds the modules."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    return "working_dir" in job and Path(__file__).resolve().parent == Path.cwd()


def _modules():
    here = Path(__file__).resolve().parent
    return [str(here / f"{name}.py") for name in CARRIED_MODULES]


def carried():
    """Ray's options by which an actor or a task gets the project's modules.

    None are needed if `connect` has called `ray.init`. A notebook that has called it itself knew
    nothing of these modules.
    """
    context = ray.get_runtime_context()
    return _carried(context.gcs_address, context.get_job_id())


@functools.cache
def _carried(address, job):
    if _brought():
        return {}
    there = ray.get_runtime_context().runtime_env.get("py_modules", [])
    upload = {"py_modules": _modules()}, False, tempfile.gettempdir()
    ours = upload_py_modules_if_needed(*upload)["py_modules"]
    return {} if set(ours) <= set(there) else {"runtime_env": {"py_modules": [*there, *ours]}}


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
