"""The thread beside a running job: heartbeat out, wishes in, and an end to a stuck trainer."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import TracebackType

import structlog

from app.jobs.states import Status
from app.settings import Settings
from worker.claims import Claims, Lease, LeaseLost
from worker.process import TrainerProcess
from worker.progress import Progress

log = structlog.get_logger()

TICK_SECONDS = 0.5
SELF_FENCE = 0.75  # of the lease: without a heartbeat for so long, stop before others take over


class Stop(Enum):
    """Why a trainer is being stopped; the later ones win over the earlier."""

    DRAIN = 1
    CANCEL = 2
    MAX_RUNTIME = 3
    LEASE_LOST = 4


class Watch:
    """Keeps a lease alive while the main thread works under it."""

    def __init__(
        self,
        settings: Settings,
        claims: Claims,
        lease: Lease,
        progress: Progress,
        draining: threading.Event,
    ) -> None:
        self._settings = settings
        self._claims = claims
        self._lease = lease
        self._progress = progress
        self._draining = draining
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._trainer: TrainerProcess | None = None
        self._stop: Stop | None = None
        self._kill_at = float("inf")
        self._heartbeat_at = time.monotonic()
        max_runtime = lease.spec["resources"]["max_runtime"]
        left = max_runtime - lease.runtime if max_runtime else float("inf")
        self._deadline = time.monotonic() + left
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    @property
    def stop(self) -> Stop | None:
        return self._stop

    @contextmanager
    def over(self, trainer: TrainerProcess) -> Iterator[None]:
        """Inside the block wishes reach this trainer; one that came before reaches it at once."""
        with self._lock:
            self._trainer = trainer
            if self._stop:
                self._send(self._stop)
        try:
            yield
        finally:
            with self._lock:
                self._trainer = None

    def _watch(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            self._beat()
            now = time.monotonic()
            if now > self._heartbeat_at + SELF_FENCE * self._settings.lease_seconds:
                self._want(Stop.LEASE_LOST)
            if now > self._deadline:
                self._want(Stop.MAX_RUNTIME)
            if self._draining.is_set():
                self._want(Stop.DRAIN)
            with self._lock:
                if now > self._kill_at and self._trainer:
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
        except Exception as error:  # this thread must go on: it is what stops a stuck trainer
            log.warning("heartbeat failed", job_id=self._lease.job_id, exc_info=error)
        else:
            if status is Status.CANCELLING:
                self._want(Stop.CANCEL)

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
            case Stop.DRAIN:
                self._trainer.signal(signal.SIGTERM)
                self._kill_at = now + self._settings.drain_grace_seconds
            case Stop.CANCEL | Stop.MAX_RUNTIME:
                self._trainer.signal(signal.SIGUSR1)
                self._kill_at = now + self._settings.cancel_grace_seconds
            case Stop.LEASE_LOST:
                self._trainer.kill()
