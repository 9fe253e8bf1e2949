"""The worker of one machine: it starts Celery, keeps it running, and keeps house meanwhile.

    python -m worker.main          (``flatlora worker``)

Every worker does the housekeeping, so that it is done while one of them lives: wake-ups that wait
in the outbox, leases that ran out, wake-ups that were lost, rows and files that are to go. SIGTERM
drains: running jobs write a checkpoint and go back to the queue.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import datetime
from types import FrameType

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.broker import make_celery
from app.db import make_engine
from app.flag import SharedFlag
from app.logs import configure_logs
from app.outbox import Relay, send_wake_up
from app.periodic import Periodic
from app.retention import Retention
from app.settings import Settings, get_settings
from app.storage import make_private, open_store
from worker.claims import Claims
from worker.devices import slots
from worker.folders import Folders
from worker.metrics import prepare_metrics, serving_metrics
from worker.reaper import Reaper
from worker.registry import Registry
from worker.slot import Slot, SlotTaken, name_of, occupied

log = structlog.get_logger()

REAP_SECONDS = 10
TURN_SECONDS = 0.2
LATE_TURNS = 4  # sweeps in a row without effect after which Celery is started anew
FORGET_SECONDS = 3600
FIRST_BACKOFF, LONGEST_BACKOFF, STEADY_SECONDS = 0.5, 30.0, 30.0
STOP_MARGIN_SECONDS = 28


class CeleryProcess:
    """The process that waits for wake-ups for slots of a size, started again when it dies."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_at = 0.0
        self._kill_at = float("inf")
        self._backoff = FIRST_BACKOFF
        self._lock = threading.Lock()

    @property
    def is_steady(self) -> bool:
        """It has been there for so long that it ought to work by now."""
        return self._process is not None and time.monotonic() > self._started_at + STEADY_SECONDS

    def tend(self) -> None:
        with self._lock:
            if time.monotonic() > self._kill_at:
                log.warning("celery did not end when it was told to and is killed")
                self._kill_at = float("inf")
                self.kill()
            if self._process is None:
                if time.monotonic() >= self._start_at:
                    self._start()
            elif (code := self._process.poll()) is not None:
                log.warning("celery ended; starting it again", code=code)
                if time.monotonic() - self._started_at > STEADY_SECONDS:
                    self._backoff = FIRST_BACKOFF
                self._start_at = time.monotonic() + self._backoff
                self._backoff = min(2 * self._backoff, LONGEST_BACKOFF)
                self._process = None

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._kill_at = float("inf")
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", "worker.celery_worker", str(self._size)],
            stdin=subprocess.PIPE,  # never written to: its end tells the child to leave
            start_new_session=True,
        )

    def restart(self, seconds: float) -> None:
        """For one that lives and does nothing. Its jobs are drained first, if it still can."""
        with self._lock:
            if self._process and self._kill_at == float("inf"):  # not told yet
                self._process.terminate()
                self._kill_at = time.monotonic() + seconds

    def stop(self, seconds: float) -> None:
        """Let it drain, and end it if that takes too long."""
        with self._lock:
            if self._process is None:
                return
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                log.warning("celery did not drain in time and is killed")
                self.kill()
                self._process.wait()

    def kill(self) -> None:
        """Does not wait: a handler that interrupts a wait would do so for ever (its lock)."""
        if self._process and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Sweeper:
    """Wakes this worker's idle slots of a size when jobs wait whose wake-up was lost."""

    def __init__(
        self, settings: Settings, registry: Registry, celery: CeleryProcess, size: int
    ) -> None:
        self._size = size
        self._broker = make_celery(settings.broker_url)
        self._patience = settings.sweep_seconds
        self._stop_seconds = settings.drain_grace_seconds + STOP_MARGIN_SECONDS
        self._registry = registry
        self._celery = celery
        self._in_vain = 0
        self._newest_start: datetime | None = None

    def sweep(self) -> None:
        idle, late = self._registry.idle_slots(self._size), 0
        if idle:
            late = self._registry.waiting_jobs(self._size, idle, for_seconds=self._patience)
        if not late:
            self._in_vain = 0
            return
        for _ in range(late):
            send_wake_up(self._broker, gpus=self._size)
        started = self._newest_start
        self._newest_start = self._registry.newest_start(self._size)
        if started != self._newest_start:  # it moves; a slot may be idle between two jobs
            self._in_vain = 0
        self._in_vain += 1
        log.info("woke idle slots for jobs that wait", jobs=late)
        if self._in_vain > LATE_TURNS and self._celery.is_steady:
            # A consumer that has silently stopped to consume (celery#8030, #9054, #10205).
            log.error("wake-ups are sent and nobody takes them; starting celery again")
            self._celery.restart(self._stop_seconds)
            self._in_vain = 0


