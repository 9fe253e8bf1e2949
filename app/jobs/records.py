"""What is written down of a job while it runs: its events, its log, its checkpoints."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import JobNotFound
from app.jobs.repository import JobRepository
from app.jobs.schemas import Event, LogLine, LogPage
from app.jobs.states import Status

EVENTS_AT_ONCE = 200


@dataclass
class News:
    """What has happened to a job since an event."""

    events: list[Event]
    progress: dict[str, Any] | None
    """Where it is; none before its first step."""
    is_over: bool
    is_whole: bool
    """These are all the events; else more follow at once."""
    is_stale: bool = False
    """The database was away when it was to be read again."""


class JobRecords:
    def __init__(self, session: AsyncSession) -> None:
        self._jobs = JobRepository(session)

    async def _place(self, job_id: str) -> dict[str, Any]:
        place = await self._jobs.place(job_id)
        if place is None:
            raise JobNotFound(job_id)
        return place

    async def news(self, job_id: str, *, after: int) -> News:
        # Its state before its events: a job that is over has its last event then.
        place = await self._place(job_id)
        rows = await self._jobs.events(job_id, after=after, limit=EVENTS_AT_ONCE)
        return News(
            events=[Event.model_validate(row, from_attributes=True) for row in rows],
            progress=place if place["progress"] else None,
            is_over=Status(place["status"]).is_terminal,
            is_whole=len(rows) < EVENTS_AT_ONCE,
        )

    async def logs(self, job_id: str, *, after: int, limit: int) -> LogPage:
        await self._place(job_id)
        rows = await self._jobs.logs(job_id, after=after, limit=limit)
        items = [LogLine.model_validate(row, from_attributes=True) for row in rows]
        return LogPage(items=items, next=items[-1].seq if items else after)
