"""How many jobs a project may run at a time."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Exists, ScalarSelect, exists, func, or_, select
from sqlalchemy.orm import Session, aliased

from app.jobs.states import HELD
from app.quotas.repository import add_project
from app.tables import NO_LIMIT, JobRow, ProjectRow


class ProjectIsFull(Exception):
    """Another worker has just taken the last job that the project may run."""


@dataclass(frozen=True)
class Cap:
    """Projects that have as many running jobs as they may are passed over.

    Attributes:
        default: What those may have that have no limit of their own; None: any number.
    """

    default: int | None = None


def held(project: Any) -> ScalarSelect[int]:
    """How many jobs of the project, a column, are running."""
    running = aliased(JobRow)
    return (
        select(func.count())
        .select_from(running)
        .where(running.status.in_(HELD), running.project == project)
        .correlate(project.table)
        .scalar_subquery()
    )


def _most(cap: Cap, project: Any) -> ColumnElement[int]:
    """How many may; ``NO_LIMIT``: any number."""
    row = aliased(ProjectRow)
    own = select(row.max_running).where(row.project == project)
    default = NO_LIMIT if cap.default is None else cap.default
    return func.coalesce(own.correlate(project.table).scalar_subquery(), default)


def is_capped() -> Exists:
    """Whether any project has a limit of its own."""
    return exists().where(ProjectRow.max_running.is_not(None))


def is_below(cap: Cap, project: Any) -> ColumnElement[bool]:
    return or_(_most(cap, project) == NO_LIMIT, held(project) < _most(cap, project))


def check_cap(session: Session, project: str, cap: Cap) -> None:
    """Of workers that choose the same project at once none sees the others: they pass one by one.

    Raises:
        ProjectIsFull: With the job that this transaction has taken, the project runs too many.
    """
    session.execute(add_project(session.get_bind().dialect.name, project=project))
    own = ProjectRow.project == project
    session.execute(select(ProjectRow.project).where(own).with_for_update())
    counts = select(held(ProjectRow.project), _most(cap, ProjectRow.project)).where(own)
    running, allowed = session.execute(counts).one()
    if NO_LIMIT != allowed < running:
        raise ProjectIsFull(project)
