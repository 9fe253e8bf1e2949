"""Every statement on datasets that the API runs."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.tables import DatasetRow


class DatasetRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, dataset_id: str) -> DatasetRow | None:
        return await self._session.get(DatasetRow, dataset_id)

    async def by_hash(self, sha256: str) -> DatasetRow | None:
        return await self._session.scalar(select(DatasetRow).where(DatasetRow.sha256 == sha256))

    async def add(self, dataset: DatasetRow) -> DatasetRow:
        self._session.add(dataset)
        await self._session.flush()
        await self._session.refresh(dataset)
        return dataset

    async def page(self, *, limit: int, after: str | None) -> Sequence[DatasetRow]:
        """Newest first; ids sort by time."""
        statement = select(DatasetRow).order_by(DatasetRow.id.desc()).limit(limit)
        if after:
            statement = statement.where(DatasetRow.id < after)
        return (await self._session.scalars(statement)).all()
