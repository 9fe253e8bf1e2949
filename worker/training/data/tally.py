"""How far the rows are, told while they are read; and whether they are still wanted."""

import time

from worker.training.errors import Stopped
from worker.training.reporter import Control, Reporter

SECONDS = 1.0  # between two messages


class Tally:
    """Counts rows, and is asked at every one whether to go on.

    Args:
        reporter: Hears of it about once a second, whether rows have come or not.
        control: Is asked whether to stop.

    Attributes:
        done: Rows so far.
        total: Of how many; None while that is not known.
    """

    def __init__(self, reporter: Reporter | None = None, control: Control | None = None) -> None:
        self._reporter = reporter
        self._control = control
        self._told_at = time.monotonic()
        self.done = 0
        self.total: int | None = None

    def begin(self, total: int | None = None) -> None:
        """Count anew."""
        self.done, self.total = 0, total
        self.proceed()

    def row(self) -> None:
        """One row more is done."""
        self.done += 1
        self.proceed()

    def proceed(self) -> None:
        """Say how far it is, if it is time to.

        Raises:
            Stopped: If somebody wishes so.
        """
        if self._control and (wish := self._control.wish()):
            raise Stopped(wish)
        now = time.monotonic()
        if self._reporter and now >= self._told_at + SECONDS:
            self._told_at = now
            self._reporter.rows(self.done, self.total)
