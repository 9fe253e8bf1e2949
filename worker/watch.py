"""The threads beside a running job: heartbeat out, wishes in, and an end to a stuck trainer."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import TracebackType
from typing import Protocol

import structlog

from app.jobs.states import Status
from app.settings import Settings
from worker.claims import Claims
from worker.lease import Lease, LeaseLost
from worker.process import TrainerProcess
from worker.progress import Progress

log = structlog.get_logger()

TICK_SECONDS = 0.5
SELF_FENCE = 0.75  # of the lease: without a heartbeat for so long, stop before others take over
LAST_MOMENT = 0.95  # of the lease: by then the trainer is dead


class Draining(Protocol):
    """A wish to stop that other threads or processes may set: ``threading.Event`` is one."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> bool: ...


class Stop(Enum):
    """Why a trainer is being stopped; the later ones win over the earlier."""

    DRAIN = 1
    PAUSE = 2
    CUT_OFF = 3
    CANCEL = 4
    MAX_RUNTIME = 5
    STALLED = 6
    LEASE_LOST = 7


WISHES = {Status.CANCELLING: Stop.CANCEL, Status.PAUSING: Stop.PAUSE}


class Watch:
    """Keeps a lease alive while the main thread works under it.

    One thread talks to the database and may hang there; the other one never does, so that a trainer
    is stopped in time whatever the network does.
    """

    def __init__(
        self,
        settings: Settings,
        claims: Claims,
        lease: Lease,
        progress: Progress,
        draining: Draining,
    ) -> None:
        self._settings = settings
        self._claims = claims
        self._lease = lease
        self._progress = progress
        self._draining = draining
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._trainer: TrainerProcess | None = None
        self._trainer_at = 0.0
        self._stop: Stop | None = None
        self._kill_at = float("inf")
        self._heartbeat_at = lease.asked_at
        max_runtime = lease.spec["resources"]["max_runtime"]
        left = max_runtime - lease.runtime if max_runtime else float("inf")
        self._deadline = time.monotonic() + left
        self._threads = [
            threading.Thread(
                target=self._run, args=(duty, seconds), name=duty.__name__, daemon=True
            )
            for duty, seconds in (
                (self._beat, TICK_SECONDS),
                (self._guard, min(TICK_SECONDS, settings.lease_seconds / 100)),
            )
        ]

    def __enter__(self) -> "Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(TICK_SECONDS)  # the one may hang in the database, and is a daemon

    @property
    def stop(self) -> Stop | None:
        return self._stop

    def drain(self) -> None:
        self._want(Stop.DRAIN)

    @contextmanager
    def over(self, trainer: TrainerProcess) -> Iterator[None]:
        """Inside the block wishes reach this trainer; one that came before reaches it at once."""
        with self._lock:
            self._trainer, self._trainer_at = trainer, time.monotonic()
            if self._stop:
                self._send(self._stop)
        try:
            yield
        finally:
            with self._lock:
                self._trainer = None

    def _run(self, duty: Callable[[], None], seconds: float) -> None:
        while not self._over.wait(seconds):
            duty()

    def _guard(self) -> None:
        now = time.monotonic()
        if now > self._heartbeat_at + SELF_FENCE * self._settings.lease_seconds:
            self._want(Stop.CUT_OFF)
        if now > self._deadline:
            self._want(Stop.MAX_RUNTIME)
        if self._draining.is_set():
            self._want(Stop.DRAIN)
        with self._lock:
            if self._trainer is None:
                return
            heard_at = max(self._progress.heard_at, self._trainer_at)
        if now > heard_at + self._settings.stall_seconds:
            self._want(Stop.STALLED)
        with self._lock:
            last_moment = self._heartbeat_at + LAST_MOMENT * self._settings.lease_seconds
            if now > min(self._kill_at, last_moment) and self._trainer is not None:
                self._trainer.kill()

    def _beat(self) -> None:
        due = time.monotonic() > self._heartbeat_at + self._settings.heartbeat_seconds
        started = time.monotonic()
        try:
            if due or self._progress.is_waiting:
                status = self._progress.flush()
                self._heartbeat_at = started
            else:
                status = self._claims.wish(self._lease)
        except LeaseLost:
            self._want(Stop.LEASE_LOST)
        except Exception as error:  # this thread must go on
            log.warning("heartbeat failed", job_id=self._lease.job_id, exc_info=error)
        else:
            if status in WISHES:
                self._want(WISHES[status])

    def _want(self, stop: Stop) -> None:
        with self._lock:
            if self._stop is None or stop.value > self._stop.value:
                self._stop = stop
                self._send(stop)

    def _send(self, stop: Stop) -> None:
        if self._trainer is None:
            return
        now = time.monotonic()
        match stop:
            case Stop.DRAIN | Stop.PAUSE | Stop.CUT_OFF:  # a checkpoint if there is time
                self._trainer.signal(signal.SIGTERM)
                self._kill_by(now + self._settings.drain_grace_seconds)
            case Stop.CANCEL | Stop.MAX_RUNTIME:
                self._trainer.signal(signal.SIGUSR1)
                self._kill_by(now + self._settings.cancel_grace_seconds)
            case Stop.STALLED | Stop.LEASE_LOST:
                self._trainer.kill()

    def _kill_by(self, moment: float) -> None:
        """A later wish gives no more time than the earlier one has."""
        self._kill_at = min(self._kill_at, moment)
