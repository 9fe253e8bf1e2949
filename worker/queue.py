"""Whose turn it is: projects take turns, and within one the lower priority and the older job first.

A slot looks only at jobs that need no more GPUs than it has. The statement finds one job among
many thousands by a few index look-ups per waiting project. Where no project has a limit, none is
looked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, Select, func, literal_column, or_, select
from sqlalchemy.orm import aliased

from app.db import now
from app.jobs.states import Status
from app.tables import JobRow
from worker.caps import Cap, held, is_below

Job = type[JobRow]


@dataclass(frozen=True)
class Fit:
    """Which jobs a slot can run.

    Attributes:
        most: GPUs that a job may need; None: any number.
        several: Only those that need more than one.
    """

    most: int | None = None
    several: bool = False

    def of(self, job: Job) -> Iterator[ColumnElement[bool]]:
        if self.most is not None:
            yield job.gpus <= self.most
        if self.several:
            yield job.gpus > literal_column("1")  # as the index that has these jobs alone says it


ANY = Fit()


def is_ready(job: Job = JobRow, fit: Fit = ANY) -> tuple[ColumnElement[bool], ...]:
    """Queued, not kept back for a while, and fit for the slot."""
    available = or_(job.available_at.is_(None), job.available_at <= now())
    return (job.status == Status.QUEUED, available, *fit.of(job))


@cache  # to build it takes many times as long as to run it
def best(fit: Fit = ANY, cap: Cap | None = None) -> ScalarSelect[str]:
    """The next job: of the project with the fewest running ones, then the least recently served.

    The row is locked, and one that another worker is taking is passed over.
    """
    job = aliased(JobRow)
    return (
        select(job.id)
        .where(*is_ready(job, fit), job.project == turn(fit, cap).scalar_subquery())
        .order_by(*_order(job))
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


@cache
def unlocked(fit: Fit = ANY, cap: Cap | None = None) -> ScalarSelect[str]:
    """Any job that nobody is taking, for when the one whose turn it is stays locked."""
    job = aliased(JobRow)
    may_run = () if cap is None else (job.project.in_(_below(cap)),)
    return (
        select(job.id)
        .where(*is_ready(job, fit), *may_run)
        .order_by(job.project, *_order(job))
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


@cache
def turn(fit: Fit = ANY, cap: Cap | None = None) -> Select[str]:
    """The project whose turn it is."""
    waiting = _waiting_projects()
    started, head, first = (aliased(JobRow) for _ in range(3))
    served = select(func.max(started.started_at)).where(started.project == waiting)
    head_id = (
        select(first.id)
        .where(*is_ready(first, fit), first.project == waiting)
        .order_by(*_order(first))
        .limit(1)
    )
    return (
        select(head.project)
        .select_from(waiting.table)
        .join(head, head.id == head_id.correlate(waiting.table).scalar_subquery())
        .where(*(() if cap is None else (is_below(cap, waiting),)))
        .order_by(
            held(waiting),
            served.correlate(waiting.table).scalar_subquery().nulls_first(),
            *_order(head),
        )
        .limit(1)
    )


def _below(cap: Cap) -> Select[str]:
    waiting = _waiting_projects()
    return select(waiting).where(is_below(cap, waiting))


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
