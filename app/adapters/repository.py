"""The jobs that have an adapter, by an index that holds no others."""

from collections.abc import Sequence

from sqlalchemy import Select, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import load_only

from app.cursors import Place
from app.ids import is_id
from app.jobs.repository import JobFilter, filtered
from app.tables import HAS_ADAPTER, JobRow

SHOWN = (
    JobRow.id, JobRow.name, JobRow.labels, JobRow.base_model, JobRow.spec, JobRow.inputs,
    JobRow.result, JobRow.adapter, JobRow.finished_at,
)  # fmt: skip


class AdapterRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, job_id: str) -> JobRow | None:
        if not is_id(job_id, "job"):
            return None
        row: JobRow | None = await self._session.scalar(with_adapter().where(JobRow.id == job_id))
        return row

    async def page(self, wanted: JobFilter, *, limit: int, after: Place | None) -> Sequence[JobRow]:
        """Newest first, from the row after a place in the list."""
        statement = newest(wanted, limit=limit, after=after)
        rows: Sequence[JobRow] = (await self._session.scalars(statement)).all()
        return rows


def with_adapter() -> Select[JobRow]:
    return (
        select(JobRow)
        .options(load_only(*SHOWN, raiseload=True))
        .where(text(HAS_ADAPTER), JobRow.finished_at.is_not(None))
    )


def newest(wanted: JobFilter, *, limit: int, after: Place | None) -> Select[JobRow]:
    statement = filtered(with_adapter(), wanted)
    if after:
        statement = statement.where(tuple_(JobRow.finished_at, JobRow.id) < after)
    return statement.order_by(JobRow.finished_at.desc(), JobRow.id.desc()).limit(limit)
