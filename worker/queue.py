"""Whose turn it is: projects take turns, and within one the lower priority and the older job first.

The statement finds one job among many thousands by a few index look-ups per waiting project.
"""

from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, func, or_, select
from sqlalchemy.orm import aliased

from app.db import now
from app.jobs.states import Status
from app.tables import JobRow

HELD = [status for status in Status if status.is_held]

Job = type[JobRow]


def is_ready(job: Job = JobRow) -> tuple[ColumnElement[bool], ...]:
    """Queued, and not kept back for a while."""
    available = or_(job.available_at.is_(None), job.available_at <= now())
    return (job.status == Status.QUEUED, available)


@cache  # to build it takes many times as long as to run it
def best() -> ScalarSelect[str]:
    """The next job: of the project with the fewest running ones, then the least recently served.

    The row is locked, and one that another worker is taking is passed over.
    """
    job = aliased(JobRow)
    return (
        select(job.id)
        .where(*is_ready(job), job.project == _project())
        .order_by(*_order(job))
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


@cache
def unlocked() -> ScalarSelect[str]:
    """Any job that nobody is taking, for when the one whose turn it is stays locked."""
    job = aliased(JobRow)
    return (
        select(job.id)
        .where(*is_ready(job))
        .order_by(job.project, *_order(job))
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


def _project() -> ScalarSelect[str]:
    """The project whose turn it is."""
    waiting = _waiting_projects()
    running, started, head, first = (aliased(JobRow) for _ in range(4))
    held = (
        select(func.count())
        .select_from(running)
        .where(running.status.in_(HELD), running.project == waiting)
    )
    served = select(func.max(started.started_at)).where(started.project == waiting)
    head_id = (
        select(first.id)
        .where(*is_ready(first), first.project == waiting)
        .order_by(*_order(first))
        .limit(1)
    )
    return (
        select(head.project)
        .select_from(waiting.table)
        .join(head, head.id == head_id.correlate(waiting.table).scalar_subquery())
        .order_by(
            held.correlate(waiting.table).scalar_subquery(),
            served.correlate(waiting.table).scalar_subquery().nulls_first(),
            *_order(head),
        )
        .limit(1)
        .scalar_subquery()
    )


def _waiting_projects() -> Any:
    """Every project that has a queued job, by one index look-up each."""
    first, later = aliased(JobRow), aliased(JobRow)
    projects = (
        select(func.min(first.project).label("project"))
        .where(first.status == Status.QUEUED)
        .cte("waiting", recursive=True)
    )
    following = (
        select(func.min(later.project))
        .where(later.status == Status.QUEUED, later.project > projects.c.project)
        .correlate(projects)
        .scalar_subquery()
    )
    return projects.union_all(select(following).where(projects.c.project.is_not(None))).c.project


def _order(job: Job) -> tuple[Any, ...]:
    return (job.priority, job.created_at, job.id)
