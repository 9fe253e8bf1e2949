"""Waiting for what is going to be so."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def until(look: Callable[[], Value], *, seconds: float = 60, every: float = 0.05) -> Value:
    """The first true value of a condition; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := look():
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds} s: {look}")


def seconds_of(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started
