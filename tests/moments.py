"""A report that does things at moments of a run."""

from machinery import results


class At(results.Report):
    """Does things at moments: a dict of (iteration, phase) or of the start of a line -> function."""

    def __init__(self, moments):
        super().__init__()
        self.moments, self.now = moments, None

    def start(self, iteration, *data):
        super().start(iteration, *data)
        self.now = iteration

    def say(self, line):
        super().say(line)
        for moment in [m for m in self.moments if isinstance(m, str) and line.startswith(m)]:
            self.moments.pop(moment)()

    def lap(self, phase):
        super().lap(phase)
        self.moments.pop((self.now, phase), lambda: None)()

    def iteration(self, iteration, *numbers):
        super().iteration(iteration, *numbers)
        self.now = iteration + 1
