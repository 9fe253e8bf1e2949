"""Every statement on jobs that the API runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import now
from app.jobs.events import event
from app.jobs.states import Status
from app.tables import EventRow, IdempotencyRow, JobRow, MetricRow


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list shows."""

    statuses: Sequence[Status] = ()
    base_model: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    created_after: datetime | None = None


class JobRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def add(self, job: JobRow) -> JobRow:
        self._session.add(job)
        await self._session.flush()
        await self._session.execute(event(job.id, "job.queued", "The job was accepted."))
        await self._session.refresh(job)
        return job

    async def get(self, job_id: str) -> JobRow | None:
        return await self._session.get(JobRow, job_id, populate_existing=True)

    async def page(
        self, wanted: JobFilter, *, limit: int, after: tuple[datetime, str] | None
    ) -> Sequence[JobRow]:
        """Newest first, from the row after a place in the list."""
        statement = _filtered(select(JobRow), wanted)
        if after:
            statement = statement.where(tuple_(JobRow.created_at, JobRow.id) < after)
        statement = statement.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
        rows: Sequence[JobRow] = (await self._session.scalars(statement)).all()
        return rows

    async def queue_positions(self, jobs: Sequence[JobRow]) -> dict[str, int]:
        """How many queued jobs will start before each of these."""
        positions = {}
        for job in jobs:
            if job.status != Status.QUEUED:
                continue
            earlier = select(func.count()).where(
                JobRow.status == Status.QUEUED,
                or_(
                    JobRow.created_at < job.created_at,
                    (JobRow.created_at == job.created_at) & (JobRow.id < job.id),
                ),
            )
            positions[job.id] = (await self._session.scalar(earlier)) or 0
        return positions

    async def cancel(self, job_id: str) -> None:
        """Two moves, at most one of which finds its row; none for a job that is over."""
        waiting = await self._move(
            job_id, (Status.QUEUED, Status.PAUSED), status=Status.CANCELLED, finished_at=now()
        )
        if waiting:
            await self._session.execute(event(job_id, "job.cancelled", "The job was cancelled."))
        elif await self._move(job_id, (Status.RUNNING, Status.PAUSING), status=Status.CANCELLING):
            await self._session.execute(
                event(job_id, "job.cancelling", "The trainer was asked to stop.")
            )

    async def _move(self, job_id: str, origins: Sequence[Status], **values: Any) -> bool:
        statement = (
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.status.in_(origins))
            .values(updated_at=now(), **values)
            .returning(JobRow.id)
        )
        return (await self._session.scalar(statement)) is not None

    async def events(self, job_id: str, *, after: int, limit: int) -> Sequence[EventRow]:
        statement = (
            select(EventRow)
            .where(EventRow.job_id == job_id, EventRow.seq > after)
            .order_by(EventRow.seq)
            .limit(limit)
        )
        return (await self._session.scalars(statement)).all()

    async def metrics(
        self, job_id: str, *, since_step: int, series: str | None
    ) -> Sequence[MetricRow]:
        statement = (
            select(MetricRow)
            .where(MetricRow.job_id == job_id, MetricRow.step >= since_step)
            .order_by(MetricRow.step, MetricRow.series)
        )
        if series:
            statement = statement.where(MetricRow.series == series)
        return (await self._session.scalars(statement)).all()

    async def remembered(self, key: str) -> IdempotencyRow | None:
        return await self._session.get(IdempotencyRow, key)

    async def remember(self, key: str, body_sha256: str, job_id: str) -> None:
        self._session.add(
            IdempotencyRow(key=key, body_sha256=body_sha256, job_id=job_id, created_at=now())
        )
        await self._session.flush()


def _filtered(statement: Select[Any], wanted: JobFilter) -> Select[Any]:
    if wanted.statuses:
        statement = statement.where(JobRow.status.in_(wanted.statuses))
    if wanted.base_model:
        statement = statement.where(JobRow.base_model == wanted.base_model)
    if wanted.created_after:
        statement = statement.where(JobRow.created_at > wanted.created_after)
    for name, value in wanted.labels.items():
        statement = statement.where(JobRow.labels[name].as_string() == value)
    return statement
