"""Failpoints that are switched on one at a time, in processes that run already.

Every process of a cluster gets all of them, each with a file that keeps it from acting. To arm a
point its file is removed; whoever comes there first makes it anew and acts, so that the file also
tells that it happened.
"""

from pathlib import Path

from app.failpoints import VARIABLE, Point
from tests.faults.summary import count
from tests.system.service import until


class Failpoints:
    """``environment`` is for the processes; ``action`` as app.failpoints takes it."""

    def __init__(self, folder: Path, action: str = "kill") -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._action = action
        entries = "; ".join(f"{point}={action}@{folder / point}" for point in Point)
        self.environment = {VARIABLE: entries}
        for point in Point:
            (folder / point).touch()

    def arm(self, point: Point) -> None:
        (self._folder / point).unlink()

    def disarm(self, point: Point) -> None:
        """For one that nobody came by."""
        (self._folder / point).touch()

    def has_fired(self, point: Point) -> bool:
        """Since it was armed."""
        return (self._folder / point).exists()

    def wait(self, point: Point, *, seconds: float = 30) -> None:
        """Until it has acted."""
        until(lambda: self.has_fired(point), seconds=seconds, every=0.005)
        count(f"failpoint {self._action.partition(':')[0]}")
