"""Every statement on projects: for requests, and for ``flatlora projects`` beside the service."""

from typing import Any

from sqlalchemy import Select, Update, func, select, union, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import Insert, ReturningUpdate

from app.jobs.states import HELD, Status
from app.tables import ApiKeyRow, DatasetRow, JobRow, ProjectRow


def add_project(dialect: str, **values: str) -> Insert:
    """Unless it is there. ``values``: the project, where the session does not give it."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(ProjectRow).values(**values).on_conflict_do_nothing()


def limiting(project: str, limits: dict[str, Any]) -> ReturningUpdate[Any]:
    statement: Update = update(ProjectRow).where(ProjectRow.project == project)
    return statement.values(**limits).returning(ProjectRow)


def all_projects() -> Select[Any]:
    """Every project that has a limit, a key, a job or a dataset, with its queue."""
    rows = (ProjectRow, ApiKeyRow, JobRow, DatasetRow)
    names = union(*(select(row.project) for row in rows)).subquery()
    return (
        select(names.c.project, ProjectRow, _jobs([Status.QUEUED], names), _jobs(HELD, names))
        .outerjoin_from(names, ProjectRow, ProjectRow.project == names.c.project)
        .order_by(names.c.project)
    )


def _jobs(statuses: list[Status], names: Any) -> Any:
    counted = select(func.count(JobRow.id)).where(
        JobRow.project == names.c.project, JobRow.status.in_(statuses)
    )
    return counted.correlate(names).scalar_subquery()
