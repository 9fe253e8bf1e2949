"""Every statement on jobs that the API runs, but for the one that makes them (submission.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Select,
    case,
    delete,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from app.db import now
from app.devices import count
from app.ids import is_id
from app.jobs.events import event
from app.jobs.states import TERMINAL, Status, may_move
from app.jobs.submission import add_job
from app.outbox import wake
from app.quotas.usage import USED, keep_usage
from app.tables import EventRow, IdempotencyRow, JobRow, LogRow, MetricRow, WorkerRow

WAITING = [s for s in Status if may_move(s, Status.CANCELLED) and not s.is_held]
STOPPABLE = [s for s in Status if may_move(s, Status.CANCELLING)]
PAUSABLE = [s for s in Status if may_move(s, Status.PAUSING)]
PAUSE_MESSAGES = {
    Status.PAUSED: "The job was paused while it waited.",
    Status.PAUSING: "The trainer was asked to write a checkpoint and stop.",
}
CANCEL_MESSAGES = {
    Status.CANCELLED: "The job was cancelled before it ran.",
    Status.CANCELLING: "The trainer was asked to stop.",
}


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list shows."""

    statuses: Sequence[Status] = ()
    base_model: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    created_after: datetime | None = None


class JobRepository:
    def __init__(self, session: AsyncSession, *, wakes: bool = False) -> None:
        """``wakes``: a new job leaves a wake-up in the outbox."""
        self._session = session
        self._wakes = wakes

    async def add(self, *, waits: float | None = None, **values: Any) -> tuple[JobRow, int | None]:
        """A new job, its first event and its wake-up; and how many jobs are ahead of it.

        ``waits``: for so many seconds at most, in the queue.
        """
        return await add_job(self._session, values, waits=waits, wakes=self._wakes)

    async def tell(self, job_id: str, type_: str, message: str, **data: Any) -> None:
        """Add an event to a job that this transaction has written."""
        await self._session.execute(event(job_id, type_, message, **data))

    async def largest_slot(self, *, alive_seconds: float) -> int:
        """Devices of the largest slot of all workers that are alive; 0 without any."""
        alive = select(WorkerRow.slots).where(WorkerRow.heartbeat_at >= now(-alive_seconds))
        found = (await self._session.scalars(alive)).all()
        sizes = [count(slot["device"]) for slots in found for slot in slots]
        return max(sizes, default=0)

    async def get(self, job_id: str) -> JobRow | None:
        if not is_id(job_id, "job"):
            return None
        return await self._session.get(JobRow, job_id, populate_existing=True)

    async def lock(self, job_id: str) -> JobRow | None:
        """As ``get``; whoever locks the same job waits until this transaction is over."""
        if not is_id(job_id, "job"):
            return None
        return await self._session.get(JobRow, job_id, populate_existing=True, with_for_update=True)

    async def retry_of(self, job_id: str) -> JobRow | None:
        """The job that does another one again and is not over yet."""
        statement = (
            select(JobRow)
            .where(JobRow.retried_from == job_id, JobRow.status.not_in(TERMINAL))
            .order_by(JobRow.created_at)
            .limit(1)
        )
        return await self._session.scalar(statement)

    async def delete(self, job_id: str) -> bool:
        """With all rows that hang on it, if it is over; what it has used stays charged."""
        statement = delete(JobRow).where(JobRow.id == job_id, JobRow.status.in_(TERMINAL))
        gone = (await self._session.execute(statement.returning(*USED))).one_or_none()
        if gone:
            await self._session.execute(keep_usage(gone))
        return gone is not None

    async def place(self, job_id: str) -> dict[str, Any] | None:
        """Where a job is in its life, without all that is large."""
        if not is_id(job_id, "job"):
            return None
        columns = (JobRow.status, JobRow.phase, JobRow.step, JobRow.total_steps, JobRow.progress)
        found = await self._session.execute(select(*columns).where(JobRow.id == job_id))
        row = found.mappings().one_or_none()
        return dict(row) if row else None

    async def page(
        self, wanted: JobFilter, *, limit: int, after: tuple[datetime, str] | None
    ) -> Sequence[JobRow]:
        """Newest first, from the row after a place in the list; without their reports."""
        without_report = select(JobRow).options(defer(JobRow.report, raiseload=True))
        statement = filtered(without_report, wanted)
        if after:
            statement = statement.where(tuple_(JobRow.created_at, JobRow.id) < after)
        statement = statement.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
        rows: Sequence[JobRow] = (await self._session.scalars(statement)).all()
        return rows

    async def cancel(self, job_id: str) -> None:
        """One statement, so that a job which moves meanwhile is either caught or over."""
        is_waiting = JobRow.status.in_(WAITING)
        statement = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.status.in_(WAITING + STOPPABLE))
            .values(
                status=case((is_waiting, Status.CANCELLED.value), else_=Status.CANCELLING.value),
                finished_at=case((is_waiting, now()), else_=None),
                updated_at=now(),
            )
            .returning(JobRow.status)
        )
        status = await self._session.scalar(statement)
        if status:
            await self._session.execute(
                event(job_id, f"job.{status}", CANCEL_MESSAGES[Status(status)])
            )

    async def pause(self, job_id: str) -> None:
        """As ``cancel``: a job that waits is paused at once, one that runs when it has stopped."""
        is_waiting = JobRow.status == Status.QUEUED
        statement = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.status.in_([Status.QUEUED, *PAUSABLE]))
            .values(
                status=case((is_waiting, Status.PAUSED.value), else_=Status.PAUSING.value),
                paused_at=now(),
                updated_at=now(),
            )
            .returning(JobRow.status)
        )
        if status := await self._session.scalar(statement):
            await self.tell(job_id, f"job.{status}", PAUSE_MESSAGES[Status(status)])

    async def resume(self, job_id: str) -> None:
        """Back into the queue, to wait there for no longer than was left when it was paused."""
        statement = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.status == Status.PAUSED)
            .values(status=Status.QUEUED, available_at=None, updated_at=now())
            .returning(JobRow.queue_deadline, JobRow.paused_at)
        )
        resumed = (await self._session.execute(statement)).one_or_none()
        if resumed is None:
            return
        if resumed.queue_deadline and resumed.paused_at:
            left = (resumed.queue_deadline - resumed.paused_at).total_seconds()
            shifted = update(JobRow).where(JobRow.id == job_id).values(queue_deadline=now(left))
            await self._session.execute(shifted)
        await self.tell(job_id, "job.resumed", "The job waits for a worker again.")
        if self._wakes:
            await self._session.execute(wake(job_id))

    async def events(self, job_id: str, *, after: int, limit: int) -> Sequence[EventRow]:
        statement = (
            select(EventRow)
            .where(EventRow.job_id == job_id, EventRow.seq > after)
            .order_by(EventRow.seq)
            .limit(limit)
        )
        return (await self._session.scalars(statement)).all()

    async def events_of(self, job_id: str, types: Sequence[str]) -> Sequence[EventRow]:
        statement = select(EventRow).where(EventRow.job_id == job_id, EventRow.type.in_(types))
        return (await self._session.scalars(statement.order_by(EventRow.seq))).all()

    async def metrics_at(self, job_id: str, steps: Sequence[int]) -> Sequence[MetricRow]:
        statement = select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.step.in_(steps))
        return (await self._session.scalars(statement)).all()

    async def logs(self, job_id: str, *, after: int, limit: int) -> Sequence[LogRow]:
        statement = (
            select(LogRow)
            .where(LogRow.job_id == job_id, LogRow.seq > after)
            .order_by(LogRow.seq)
            .limit(limit)
        )
        return (await self._session.scalars(statement)).all()

    async def metrics(
        self, job_id: str, *, since_step: int, series: str | None, limit: int
    ) -> Sequence[MetricRow]:
        statement = (
            select(MetricRow)
            .where(MetricRow.job_id == job_id, MetricRow.step >= since_step)
            .order_by(MetricRow.step, MetricRow.series)
            .limit(limit)
        )
        if series:
            statement = statement.where(MetricRow.series == series)
        return (await self._session.scalars(statement)).all()

    async def remembered(self, key: str) -> IdempotencyRow | None:
        statement = select(IdempotencyRow).where(IdempotencyRow.key == key)
        row: IdempotencyRow | None = await self._session.scalar(statement)
        return row

    async def remember(self, key: str, body_sha256: str, job_id: str) -> None:
        self._session.add(
            IdempotencyRow(key=key, body_sha256=body_sha256, job_id=job_id, created_at=now())
        )
        await self._session.flush()


def filtered(statement: Select[Any], wanted: JobFilter) -> Select[Any]:
    if wanted.statuses:
        statement = statement.where(JobRow.status.in_(wanted.statuses))
    if wanted.base_model:
        statement = statement.where(JobRow.base_model == wanted.base_model)
    if wanted.created_after:
        statement = statement.where(JobRow.created_at > wanted.created_after)
    for name, value in wanted.labels.items():
        statement = statement.where(JobRow.labels[name].as_string() == value)
    return statement
