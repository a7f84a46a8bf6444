"""Standard output: whole lines, and on a terminal one progress bar that stays below them."""

import contextlib
import os
import sys
import threading

from tqdm import tqdm


def is_there():
    """Whether standard output is a terminal whose size is known."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(sys.stdout.fileno()).columns > 0
    return bool(sys.stdout) and sys.stdout.isatty()


def say(line):
    """Print a line, above the bar if there is one; what the output's encoding does not have is escaped.

    OSError where that fails. After a BrokenPipeError, all else that is printed is thrown away.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # The newline is part of the string: between two writes, another thread could print.
    data = f"{line}\n".encode(encoding, "backslashreplace")
    try:
        with Bar.external_write_mode(sys.stdout) if is_there() else contextlib.nullcontext():
            if sys.stdout is not sys.__stdout__ or sys.stdout is None:
                print(data.decode(encoding), end="", flush=True)
                return
            sys.stdout.flush()
            while data:  # not through its buffer, which would keep what a full disk refuses, and cut it
                data = data[os.write(sys.stdout.fileno(), data) :]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def bar(**options):
    """A bar of tqdm's on standard output, with its options; without a terminal, it shows nothing."""
    return Bar(file=sys.stdout, disable=not is_there(), dynamic_ncols=True, **options)


class Bar(tqdm):
    """A bar whose lock is free again after a signal: tqdm's own would keep other threads waiting."""

    _lock = threading.RLock()  # tqdm's name for it

    def refresh(self, nolock=False, lock_args=None):
        """Draw it."""
        with self.get_lock():
            super().refresh(nolock=True)
