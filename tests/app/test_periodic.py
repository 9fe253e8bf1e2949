"""A duty is done again and again, soon when nudged, and whatever happens to it in between."""

import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from structlog.testing import capture_logs
from structlog.typing import EventDict

from app.periodic import RECOVERY_SECONDS, Periodic
from tests.system.service import until


@pytest.fixture
def logged() -> Iterator[list[EventDict]]:
    with capture_logs() as entries:
        yield entries


def test_it_is_done_at_once_and_then_every_so_often() -> None:
    times: list[float] = []
    started = time.monotonic()
    with Periodic("duty", 0.5, lambda: times.append(time.monotonic())):
        until(lambda: len(times) >= 3, seconds=10, every=0.01)
    assert times[0] - started < 0.45
    assert times[2] - times[0] >= 0.6


def test_a_nudge_does_not_wait_for_the_next_time() -> None:
    done = threading.Semaphore(0)
    with Periodic("duty", 600, done.release) as periodic:
        assert done.acquire(timeout=10)
        for _ in range(3):
            periodic.nudge()
            assert done.acquire(timeout=10)
        assert not done.acquire(timeout=0.1)


def test_a_nudge_while_it_is_being_done_is_not_lost() -> None:
    """What it was nudged for may have come too late for this time."""
    begun, goes_on = threading.Semaphore(0), threading.Semaphore(0)

    def duty() -> None:
        begun.release()
        assert goes_on.acquire(timeout=10)

    with Periodic("duty", 600, duty) as periodic:
        assert begun.acquire(timeout=10)
        periodic.nudge()
        goes_on.release()
        assert begun.acquire(timeout=10)
        goes_on.release()


def test_one_that_fails_is_done_again_and_told_of_once(logged: list[EventDict]) -> None:
    calls: list[int] = []

    def duty() -> None:
        calls.append(1)
        if len(calls) < 5:
            raise ConnectionError("away")

    with Periodic("duty", 0.01, duty):
        until(lambda: len(calls) >= 8, seconds=10, every=0.01)
    assert [(entry["log_level"], entry["duty"]) for entry in logged] == [
        ("warning", "duty"),
        ("info", "duty"),
    ]


def test_after_a_failure_nudges_wait() -> None:
    """A broker that is away is not called once for each job that comes in."""
    calls: list[float] = []

    def duty() -> None:
        calls.append(time.monotonic())
        raise ConnectionError("away")

    with Periodic("duty", 600, duty) as periodic:
        until(lambda: calls, seconds=10)
        for number in (2, 3):
            periodic.nudge()
            until(lambda: len(calls) == number, seconds=10)  # noqa: B023 - asked at once
    assert all(later - sooner >= RECOVERY_SECONDS for sooner, later in pairwise(calls))


def test_one_run_serves_all_that_nudge_meanwhile() -> None:
    nudged: list[float] = []
    served: list[int] = []

    def duty() -> None:
        served.append(len(nudged))

    with Periodic("duty", 600, duty, gather_seconds=1) as periodic:
        until(lambda: served, seconds=10)
        for _ in range(10):
            nudged.append(time.monotonic())
            periodic.nudge()
        until(lambda: len(served) == 2, seconds=10)
    assert served == [0, 10]


def test_it_ends_with_its_block() -> None:
    calls: list[int] = []
    with Periodic("duty", 0.01, lambda: calls.append(1)):
        until(lambda: calls, seconds=10)
    count = len(calls)
    time.sleep(0.1)
    assert len(calls) == count
    assert "duty" not in {thread.name for thread in threading.enumerate()}


def test_one_that_takes_longer_than_its_interval_still_leaves_time_between() -> None:
    times: list[tuple[float, float]] = []

    def duty() -> None:
        began = time.monotonic()
        time.sleep(0.2)
        times.append((began, time.monotonic()))

    with Periodic("duty", 0.1, duty):
        until(lambda: len(times) >= 3, seconds=10, every=0.01)
    for (_, ended), (began, _) in pairwise(times):
        assert began - ended >= 0.009
