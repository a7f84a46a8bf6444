"""Standard output: whole lines, and on a terminal one progress bar that stays below them."""

import contextlib
import os
import sys

from tqdm import tqdm


def is_there():
    """Whether standard output is a terminal."""
    return bool(sys.stdout) and sys.stdout.isatty()


def say(line):
    """Print a line, above the bar if there is one; what the output's encoding does not have is escaped.

    Once that fails, which raises OSError, all else that is printed is thrown away.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    above = tqdm.external_write_mode(sys.stdout) if is_there() else contextlib.nullcontext()
    try:
        with above:
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def bar(**options):
    """A bar of tqdm's on standard output, with its options; without a terminal, it shows nothing."""
    return tqdm(file=sys.stdout, disable=not is_there(), dynamic_ncols=True, **options)
