"""Who waits for jobs to change: one look at the database for all of them.

A long-poll or an event stream holds no connection while it waits, and asks for nothing by itself.
Here one task looks at a few columns of all the jobs that anybody waits for; who hears that one of
them has changed then reads it in a short session of its own, with the rights of its request.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import structlog
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from app.db import Database
from app.tables import EventRow, JobRow

log = structlog.get_logger()

LOOK_SECONDS = 0.25
ANSWER_SECONDS = 10
JOBS_AT_ONCE = 500  # in one statement

Look = tuple[Any, ...]
"""What a job looks like from afar. Whoever adds an event or changes the row changes it."""


class Watcher:
    """One who waits for a job."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def tell(self) -> None:
        self._changed.set()

    async def wait(self, seconds: float) -> None:
        """Until the job has changed since the last time, or for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0, seconds)):
                await self._changed.wait()
        self._changed.clear()


class Changes:
    """Tells watchers of changes while there are any. Belongs to the event loop it is made in."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine
        self._watchers: dict[str, set[Watcher]] = {}
        self._looks: dict[str, Look | None] = {}
        self._task: asyncio.Task[None] | None = None
        self.is_closing = False
        """Nobody should wait any more."""

    @property
    def watchers(self) -> int:
        return sum(map(len, self._watchers.values()))

    @contextmanager
    def watching(self, job_id: str) -> Iterator[Watcher]:
        """Enter before the job is read: what changes after that is told."""
        watcher = Watcher()
        self._watchers.setdefault(job_id, set()).add(watcher)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            yield watcher
        finally:
            self._watchers[job_id].discard(watcher)
            if not self._watchers[job_id]:
                del self._watchers[job_id]
                self._looks.pop(job_id, None)

    async def _run(self) -> None:
        failed_at: float | None = None
        while self._watchers and not self.is_closing:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    looks = await self._look(list(self._watchers))
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                if failed_at is None:
                    log.warning("changes are not seen: the database is away", exc_info=error)
                    failed_at = time.monotonic()
            else:
                if failed_at is not None:
                    log.info("changes are seen again", seconds=round(time.monotonic() - failed_at))
                    failed_at = None
                self._tell(looks)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self, job_ids: Sequence[str]) -> dict[str, Look | None]:
        """On a bare connection: of whatever project, and nothing of it is shown to anybody."""
        newest = select(func.max(EventRow.seq)).where(EventRow.job_id == JobRow.id)
        columns = (JobRow.id, JobRow.status, JobRow.updated_at, JobRow.step)
        wanted = select(*columns, newest.scalar_subquery())
        found: dict[str, Look | None] = dict.fromkeys(job_ids)
        async with self._engine.connect() as connection:
            for start in range(0, len(job_ids), JOBS_AT_ONCE):
                some = job_ids[start : start + JOBS_AT_ONCE]
                rows = await connection.execute(wanted.where(JobRow.id.in_(some)))
                found.update({row.id: tuple(row) for row in rows})
        return found

    def _tell(self, looks: Mapping[str, Look | None]) -> None:
        for job_id, look in looks.items():
            watchers = self._watchers.get(job_id)
            # The first look at a job tells too: it may have changed before that, after it was read.
            if watchers and (job_id not in self._looks or self._looks[job_id] != look):
                self._looks[job_id] = look
                for watcher in watchers:
                    watcher.tell()

    def close(self) -> None:
        """Let everybody who waits end."""
        self.is_closing = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.tell()

    async def aclose(self) -> None:
        """Its last look may end in peace: a connection that is torn away is left open."""
        self.close()
        if self._task:
            await asyncio.wait([self._task], timeout=ANSWER_SECONDS)


@contextmanager
def told_to_stop(close: Callable[[], None]) -> Iterator[None]:
    """Call ``close`` when the server is told to stop: it waits for all that is being answered.

    Its own handlers stand already when an app starts, and are called after that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    replaced: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(close)
        replaced[number](number, frame)

    for number in (signal.SIGTERM, signal.SIGINT):
        if callable(before := signal.getsignal(number)):
            replaced[number] = before
            signal.signal(number, stop)
    try:
        yield
    finally:
        for replaced_number, handler in replaced.items():
            signal.signal(replaced_number, handler)
