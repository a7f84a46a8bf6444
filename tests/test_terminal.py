"""What a user sees on a terminal: whole lines, and one bar below them. pyte draws its screen."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading

import pyte

from tests.support import ROOT, wait_until
from tests.test_evaluation import VALIDATED

LINES = 24


class Terminal:
    """A program on a terminal of its own, and what its screen has shown so far."""

    def __init__(self, command, environment, columns):
        """Start it."""
        self._lock = threading.Lock()
        self.screen = pyte.HistoryScreen(columns, LINES, history=10_000)
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, environment)
        settings = termios.tcgetattr(self._master)
        settings[3] &= ~termios.ECHO  # of what a test types
        termios.tcsetattr(self._master, termios.TCSANOW, settings)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        stream = pyte.ByteStream(self.screen)
        with contextlib.suppress(OSError):  # the program has ended
            while data := os.read(self._master, 65536):
                with self._lock:
                    stream.feed(data)

    def type(self, text):
        """Type something."""
        os.write(self._master, text.encode())

    def lines(self):
        """All lines so far, with the parts of those that are longer than the screen put together."""
        with self._lock:
            columns, above = range(self.screen.columns), self.screen.history.top
            rows = ["".join(row[x].data for x in columns) for row in above] + self.screen.display
        text = "".join(row if row[-1] != " " else f"{row.rstrip()}\n" for row in rows)
        return text.rstrip().split("\n")

    def wait_for(self, start):
        """Wait until a line starts so; the last line."""

        def came():
            return any(line.startswith(start) for line in self.lines())

        wait_until(lambda: came() or not self._reader.is_alive(), 120)
        assert came()
        return self.lines()[-1]

    def wait(self):
        """Wait for the end; the exit status."""
        self._reader.join(120)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self):
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self._master)


@contextlib.contextmanager
def on_terminal(columns, address, *arguments):
    """thin_driver.py on a terminal, on the Ray at an address. Its lines are printed at the end."""
    command = [sys.executable, str(ROOT / "tests" / "thin_driver.py"), *map(str, arguments)]
    environment = os.environ | {"TERM": "xterm", "RAY_ADDRESS": address}
    terminal = Terminal(command, environment, columns)
    try:
        yield terminal
    finally:
        terminal.close()
        print("\n".join(terminal.lines()))


SPEED = r"\d+\.\d images/s, loss \d\.\d{3}"
WHOLE = (  # every line but the bar's is one of these
    r"Iteration \d+: loss = \d\.\d{3}, \d+\.\d images/s, \d+\.\d\d s",
    r"Iteration \d+: accuracy = \d+\.\d%",
    r"Iteration \d+ \(epoch \d\.\d\): validation top-1 = \d+\.\d%, top-5 = \d+\.\d%",
    r"\d+ images: \w{64}",
    r"Paused after .*",
)


def test_a_bar_stays_below_whole_lines(one_ray, photos):
    """While a run trains, after a validation, and at Ctrl-C, which ends it."""
    settings = ["NUM_WORKERS=1", "VALIDATE_EVERY=30", "PAUSES=[(7, 'apply'), (33, 'apply')]"]
    flags = ["--s3-bucket", photos, *VALIDATED]
    bars = {  # by the columns of the terminal
        80: rf"  0%\|[^|]*\| DONE/100000 \[\d+:\d\d:\d\d left, {SPEED}\]",
        200: rf"DONE iterations \[00:\d\d elapsed, {SPEED}\]",
    }
    with (
        on_terminal(80, one_ray, *settings, *flags, "--iterations", 100_000) as narrow,
        on_terminal(200, one_ray, *settings, *flags) as wide,
    ):
        for done in 7, 33:
            for terminal in narrow, wide:
                bar = terminal.wait_for(f"Paused after apply of iteration {done}")
                columns = terminal.screen.columns
                assert re.fullmatch(bars[columns].replace("DONE", str(done)), bar)
                assert len(bar) <= columns
                terminal.type("\n")
        for terminal in narrow, wide:
            terminal.wait_for("Iteration 40: ")
            terminal.type("\x03")
        for terminal in narrow, wide:
            assert terminal.wait() == 128 + signal.SIGINT
            check_lines(terminal.lines())


def check_lines(lines):
    """All that is on the screen are whole lines; those of iterations are all there."""
    begin = next(number for number, line in enumerate(lines) if line.startswith("Iteration 0: "))
    assert re.fullmatch(r"Stopped at iteration \d+: nothing is saved", lines[-1])
    done = []
    for line in lines[begin:-1]:
        line = line.removeprefix("^C")
        assert any(re.fullmatch(form, line) for form in WHOLE), line
        done += re.findall(r"^Iteration (\d+): loss", line)
    assert done == [str(number) for number in range(len(done))]
    assert "Iteration 30 (epoch 1.2): validation" in "\n".join(lines)
