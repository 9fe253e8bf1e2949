"""Every statement on datasets that the API runs."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import now
from app.ids import is_id
from app.tables import DatasetRow


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

    async def add(self, **values: Any) -> DatasetRow:
        statement = insert(DatasetRow).values(created_at=now(), **values)
        return (await self._session.scalars(statement.returning(DatasetRow))).one()

    async def page(self, *, limit: int, after: str | None) -> Sequence[DatasetRow]:
        """Newest first; ids sort by time."""
        statement = select(DatasetRow).order_by(DatasetRow.id.desc()).limit(limit)
        if after:
            statement = statement.where(DatasetRow.id < after)
        return (await self._session.scalars(statement)).all()

    async def delete(self, dataset_id: str) -> None:
        await self._session.execute(delete(DatasetRow).where(DatasetRow.id == dataset_id))