class Worker:
    def __init__(self, settings: Settings, name: str) -> None:
        self._settings = settings
        devices = slots(settings.devices)
        # Looked up once: children that ask again may be told otherwise by an ailing driver.
        os.environ["FLATLORA_DEVICES"] = ",".join(devices)
        paths = [settings.slots_dir / f"{index}.lock" for index in range(len(devices))]
        self._slots = [
            Slot(name_of(path), device) for path, device in zip(paths, devices, strict=True)
        ]
        engine = make_engine(settings.database, answer_seconds=settings.answer_seconds)
        self._registry = Registry(engine, name, self._slots)
        sizes = sorted({slot.size for slot in self._slots})
        self._celeries = [CeleryProcess(size) for size in sizes]
        claims = Claims(
            engine,
            worker=name,
            lease_seconds=settings.lease_seconds,
            max_attempts=settings.max_attempts,
            retry_seconds=settings.retry_seconds,
            wakes=True,
        )
        reap_seconds = min(REAP_SECONDS, settings.lease_seconds / 6)
        reaper = Reaper(claims, every_seconds=reap_seconds, lease_seconds=settings.lease_seconds)
        relay = Relay(engine, make_celery(settings.broker_url))
        cleaner = Retention(make_engine(settings.database), open_store(settings), settings)
        folders = Folders(claims, settings.work_dir)
        sweepers = [
            Sweeper(settings, self._registry, celery, size)
            for celery, size in zip(self._celeries, sizes, strict=True)
        ]
        self._beat = Periodic("registry", settings.heartbeat_seconds / 2, self._registry.beat)
        self._duties = [
            Periodic("relay", settings.relay_seconds, relay.send_due),
            Periodic("reaper", reap_seconds, reaper.reap),
            *(Periodic("sweeper", settings.sweep_seconds, each.sweep) for each in sweepers),
            Periodic("lost workers", FORGET_SECONDS, self._forget_lost),
            Periodic("cleaner", settings.cleaning_seconds, cleaner.clean),
            Periodic("folders", settings.cleaning_seconds, folders.forget_gone),
        ]

    def run(self, draining: SharedFlag) -> None:
        log.info("worker ready", slots=[slot.name for slot in self._slots])
        alive = self._settings.alive_file
        with ExitStack() as stack:
            stack.enter_context(self._beat)
            with ExitStack() as duties:
                for duty in self._duties:
                    duties.enter_context(duty)
                while not draining.wait(TURN_SECONDS):
                    for celery in self._celeries:
                        celery.tend()
                    alive.touch()
                self._registry.is_draining = True
                self._beat.nudge()
                self._stop(self._settings.drain_grace_seconds + STOP_MARGIN_SECONDS)
        with suppress(SQLAlchemyError):
            self._registry.leave()
        alive.unlink(missing_ok=True)
        log.info("worker drained")

    def _stop(self, seconds: float) -> None:
        """All at once: each waits for its jobs' checkpoints."""
        with ThreadPoolExecutor(len(self._celeries)) as stopping:
            for celery in self._celeries:
                stopping.submit(celery.stop, seconds)

    def kill(self) -> None:
        for celery in self._celeries:
            celery.kill()

    def _forget_lost(self) -> None:
        self._registry.forget_lost(24 * FORGET_SECONDS)


def main() -> int:
    configure_logs()
    settings = get_settings()
    draining = SharedFlag()  # a lock of an Event may be held when the signal comes
    make_private(settings.data_dir)
    try:
        with occupied(settings.data_dir / "worker.lock", None) as self_:
            worker = Worker(settings, self_.name)

            def drain(_number: int, _frame: FrameType | None) -> None:
                if draining.is_set():  # asked twice: do not wait for checkpoints
                    worker.kill()
                draining.set()

            signal.signal(signal.SIGTERM, drain)
            signal.signal(signal.SIGINT, drain)
            prepare_metrics(settings)
            with serving_metrics(settings):
                worker.run(draining)
    except SlotTaken as error:
        log.error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
