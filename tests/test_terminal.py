"""What a user sees on a terminal: whole lines, and one bar below them. pyte draws its screen."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

from machinery import results
from tests.support import ROOT, VALIDATED, Screen, wait_until

import pyte

LINES = 24  # of the terminal


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
        self.resize(columns)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns):
        """Give it so many columns."""
        with self._lock:
            self.screen.resize(LINES, columns)
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))

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

    def wait_for(self, *forms):
        """Wait until the last lines have these forms; the last one of them."""

        def came():
            last = self.lines()[-len(forms) :]
            return len(last) == len(forms) and all(map(re.fullmatch, forms, last))

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


def test_a_bar_stays_below_whole_lines(one_ray, photos, tmp_path):
    """While a run trains, after a validation on a wider screen, and at Ctrl-C, which ends it."""
    settings = ["NUM_WORKERS=1", "VALIDATE_EVERY=30", "PAUSES=[(7, 'apply'), (33, 'apply')]"]
    settings.append(f"NOTES='{tmp_path}'")
    flags = ["--s3-bucket", photos, *VALIDATED, "--iterations", 100_000]
    with on_terminal(80, one_ray, *settings, *flags) as terminal:
        for done, columns in (7, 80), (33, 200):
            form = rf"  0%\|[^|]*\| {done}/100000 \[\d+:\d\d:\d\d left, {SPEED}\]"
            bar = terminal.wait_for(f"Paused after apply of iteration {done}", form)
            assert columns - 2 <= len(bar) <= columns
            terminal.resize(200)
            terminal.type("\n")
        terminal.wait_for(r"Iteration [4-9]\d: .*", ".*")
        terminal.type("\x03")
        assert terminal.wait() == 128 + signal.SIGINT
        lines = terminal.lines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("Iteration 0: "))
    assert re.fullmatch(r"Stopped at iteration \d+: nothing is saved", lines[-1])
    done = []
    for line in lines[begin:-1]:
        assert any(re.fullmatch(form, line) for form in WHOLE), line
        done += re.findall(r"^Iteration (\d+): loss", line)
    assert done == [str(number) for number in range(len(done))]
    assert "Iteration 30 (epoch 1.2): validation" in "\n".join(lines)


TWO_THREADS = """
import sys, threading
from machinery.storage import terminal
sys.setswitchinterval(1e-6)  # seconds that a thread goes on
say = lambda line: [terminal.say(line) for _ in range(5000)]
threads = [threading.Thread(target=say, args=[letter * 40]) for letter in "ab"]
[thread.start() for thread in threads]
"""


def test_lines_of_several_threads_stay_whole():
    command = [sys.executable, "-u", "-c", TWO_THREADS]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(out.splitlines()) == ["a" * 40] * 5000 + ["b" * 40] * 5000


def test_without_a_last_iteration_the_bar_says_the_time_since_the_start():
    with contextlib.redirect_stdout(Screen()) as screen:
        report = results.Report()
        report.epoch = 10
        report.start(0, [], None)
        report.lap("compute")
        report.iteration(0, [2.0, 3.0], 40, 1.0, 0.1)
        report.close()
    bar = screen.getvalue().split("\n")[-1].split("\r")
    assert any(
        re.fullmatch(r"1 iterations \[00:\d\d elapsed, \d+\.\d images/s, loss 2\.500\]", b) for b in bar
    )
    assert bar[-1] == "" and not bar[-2].strip()  # and then it is gone


def test_a_lost_worker_and_a_validation_do_not_move_the_time_left(capsys):
    """Elsewhere than on a terminal, accuracies say it."""
    report = results.Report()
    report.last, report.epoch = 1000, 10
    report.start(0, [], None)
    for iteration in range(10):
        report.accuracy(iteration, 0.5)
        time.sleep(1 if iteration == 7 else 0.05)  # the mean would give 150 s
        report.lap("compute")
        report.iteration(iteration, [1.0], 40, 1.0, 0.1)
        time.sleep(0.2)  # as validations do; this would give 250 s
        report.resume()
    said = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    assert said[0] == "Iteration 0: accuracy = 50.0%"
    minutes, seconds = re.fullmatch(
        r"Iteration 9: accuracy = 50.0%, 0:0(\d):(\d\d) left", said[9]
    ).groups()
    assert 49 <= 60 * int(minutes) + int(seconds) < 120
