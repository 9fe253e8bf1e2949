"""What to do while the database or the store is away: try again, for what has been worked for."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from app.db import OUTAGES
from app.storage import Outage
from worker.watch import Draining

log = structlog.get_logger()

Value = TypeVar("Value")

FIRST_WAIT, LONGEST_WAIT = 0.2, 5.0
LAST_TRIES_SECONDS = 20  # once the worker is to stop
STORE_SECONDS = 15 * 60


class Patience:
    """Whether to go on: not for long once the worker is to stop, nor where nobody wants it."""

    def __init__(self, draining: Draining, seconds: float, is_wanted: Callable[[], bool]) -> None:
        self._draining = draining
        self._ends = time.monotonic() + seconds
        self._is_wanted = is_wanted

    def is_over(self) -> bool:
        now = time.monotonic()
        if self._draining.is_set():
            self._ends = min(self._ends, now + LAST_TRIES_SECONDS)
        return now > self._ends or not self._is_wanted()


def until_written(write: Callable[[], Value], draining: Draining) -> Value:
    """Call until the database has answered. A worker that is to stop gives up after a while.

    Every such write is fenced, so one whose answer was lost can be sent again: it changes nothing,
    and says that the lease is gone.
    """
    return _insist(write, OUTAGES, Patience(draining, float("inf"), lambda: True))


def until_stored(
    store: Callable[[], Value], draining: Draining, is_wanted: Callable[[], bool] = lambda: True
) -> Value:
    """Call until the store has answered, for a quarter of an hour, or while it is wanted."""
    return _insist(store, (Outage,), Patience(draining, STORE_SECONDS, is_wanted))


def _insist(
    call: Callable[[], Value],
    outages: tuple[type[Exception], ...],
    patience: Patience,
) -> Value:
    started, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            value = call()
        except outages as error:
            if patience.is_over():
                raise
            if wait == FIRST_WAIT:  # told of once
                log.warning("an outage; trying until it is over", exc_info=error)
        else:
            if wait > FIRST_WAIT:
                log.info("the outage is over", seconds=round(time.monotonic() - started, 1))
            return value
        time.sleep(wait * random.uniform(0.5, 1))  # noqa: S311 - spreads the workers
        wait = min(2 * wait, LONGEST_WAIT)
