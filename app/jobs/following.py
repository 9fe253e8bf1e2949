"""Following a job: a long-poll that answers when it has changed, and a stream of its events."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic_core import to_json

from app.access.streams import still_allowed
from app.changes import Changes
from app.errors import DatabaseUnavailable, JobNotFound
from app.etags import names
from app.jobs.answers import Event, Job
from app.jobs.records import JobRecords, News
from app.jobs.service import JobService
from app.sessions import transaction

LONGEST_WAIT_SECONDS = 60
RECHECK_SECONDS = 2  # a place in the queue changes without the job, and a key is revoked
RIGHTS_SECONDS = 2  # between two looks at the key of a stream
PING_SECONDS = 15
PROGRESS_SECONDS = 1
OUTAGE_SECONDS = 1  # between two tries
READ_SECONDS = 5
STREAM_SECONDS = 3600  # then the client comes again, and shows its key


@dataclass(frozen=True)
class Seen:
    """A job as it is answered."""

    job: Job
    body: bytes
    etag: str


def seen(job: Job) -> Seen:
    body = job.model_dump_json().encode()
    return Seen(job, body, f'"{hashlib.sha256(body).hexdigest()}"')


async def look(request: Request, job_id: str) -> Seen:
    async with transaction(request, writes=False) as session:
        return seen(await JobService(session, request.state.settings).get(job_id))


async def wait_for_change(request: Request, job_id: str, known: str | None, seconds: float) -> Seen:
    """The job once it is not what the client has, is over, or the time is.

    ``known``: its ETag, as ``If-None-Match`` names it; without it what the job is now.
    """
    changes: Changes = request.state.changes
    deadline = time.monotonic() + seconds
    with changes.watching(job_id) as watcher:
        found = await look(request, job_id)
        known = known or found.etag
        while names(known, found.etag) and not found.job.status.is_terminal:
            left = deadline - time.monotonic()
            if left <= 0 or changes.is_closing or await request.is_disconnected():
                break
            await watcher.wait(min(left, RECHECK_SECONDS))
            if not await still_allowed(request):
                break
            found = await look(request, job_id)
    return found


@dataclass
class EventStream:
    """A job's events as server-sent ones: each once and in order, whatever happens in between.

    Between them ``progress`` tells of steps; it has no id, as nobody needs to hear it again.
    """

    request: Request
    job_id: str
    after: int
    news: News
    """What has been read already."""
    _told: dict[str, Any] | None = None
    _told_at: float = float("-inf")
    _sent_at: float = field(default_factory=time.monotonic)

    async def frames(self) -> AsyncIterator[bytes]:
        changes: Changes = self.request.state.changes
        ends_at = time.monotonic() + STREAM_SECONDS
        with changes.watching(self.job_id) as watcher:
            while True:
                for frame in self._frames():
                    self._sent_at = time.monotonic()
                    yield frame
                if not self.news.is_whole:
                    await self._read()
                    continue
                if self.news.is_over or changes.is_closing or time.monotonic() > ends_at:
                    return
                await watcher.wait(self._patience())
                if not await still_allowed(self.request):
                    return  # who comes again is told why
                await self._read()

    def _frames(self) -> list[bytes]:
        """What is to be sent now."""
        frames = [self._frame(event) for event in self.news.events]
        self.news.events = []
        now = time.monotonic()
        if self._has_progress and now >= self._told_at + PROGRESS_SECONDS:
            self._told, self._told_at = self.news.progress, now
            frames.append(_format("progress", self._told))
        if not frames and now >= self._sent_at + PING_SECONDS:
            frames.append(KEEPALIVE_COMMENT)
        return frames

    def _frame(self, event: Event) -> bytes:
        self.after = event.seq
        return _format(event.type, event.model_dump(mode="json"), id=str(event.seq))

    @property
    def _has_progress(self) -> bool:
        news = self.news
        return news.is_whole and not news.is_over and news.progress not in (None, self._told)

    def _patience(self) -> float:
        until = min(self._sent_at + PING_SECONDS, time.monotonic() + RIGHTS_SECONDS)
        if self._has_progress:
            until = min(until, self._told_at + PROGRESS_SECONDS)
        if self.news.is_stale:
            until = min(until, time.monotonic() + OUTAGE_SECONDS)
        return until - time.monotonic()

    async def _read(self) -> None:
        """What is new; nothing while the database is away. A job that is gone is over."""
        try:
            async with (
                asyncio.timeout(READ_SECONDS),  # and say meanwhile that the stream lives
                transaction(self.request, writes=False) as session,
            ):
                self.news = await JobRecords(session).news(self.job_id, after=self.after)
        except (DatabaseUnavailable, TimeoutError):
            self.news.is_stale, self.news.is_whole = True, True
        except JobNotFound:
            self.news = News([], None, is_over=True, is_whole=True)


def _format(type_: str, data: Any, id: str | None = None) -> bytes:
    return format_sse_event(event=type_, data_str=to_json(data).decode(), id=id)
