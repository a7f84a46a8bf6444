"""How a run ends: by signals, by an error that is one line, with an exit status."""

import contextlib
import os
import signal
import sys
import threading

from machinery.cluster.nodes import first_line
from machinery.errors import ClusterError, InputError, NotSaved

from ray import exceptions


class Stop:
    """What SIGINT, SIGTERM and SIGHUP do in a `with`: they raise KeyboardInterrupt, with their number.

    While the run is `held`, they wait; in a thread, they are not its. Errors of Ray become one line.
    """

    def __init__(self):
        self._signum, self._held, self._before = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            self._before = {number: signal.getsignal(number) for number in numbers}
            if self._before[signal.SIGHUP] == signal.SIG_IGN:
                del self._before[signal.SIGHUP]  # nohup: the run outlives its terminal
        self._answer(self._on_signal)
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, SystemExit):  # while it starts, Ray answers SIGTERM so
            raise KeyboardInterrupt(error.code) from error
        if isinstance(error, KeyboardInterrupt) and self._signum:
            error.args = (self._signum,)  # out of Ray's waits comes another one, which has none
        if line := _explain(error):
            raise line from error

    def _answer(self, handler):
        for number in self._before:
            signal.signal(number, handler)

    def _on_signal(self, signum, frame):
        """A second signal does not wait for anything."""
        again, self._signum = self._signum, signum
        if again or not self._held:
            raise KeyboardInterrupt(signum)  # no other exception comes out of Ray's waits

    @contextlib.contextmanager
    def held(self):
        """What must not be left halfway: a signal that comes meanwhile stops the run at its end."""
        before, self._held = self._signum, True
        try:
            yield
        finally:
            self._held = False
            self._answer(self._on_signal)  # again: Ray's start sets a handler of its own
        if self._signum != before:
            raise KeyboardInterrupt(self._signum)

    def ignore(self):
        """The end takes a moment, and is not interrupted."""
        self._answer(signal.SIG_IGN)


def _explain(error):
    """An error of one line: what an error of Ray means, or the cause of a task's; None for others."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, exceptions.OutOfDiskError | exceptions.ObjectStoreFullError):
        hint = "free the disk that Ray spills to, add nodes, or train on fewer tars (--key-prefix)"
        return ClusterError(f"a node's object store and disk are full: {hint}")
    if isinstance(cause, exceptions.OutOfMemoryError):
        hint = "free memory on the nodes, or add nodes"
        return ClusterError(f"Ray ends every task because memory is short: {hint}")
    if isinstance(error, exceptions.RayTaskError) and isinstance(cause, InputError | ClusterError):
        return cause
    if isinstance(cause, exceptions.RayError) and not isinstance(cause, exceptions.RayTaskError):
        return ClusterError(f"Ray cannot go on: {first_line(cause)}")
    return None


def status(run):
    """Run a program's main function; the exit status, which tells how it has ended (see README.md)."""
    try:
        run()
    except KeyboardInterrupt as end:
        return 128 + (end.args[0] if end.args else signal.SIGINT)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except NotSaved:
        return 3
    except (InputError, ClusterError) as error:
        with contextlib.suppress(OSError, AttributeError):  # standard error may be closed, or full
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
        return 2
    return 0


def leave(status):
    """End the process at once: a save that a second signal has given up may still wait for S3."""
    with contextlib.suppress(OSError, AttributeError):  # it may be closed
        sys.stdout.flush()
    os._exit(status)
