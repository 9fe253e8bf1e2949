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


def until_written(write: Callable[[], Value], draining: Draining) -> Value:
    """Call until the database has answered. A worker that is to stop gives up after a while.

    Every such write is fenced, so one whose answer was lost can be sent again: it changes nothing,
    and says that the lease is gone.
    """
    return _insist(write, OUTAGES, lambda waited: draining.is_set() and waited > LAST_TRIES_SECONDS)


def until_stored(store: Callable[[], Value], draining: Draining) -> Value:
    """Call until the store has answered, for a quarter of an hour."""
    return _insist(
        store,
        (Outage,),
        lambda waited: waited > (LAST_TRIES_SECONDS if draining.is_set() else STORE_SECONDS),
    )


def _insist(
    call: Callable[[], Value],
    outages: tuple[type[Exception], ...],
    is_enough: Callable[[float], bool],
) -> Value:
    started, wait = time.monotonic(), FIRST_WAIT
    while True:
        try:
            value = call()
        except outages as error:
            if is_enough(time.monotonic() - started):
                raise
            if wait == FIRST_WAIT:  # told of once
                log.warning("an outage; trying until it is over", exc_info=error)
        else:
            if wait > FIRST_WAIT:
                log.info("the outage is over", seconds=round(time.monotonic() - started, 1))
            return value
        time.sleep(wait * random.uniform(0.5, 1))  # noqa: S311 - spreads the workers
        wait = min(2 * wait, LONGEST_WAIT)
