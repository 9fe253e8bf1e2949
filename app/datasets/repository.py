"""Every statement on datasets that the API runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import now
from app.ids import is_id
from app.jobs.states import Status
from app.tables import DatasetRow, JobRow

MOST_NAMED = 3  # of the jobs that hold a dataset, in the refusal


@dataclass(frozen=True)
class DatasetFilter:
    """Which datasets a list shows."""

    sha256: str | None = None
    filename: str | None = None


class DatasetRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, dataset_id: str) -> DatasetRow | None:
        if not is_id(dataset_id, "ds"):
            return None
        return await self._session.get(DatasetRow, dataset_id)

    async def find(self, sha256: str, filename: str) -> DatasetRow | None:
        statement = select(DatasetRow).where(
            DatasetRow.sha256 == sha256, DatasetRow.filename == filename
        )
        return await self._session.scalar(statement)

    async def held(self, dataset_id: str) -> DatasetRow | None:
        """The same, kept from being removed until this transaction is over."""
        if not is_id(dataset_id, "ds"):
            return None
        statement = select(DatasetRow).where(DatasetRow.id == dataset_id)
        return await self._session.scalar(statement.with_for_update(read=True, key_share=True))

    async def held_by_hash(self, sha256: str) -> DatasetRow | None:
        """The newest with these bytes, under whatever name, kept in the same way."""
        statement = (
            select(DatasetRow)
            .where(DatasetRow.sha256 == sha256)
            .order_by(DatasetRow.id.desc())
            .limit(1)
        )
        return await self._session.scalar(statement.with_for_update(read=True, key_share=True))

    async def by_hash(self, sha256: str) -> DatasetRow | None:
        page = await self.page(DatasetFilter(sha256=sha256), limit=1, after=None)
        return page[0] if page else None

    async def delete(self, dataset_id: str) -> None:
        await self._session.execute(delete(DatasetRow).where(DatasetRow.id == dataset_id))

    async def lock(self, dataset_id: str) -> DatasetRow | None:
        """To remove it: whoever has it ``held`` is waited for."""
        if not is_id(dataset_id, "ds"):
            return None
        statement = select(DatasetRow).where(DatasetRow.id == dataset_id)
        return await self._session.scalar(statement.with_for_update())

    async def users(self, dataset_id: str) -> Sequence[str]:
        """Some of the jobs that are not over and name it."""
        uri = f"dataset:{dataset_id}"
        held_out = JobRow.spec["evaluation"]["validation_uri"].as_string()
        statement = (
            select(JobRow.id)
            .where(
                JobRow.status.in_([status for status in Status if not status.is_terminal]),
                or_(JobRow.dataset_uri == uri, held_out == uri),
            )
            .limit(MOST_NAMED)
        )
        return (await self._session.scalars(statement)).all()

    async def add(self, **values: Any) -> DatasetRow:
        statement = insert(DatasetRow).values(created_at=now(), **values)
        return (await self._session.scalars(statement.returning(DatasetRow))).one()

    async def page(
        self, wanted: DatasetFilter, *, limit: int, after: str | None
    ) -> Sequence[DatasetRow]:
        """Newest first; ids sort by time."""
        statement = select(DatasetRow).order_by(DatasetRow.id.desc()).limit(limit)
        if wanted.sha256:
            statement = statement.where(DatasetRow.sha256 == wanted.sha256)
        if wanted.filename:
            statement = statement.where(DatasetRow.filename == wanted.filename)
        if after:
            statement = statement.where(DatasetRow.id < after)
        return (await self._session.scalars(statement)).all()
