"""What was worked for is written when the database and the store are back, and never dropped."""

import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from structlog.typing import EventDict

from app.storage import Damaged, Outage
from worker import patience
from worker.lease import LeaseLost
from worker.patience import until_stored, until_written

AWAY = [
    OperationalError("x", {}, Exception("the server closed the connection")),
    InterfaceError("x", {}, Exception("the connection is closed")),
    PoolTimeout("no connection is free"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(patience, "LONGEST_WAIT", 0.05)


def failing(*errors: Exception) -> tuple[Callable[[], str], list[float]]:
    """A call that raises each of these once and then succeeds, and when it was called."""
    calls: list[float] = []

    def call() -> str:
        calls.append(time.monotonic())
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return "done"

    return call, calls


class TestDatabase:
    def test_an_outage_is_waited_out_however_it_shows_and_told_of_once(
        self, logged: list[EventDict]
    ) -> None:
        call, calls = failing(*AWAY, *AWAY)
        assert until_written(call, threading.Event()) == "done"
        assert len(calls) == 7
        assert [entry["log_level"] for entry in logged] == ["warning", "info"]

    @pytest.mark.parametrize("error", [LeaseLost("job"), IntegrityError("x", {}, Exception())])
    def test_what_does_not_pass_is_raised_at_once(self, error: Exception) -> None:
        call, calls = failing(error)
        with pytest.raises(type(error)):
            until_written(call, threading.Event())
        assert len(calls) == 1

    def test_a_worker_that_is_to_stop_gives_up_after_a_while(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(patience, "LAST_TRIES_SECONDS", 0.2)
        draining = threading.Event()
        draining.set()
        call, _ = failing(*AWAY[:1] * 1000)
        started = time.monotonic()
        with pytest.raises(OperationalError):
            until_written(call, draining)
        assert 0.2 <= time.monotonic() - started < 30

    def test_the_waits_grow_and_have_a_limit(self) -> None:
        call, calls = failing(*AWAY * 3)
        until_written(call, threading.Event())
        waits = [later - sooner for sooner, later in pairwise(calls)]
        assert min(waits) >= 0.5 * 0.01
        assert min(waits[3:]) >= 0.5 * 0.05
        assert statistics.median(waits[3:]) < 10 * 0.05


class TestStore:
    def test_an_outage_is_waited_out(self) -> None:
        call, calls = failing(Outage("refused"), Outage("timed out"))
        assert until_stored(call, threading.Event()) == "done"
        assert len(calls) == 3

    def test_what_is_damaged_stays_so(self) -> None:
        call, calls = failing(Damaged("gone"))
        with pytest.raises(Damaged):
            until_stored(call, threading.Event())
        assert len(calls) == 1

    @pytest.mark.parametrize("drains", [True, False])
    def test_it_is_not_waited_for_longer_than_that(
        self, monkeypatch: pytest.MonkeyPatch, drains: bool
    ) -> None:
        monkeypatch.setattr(patience, "LAST_TRIES_SECONDS", 0.1)
        monkeypatch.setattr(patience, "STORE_SECONDS", 0.3)
        draining = threading.Event()
        if drains:
            draining.set()
        call, _ = failing(*[Outage("refused")] * 1000)
        started = time.monotonic()
        with pytest.raises(Outage):
            until_stored(call, draining)
        limit = 0.1 if drains else 0.3
        assert limit <= time.monotonic() - started < 30
