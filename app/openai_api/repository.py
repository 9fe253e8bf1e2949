"""Lists in OpenAI's order, which is not that of the native ones."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from app.jobs.states import Status
from app.tables import HAS_ADAPTER, DatasetRow, EventRow, JobRow, MetricRow

FINISHED = (JobRow.status == Status.SUCCEEDED, text(HAS_ADAPTER))
Metrics = Mapping[tuple[str, int], Mapping[str, Any]]
"""By series and step."""


class OpenAIRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def datasets(
        self, *, limit: int, after: str | None, is_ascending: bool
    ) -> Sequence[DatasetRow]:
        """By time, which their ids sort by."""
        statement = select(DatasetRow).limit(limit)
        if is_ascending:
            statement = statement.order_by(DatasetRow.id)
        else:
            statement = statement.order_by(DatasetRow.id.desc())
        if after:
            statement = statement.where(
                DatasetRow.id > after if is_ascending else DatasetRow.id < after
            )
        return (await self._session.scalars(statement)).all()

    async def with_adapter(
        self, *, limit: int, after: str | None, is_ascending: bool
    ) -> Sequence[JobRow]:
        """Jobs that have one, by the time of their submission."""
        statement = select(JobRow).where(*FINISHED).options(defer(JobRow.report)).limit(limit)
        if is_ascending:
            statement = statement.order_by(JobRow.id)
        else:
            statement = statement.order_by(JobRow.id.desc())
        if after:
            statement = statement.where(JobRow.id > after if is_ascending else JobRow.id < after)
        return (await self._session.scalars(statement)).all()

    async def adapters(self) -> Sequence[tuple[str, str, datetime]]:
        """Id, project and end of every job that has one, newest first."""
        statement = (
            select(JobRow.id, JobRow.project, JobRow.finished_at)
            .where(*FINISHED)
            .order_by(JobRow.created_at.desc(), JobRow.id.desc())
        )
        found = await self._session.execute(statement)
        return [(job_id, project, at) for job_id, project, at in found if at]

    async def jobs(
        self, *, limit: int, after: JobRow | None, labels: Mapping[str, str] | None
    ) -> Sequence[JobRow]:
        """Newest first. ``labels``: that they have; None: those that have none."""
        statement = select(JobRow).options(defer(JobRow.report)).limit(limit)
        statement = statement.order_by(JobRow.created_at.desc(), JobRow.id.desc())
        if after:
            place = (after.created_at, after.id)
            statement = statement.where(tuple_(JobRow.created_at, JobRow.id) < place)
        if labels is None:
            statement = statement.where(JobRow.labels == {})
        for name, value in (labels or {}).items():
            statement = statement.where(JobRow.labels[name].as_string() == value)
        return (await self._session.scalars(statement)).all()

    async def events(self, job_id: str, *, limit: int, before: int | None) -> Sequence[EventRow]:
        """Newest first."""
        statement = select(EventRow).where(EventRow.job_id == job_id)
        if before is not None:
            statement = statement.where(EventRow.seq < before)
        statement = statement.order_by(EventRow.seq.desc()).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def checkpoints(self, job_id: str) -> Sequence[EventRow]:
        """The last event of each step that was kept, the latest step first."""
        statement = (
            select(EventRow)
            .where(EventRow.job_id == job_id, EventRow.type == "job.checkpoint")
            .order_by(EventRow.seq)
        )
        by_step = {row.data["step"]: row for row in await self._session.scalars(statement)}
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    async def metrics(self, job_id: str, steps: Sequence[int] | None = None) -> Metrics:
        """Of these steps, or of all."""
        statement = select(MetricRow).where(MetricRow.job_id == job_id).order_by(MetricRow.step)
        if steps is not None:
            statement = statement.where(MetricRow.step.in_(steps))
        found: dict[tuple[str, int], Mapping[str, Any]] = defaultdict(dict)
        for row in await self._session.scalars(statement):
            found[row.series, row.step] = row.data
        return found
