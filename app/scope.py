"""A request sees the rows of its own project, whatever a statement forgets.

The session of a request carries its project. Every ORM statement that it runs on a table that
belongs to a project (`app.tables.Owned`), or that hangs on a job (`app.tables.OfJob`), gets the
condition added here, and every row that it inserts gets the project. A session without a project
runs no such statement at all.
"""

from functools import cached_property
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.orm import ORMExecuteState, Session, UOWTransaction, with_loader_criteria
from sqlalchemy.orm.interfaces import ORMOption

from app.tables import JobRow, OfJob, Owned

PROJECT = "project"


class ScopedSession(Session):
    """One that carries the project of its request in ``info``."""

    @property
    def project(self) -> str:
        """Raises ``KeyError`` if it was opened without one: a mistake of ours."""
        return str(self.info[PROJECT])

    @cached_property
    def conditions(self) -> tuple[ORMOption, ORMOption]:
        """What every statement gets."""
        project = self.project
        return (
            with_loader_criteria(Owned, lambda row: row.project == project, include_aliases=True),
            with_loader_criteria(
                OfJob,
                lambda row: row.job_id.in_(select(JobRow.id).where(JobRow.project == project)),
                include_aliases=True,
            ),
        )


@event.listens_for(ScopedSession, "do_orm_execute")
def _keep_to_the_project(state: ORMExecuteState) -> None:
    session = state.session
    assert isinstance(session, ScopedSession)
    if not state.is_insert:
        state.statement = state.statement.options(*session.conditions)
        return
    mapper = state.bind_mapper
    if mapper is not None and issubclass(mapper.class_, Owned):
        state.statement = state.statement.values(project=session.project)  # type: ignore[attr-defined] # an Insert


@event.listens_for(ScopedSession, "before_flush")
def _give_the_project(session: ScopedSession, _context: UOWTransaction, _rows: Any) -> None:
    for row in session.new:
        if isinstance(row, Owned):
            row.project = session.project
