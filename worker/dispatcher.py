"""The embedded worker: one process that takes queued jobs from the table, one at a time.

    python -m worker.dispatcher

It is alone on its data folder (a file lock says so), so what the row of a dead dispatcher still
holds can be put back the moment the next one starts. SIGTERM and SIGINT drain: the running job
writes a checkpoint and goes back to the queue.
"""

import fcntl
import platform
import secrets
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO

import structlog

from app.db import make_engine
from app.logs import configure_logs
from app.parent import die_with_parent
from app.settings import Settings, get_settings
from app.storage import ArtifactStore, make_private
from worker.claims import Claims
from worker.fetch import Fetcher
from worker.supervisor import Supervisor

log = structlog.get_logger()

REAP_SECONDS = 10
RETRY_SECONDS = 2


class AlreadyRunning(Exception):
    """Another dispatcher works on this data folder."""


def lock(data_dir: Path) -> IO[str]:
    """Be the only dispatcher of a data folder for as long as the returned file is open."""
    make_private(data_dir)
    file = (data_dir / "dispatcher.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise AlreadyRunning(
            f"Another flatlora service works in {data_dir}. Stop it, or choose another folder "
            "with FLATLORA_DATA_DIR."
        ) from error
    return file


def name_of(file: IO[str]) -> str:
    """The worker's name, kept in the lock's file: a machine may be called otherwise tomorrow."""
    file.seek(0)
    name = file.read().strip()
    if not name:
        name = f"{platform.node()}-{secrets.token_hex(4)}"
        file.write(name + "\n")
        file.flush()
    return name


class Dispatcher:
    def __init__(self, settings: Settings, worker: str, draining: threading.Event) -> None:
        engine = make_engine(settings.database)
        store = ArtifactStore.local(settings.artifacts_dir)
        self._claims = Claims(
            engine,
            worker=worker,
            lease_seconds=settings.lease_seconds,
            max_attempts=settings.max_attempts,
        )
        self._supervisor = Supervisor(
            settings, self._claims, Fetcher(settings, engine, store), store, draining
        )
        self._draining = draining
        self._poll_seconds = settings.poll_seconds
        self._reap_at = 0.0

    def run(self) -> None:
        recovered = self._claims.recover()
        self._supervisor.sweep()
        log.info("dispatcher ready", recovered=recovered)
        while not self._draining.is_set():
            try:
                if not self._turn():
                    self._draining.wait(self._poll_seconds)
            except Exception:  # one job's trouble, or the database's, is not the others' end
                log.exception("this turn failed; trying again")
                self._draining.wait(RETRY_SECONDS)
        log.info("dispatcher drained")

    def _turn(self) -> bool:
        """Run one job if there is one."""
        if time.monotonic() > self._reap_at:
            self._reap_at = time.monotonic() + REAP_SECONDS
            self._claims.reap()
        lease = self._claims.claim_next()
        if lease is None:
            return False
        self._supervisor.run(lease)
        return True


def main() -> int:
    die_with_parent()
    settings = get_settings()
    configure_logs()
    draining = threading.Event()

    def drain(_number: int, _frame: FrameType | None) -> None:
        draining.set()

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGINT, drain)
    try:
        with lock(settings.data_dir) as file:
            Dispatcher(settings, name_of(file), draining).run()
    except AlreadyRunning as error:
        log.error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
