"""What can be wrong with a run's input and surroundings, each in one line; and what it says."""

import contextlib
import logging
import os
import re

say = logging.getLogger("driver").info  # a line of the run, see results.Report.lines
MAX_NAMED = 5  # of many things that a line names; the others are only counted


class InputError(Exception):
    """Input that cannot be used. The message is one line: what, in which bucket and key, what to do."""


class ClusterError(Exception):
    """A cluster that cannot be joined, or on which workers do not stay up. The message is one line."""


class ImageError(Exception):
    """Bytes that are no usable image; the message says why."""


class NotSaved(Exception):  # noqa: N818, it is an outcome as well as an error
    """All iterations are made, but not all that was asked for is saved. The message says what."""


def one_line(text):
    """Any text on one printable ASCII line: names from tars can hold newlines and escape codes."""
    return re.sub("[^ -~]", lambda char: ascii(char[0])[1:-1], " ".join(str(text).split()))


@contextlib.contextmanager
def silent_stderr():
    """Drop for a while what comes to file descriptor 2: C++ libraries write there at any log level."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
