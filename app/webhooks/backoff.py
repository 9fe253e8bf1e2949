"""When a delivery that did not arrive is tried again: the schedule of the specification."""

import random
from datetime import datetime, timedelta

SECONDS = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600)
"""After the first attempt, the second, and so on; the last of these again and again."""
GIVE_UP_SECONDS = 24 * 3600
JITTER = 0.2
"""Receivers that were away are not asked by all at the same moment."""


def next_attempt(
    tries: int, moment: datetime, give_up_at: datetime, *, asked_for: float = 0
) -> datetime | None:
    """When, after so many attempts; None: it is given up.

    The last attempt is made at ``give_up_at``. ``asked_for``: seconds of a ``Retry-After``.
    """
    if moment >= give_up_at:
        return None
    usual = SECONDS[min(tries, len(SECONDS)) - 1] * (1 + random.uniform(0, JITTER))  # noqa: S311 - no secret
    seconds = min(max(usual, asked_for), GIVE_UP_SECONDS)
    return min(moment + timedelta(seconds=seconds), give_up_at)
