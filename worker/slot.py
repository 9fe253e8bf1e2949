"""One place where jobs run, one at a time: devices, a name, and a lock of who works there."""

import fcntl
import platform
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import structlog

from app.db import OUTAGES, make_engine
from app.devices import count
from app.settings import Settings
from app.storage import make_private, open_store
from worker.claims import Claims
from worker.fetch import Fetcher
from worker.lease import Lease
from worker.metrics import attempt_began, attempts_killed
from worker.supervisor import Supervisor, traced
from worker.watch import Draining

log = structlog.get_logger()

LOCK_SECONDS = 10  # for a predecessor that has just been killed


class SlotTaken(Exception):
    """Another process works in this slot."""


@dataclass(frozen=True)
class Slot:
    """``name`` is what the rows of its jobs have as their worker.

    ``device`` may be several that are joined (``0+1``), for jobs that need as many.
    """

    name: str
    device: str | None

    @property
    def size(self) -> int:
        """How many GPUs a job may need."""
        return count(self.device)


@contextmanager
def occupied(path: Path, device: str | None, *, wait_seconds: float = 0) -> Iterator[Slot]:
    """Be alone in a slot for as long as the block, or this process, lasts."""
    with _locked(path, wait_seconds) as file:
        yield Slot(_name(file), device)


def name_of(path: Path) -> str:
    """The name of a slot, whether anybody works in it or not; made if it has none yet."""
    make_private(path.parent)
    with path.open("a+") as file:
        return _name(file)


@contextmanager
def _locked(path: Path, wait_seconds: float) -> Iterator[IO[str]]:
    make_private(path.parent)
    deadline = time.monotonic() + wait_seconds
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise SlotTaken(
                        f"Another flatlora service works in {path.parent}. Stop it, or choose "
                        "another folder with FLATLORA_DATA_DIR."
                    ) from error
            time.sleep(0.05)
        yield file


def _name(file: IO[str]) -> str:
    """Kept in the lock's file: a machine may be called otherwise tomorrow."""
    file.seek(0)
    name = file.read().strip()
    if not name:
        name = f"{platform.node()}-{secrets.token_hex(4)}"
        file.write(name + "\n")
        file.flush()
    return name


class Bench:
    """Takes jobs and runs them in a slot.

    It is alone there, so what the row of a dead predecessor still holds can be put back at once.
    """

    def __init__(self, settings: Settings, slot: Slot, draining: Draining) -> None:
        self._engine = make_engine(settings.database, answer_seconds=settings.answer_seconds)
        store = open_store(settings)
        self.claims = Claims(
            self._engine,
            worker=slot.name,
            lease_seconds=settings.lease_seconds,
            max_attempts=settings.max_attempts,
            retry_seconds=settings.retry_seconds,
            wakes=settings.is_cluster,
            gpus=slot.size if settings.is_cluster else None,
            max_running=settings.max_running_jobs,
        )
        fetcher = Fetcher(settings, self._engine, store)
        self._supervisor = Supervisor(settings, self.claims, fetcher, store, draining, slot.device)
        self.folders = self._supervisor.folders
        self._draining = draining
        self._has_recovered = False

    def close(self) -> None:
        self._engine.dispose()

    def recover(self) -> None:
        """Put back what a process that is gone has held in this slot."""
        recovered = self.claims.recover()
        attempts_killed(recovered)
        self._has_recovered = True
        self.folders.sweep()
        log.info("slot ready", recovered=recovered)

    def run_next(self) -> bool:
        """Run the job whose turn it is, if one waits. Raises what the database raises."""
        if not self._has_recovered:
            self.recover()
        looked_at = time.time_ns()
        try:
            lease = self.claims.claim_next()
        except OUTAGES:
            self._has_recovered = False  # the answer was lost: the claim may have been made
            raise
        if lease is None:
            return False
        with traced("job.claim", lease, started_at=looked_at):
            attempt_began(_waited(lease))
        try:
            self._supervisor.run(lease)
        except OUTAGES:
            self._has_recovered = False
            raise
        return True


def _waited(lease: Lease) -> float | None:
    """Seconds in the queue, if this is the job's first claim; good enough by our own clock."""
    if lease.fence > 1:
        return None
    return (datetime.now(UTC) - lease.created_at).total_seconds()
