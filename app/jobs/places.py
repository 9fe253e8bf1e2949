"""Places in the queue: how many queued jobs of the same project will start before one.

Counted to ``POSITIONS_LIMIT``, so that a long queue costs a request no more than a short one.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, Select, bindparam, case, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.jobs.states import Status
from app.tables import JobRow

POSITIONS_LIMIT = 1000


def _ahead(job: Any, *conditions: ColumnElement[bool]) -> ScalarSelect[int]:
    """How many jobs are ahead of the row of the enclosing statement."""
    queued = (job.status == Status.QUEUED, job.project == JobRow.project)
    return counted(select(job.id).where(*queued, *conditions).correlate(JobRow))


def counted(jobs: Select[Any]) -> ScalarSelect[int]:
    """How many there are, to the limit."""
    some = jobs.limit(POSITIONS_LIMIT).subquery()
    return select(func.count()).select_from(some).scalar_subquery()


def _place_of_the_row() -> ColumnElement[int | None]:
    sooner, same = aliased(JobRow), aliased(JobRow)
    older = tuple_(same.created_at, same.id) < tuple_(JobRow.created_at, JobRow.id)
    ahead = _ahead(sooner, sooner.priority < JobRow.priority) + _ahead(
        same, same.priority == JobRow.priority, older
    )
    return case((JobRow.status == Status.QUEUED, ahead))


# Built once: to build a statement takes longer than to run it.
_ONE = JobRow.id == bindparam("job_id")
PLACE = select(_place_of_the_row()).where(_ONE)
WITH_PLACE = select(JobRow, _place_of_the_row()).where(_ONE)


async def with_place(session: AsyncSession, job_id: str) -> tuple[JobRow, int | None] | None:
    """A job as it is now, with its place if it is queued."""
    options = {"populate_existing": True}
    found = await session.execute(WITH_PLACE, {"job_id": job_id}, execution_options=options)
    row = found.one_or_none()
    return (row[0], _limited(row[1])) if row else None


async def place(session: AsyncSession, job_id: str) -> int | None:
    return _limited(await session.scalar(PLACE, {"job_id": job_id}))


def _limited(found: int | None) -> int | None:
    return None if found is None else min(found, POSITIONS_LIMIT)


async def places(session: AsyncSession, jobs: Sequence[JobRow]) -> dict[str, int]:
    """Of a page of jobs: two statements for each project and priority in it."""
    lines: dict[tuple[str, int], list[JobRow]] = {}
    for job in jobs:
        if job.status == Status.QUEUED:
            lines.setdefault((job.project, job.priority), []).append(job)
    found: dict[str, int] = {}
    for (project, priority), waiting in lines.items():
        waiting.sort(key=_moment)
        line = _Line(session, project, priority)
        found |= await line.places(waiting)
    return found


class _Line:
    """The queued jobs of one project with one priority, the oldest first."""

    def __init__(self, session: AsyncSession, project: str, priority: int) -> None:
        self._session = session
        self._queued = (JobRow.status == Status.QUEUED, JobRow.project == project)
        self._priority = priority

    async def places(self, waiting: Sequence[JobRow]) -> dict[str, int]:
        first, last = waiting[0], waiting[-1]
        moment, same = tuple_(JobRow.created_at, JobRow.id), JobRow.priority == self._priority
        counts = select(
            self._counted(JobRow.priority < self._priority)
            + self._counted(same, moment < _moment(first))
        )
        sooner = await self._session.scalar(counts) or 0
        later = select(JobRow.id).where(*self._queued, same, moment >= _moment(first))
        later = later.where(moment <= _moment(last)).order_by(JobRow.created_at, JobRow.id)
        if sooner >= POSITIONS_LIMIT or len(waiting) == 1:
            between = [job.id for job in waiting]
        else:
            between = list(await self._session.scalars(later.limit(POSITIONS_LIMIT - sooner)))
        found = {job_id: sooner + index for index, job_id in enumerate(between)}
        return {job.id: min(found.get(job.id, POSITIONS_LIMIT), POSITIONS_LIMIT) for job in waiting}

    def _counted(self, *conditions: ColumnElement[bool]) -> ScalarSelect[int]:
        some = select(JobRow.id).where(*self._queued, *conditions).limit(POSITIONS_LIMIT)
        return select(func.count()).select_from(some.subquery()).scalar_subquery()


def _moment(job: JobRow) -> tuple[datetime, str]:
    return job.created_at, job.id
