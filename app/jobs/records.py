"""What is written down of a job while it runs: its events, its log, its checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import JobNotFound
from app.jobs.answers import Checkpoint, CheckpointPage, Event, LogLine, LogPage
from app.jobs.repository import JobRepository
from app.jobs.states import Status
from app.tables import EventRow, JobRow

EVENTS_AT_ONCE = 200
WRITTEN, REFUSED = "job.checkpoint", "job.checkpoint_refused"


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

    async def checkpoints(self, job_id: str, *, after: int, limit: int) -> CheckpointPage:
        """By what the trainer has said of each when it was written, or found damaged later."""
        job = await self._jobs.get(job_id)
        if job is None:
            raise JobNotFound(job_id)
        told = await self._jobs.events_of(job_id, [WRITTEN, REFUSED])
        newest = {event.data["step"]: event for event in told if event.type == WRITTEN}
        refused = _refused(told)
        steps = sorted(step for step in newest if step > after)
        shown = steps[:limit]
        losses = {
            (row.series, row.step): row.data.get("loss")
            for row in await self._jobs.metrics_at(job_id, shown)
        }
        kept = _kept(job, told) - refused
        items = [
            Checkpoint(
                step=step,
                loss=losses.get(("train", step)),
                held_out_loss=losses.get(("held_out", step)),
                size=newest[step].data.get("size"),
                verified=False if step in refused else newest[step].data.get("verified"),
                kept=step in kept,
                created_at=newest[step].at,
            )
            for step in shown
        ]
        return CheckpointPage(items=items, next=shown[-1] if len(steps) > limit else None)


def _kept(job: JobRow, told: Sequence[EventRow]) -> set[int]:
    """What its worker has, by its last word, and the store; of a job that is over nothing."""
    if Status(job.status).is_terminal:
        return set()
    stored = {job.checkpoint["step"]} if job.checkpoint else set()
    written = [event for event in told if event.type == WRITTEN]
    return stored | set(written[-1].data.get("kept", []) if written else [])


def _refused(told: Sequence[EventRow]) -> set[int]:
    """Steps whose checkpoint was found damaged, and has not been written again since."""
    refused = set()
    for event in told:
        if event.type == WRITTEN:
            refused.discard(event.data["step"])
        else:
            refused.add(int(event.data["checkpoint"].rpartition("-")[2]))
    return refused
