"""What a project uses, read through a session that sees that project alone."""

from typing import Any

from sqlalchemy import ColumnElement, Insert, Row, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import now
from app.jobs.states import HELD, Status
from app.tables import DatasetRow, JobRow, UploadRow, UsageRow

WINDOW_DAYS = 30
WINDOW_SECONDS = WINDOW_DAYS * 24 * 3600


USED = (
    JobRow.id, JobRow.project, JobRow.runtime, JobRow.gpus, JobRow.finished_at, JobRow.updated_at,
)  # fmt: skip


def keep_usage(job: JobRow | Row[*tuple[Any, ...]]) -> Insert:
    """For the transaction that deletes a job: its project is charged for it still.

    ``job``: its row, or the columns ``USED`` of it.
    """
    return insert(UsageRow).values(
        job_id=job.id,
        project=job.project,
        ended_at=job.finished_at or job.updated_at,
        gpu_seconds=job.runtime * job.gpus,
    )


def is_past() -> ColumnElement[bool]:
    """Of usage that no limit looks at any more."""
    return UsageRow.ended_at < now(-WINDOW_SECONDS)


async def queued(session: AsyncSession) -> int:
    return await _count(session, JobRow.status == Status.QUEUED)


async def running(session: AsyncSession) -> int:
    return await _count(session, JobRow.status.in_(HELD))


async def _count(session: AsyncSession, condition: ColumnElement[bool]) -> int:
    return await session.scalar(select(func.count(JobRow.id)).where(condition)) or 0


async def gpu_minutes(session: AsyncSession) -> float:
    """Of the jobs that have run in the last thirty days, each whole, and of those since deleted.

    A job that trains on no GPU counts as one that has one.
    """
    spent = func.sum(JobRow.runtime * JobRow.gpus)
    since = now(-WINDOW_SECONDS)
    over = select(spent).where(JobRow.finished_at > since)
    going_on = select(spent).where(JobRow.finished_at.is_(None), JobRow.started_at.is_not(None))
    deleted = select(func.sum(UsageRow.gpu_seconds)).where(UsageRow.ended_at > since)
    seconds = [await session.scalar(part) or 0.0 for part in (over, going_on, deleted)]
    return float(sum(seconds)) / 60


async def stored_bytes(session: AsyncSession) -> int:
    """Of datasets, the same bytes under several names once; and of uploads what is announced."""
    files = select(DatasetRow.sha256, DatasetRow.size).distinct().subquery()
    here = await session.scalar(select(func.sum(files.c.size))) or 0
    coming = await session.scalar(select(func.sum(UploadRow.size))) or 0
    return int(here + coming)


async def is_stored(session: AsyncSession, sha256: str) -> bool:
    known = select(DatasetRow.id).where(DatasetRow.sha256 == sha256).limit(1)
    return await session.scalar(known) is not None


async def has_size(session: AsyncSession, size: int) -> bool:
    known = select(DatasetRow.id).where(DatasetRow.size == size).limit(1)
    return await session.scalar(known) is not None
