"""The rules of datasets."""

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets.repository import DatasetFilter, DatasetRepository
from app.datasets.schemas import Dataset, DatasetPage
from app.datasets.uploads import Upload
from app.errors import DatasetInUse, DatasetNotFound
from app.ids import new_id
from app.quotas.service import Quotas
from app.settings import Settings
from app.tables import DatasetRow


class DatasetService:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session
        self._datasets = DatasetRepository(session)

    async def keep(self, upload: Upload, settings: Settings) -> tuple[Dataset, bool]:
        """The dataset with these bytes and this name, and whether it is new."""
        if known := await self._datasets.find(upload.sha256, upload.filename):
            return present(known), False
        await Quotas(self._session, settings).admit_bytes(upload.size, upload.sha256)
        try:
            async with self._session.begin_nested():
                row = await self._datasets.add(
                    id=new_id("ds"),
                    sha256=upload.sha256,
                    filename=upload.filename,
                    size=upload.size,
                )
        except IntegrityError:
            # The same upload in another request, committed a moment ago.
            known = await self._datasets.find(upload.sha256, upload.filename)
            if known is None:
                raise
            return present(known), False
        return present(row), True

    async def get(self, dataset_id: str) -> Dataset:
        row = await self._datasets.get(dataset_id)
        if row is None:
            raise DatasetNotFound(dataset_id)
        return present(row)

    async def delete(self, dataset_id: str) -> None:
        """The bytes stay until the garbage collection finds that nothing refers to them."""
        if await self._datasets.lock(dataset_id) is None:
            raise DatasetNotFound(dataset_id)
        if users := await self._datasets.users(dataset_id):
            raise DatasetInUse(
                f"The dataset {dataset_id} is used by {', '.join(users)}, not over yet.",
                "Wait until its jobs are over, or cancel them.",
            )
        await self._datasets.delete(dataset_id)

    async def list(self, wanted: DatasetFilter, *, limit: int, after: str | None) -> DatasetPage:
        rows = await self._datasets.page(wanted, limit=limit + 1, after=after)
        shown = rows[:limit]
        return DatasetPage(
            items=[present(row) for row in shown],
            next=shown[-1].id if len(rows) > limit else None,
        )


def present(row: DatasetRow) -> Dataset:
    return Dataset(
        id=row.id,
        uri=f"dataset:{row.id}",
        filename=row.filename,
        size=row.size,
        sha256=row.sha256,
        created_at=row.created_at,
    )
