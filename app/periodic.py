"""A duty that a thread does again and again, whatever happens to it in between."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import structlog

log = structlog.get_logger()

RECOVERY_SECONDS = 1.0
"""After a failure a nudge waits for so long: what has failed is not hammered."""


class Periodic:
    """Runs ``duty`` every so many seconds, and soon when nudged, while the block lasts."""

    def __init__(
        self, name: str, seconds: float, duty: Callable[[], Any], *, gather_seconds: float = 0
    ) -> None:
        """``gather_seconds``: from a nudge to the run, so that one run serves many nudges."""
        self._name = name
        self._seconds = seconds
        self._duty = duty
        self._gather_seconds = gather_seconds
        self._turn = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def nudge(self) -> None:
        self._turn.set()

    def __enter__(self) -> "Periodic":
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        self._turn.set()
        self._thread.join(5)  # it may hang on a dead network, and is a daemon

    def _run(self) -> None:
        is_well = True
        while not self._end.is_set():
            started = time.monotonic()
            try:
                self._duty()
            except Exception as error:  # an outage: of it one line, until it is over
                if is_well:
                    log.warning("a duty failed; trying again", duty=self._name, exc_info=error)
                is_well = False
                self._end.wait(min(RECOVERY_SECONDS, self._seconds / 2))
            else:
                if not is_well:
                    log.info("a duty works again", duty=self._name)
                is_well = True
            left = self._seconds - (time.monotonic() - started)
            # Not at once again where a duty takes longer than its interval.
            if self._turn.wait(max(left, self._seconds / 10)):
                self._end.wait(self._gather_seconds)
            self._turn.clear()
