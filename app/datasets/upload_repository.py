"""Every statement on uploads in parts that the API runs."""

from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import now
from app.ids import new_id
from app.tables import UploadPartRow, UploadRow


class UploadRepository:
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def find(self, sha256: str) -> UploadRow | None:
        statement = select(UploadRow).where(UploadRow.sha256 == sha256)
        return await self._session.scalar(statement.execution_options(populate_existing=True))

    async def add(self, **values: Any) -> UploadRow:
        statement = insert(UploadRow).values(
            id=new_id("up"), received=0, created_at=now(), updated_at=now(), **values
        )
        return (await self._session.scalars(statement.returning(UploadRow))).one()

    async def touch(self, upload_id: str, filename: str) -> UploadRow | None:
        """Somebody goes on with it, under this name; none: it is gone."""
        statement = update(UploadRow).where(UploadRow.id == upload_id)
        statement = statement.values(filename=filename, updated_at=now())
        options = {"synchronize_session": False, "populate_existing": True}
        found = await self._session.scalars(
            statement.returning(UploadRow).execution_options(**options)
        )
        return found.one_or_none()

    async def advance(self, upload_id: str, *, start: int, size: int, name: str) -> bool:
        """Let a part count, if it is the first one at its place."""
        end = start + size
        statement = (
            update(UploadRow)
            .where(UploadRow.id == upload_id, UploadRow.received == start)
            .values(received=end, updated_at=now())
            .returning(UploadRow.id)
        )
        if await self._session.scalar(statement) is None:
            return False
        part = {"upload_id": upload_id, "start": start, "size": size, "name": name}
        await self._session.execute(insert(UploadPartRow).values(part))
        return True

    async def count(self, upload_id: str) -> int:
        statement = select(func.count()).where(UploadPartRow.upload_id == upload_id)
        return await self._session.scalar(statement) or 0

    async def parts(self, upload_id: str) -> dict[str, int]:
        """Names and sizes, in order."""
        statement = (
            select(UploadPartRow.name, UploadPartRow.size)
            .where(UploadPartRow.upload_id == upload_id)
            .order_by(UploadPartRow.start)
        )
        return dict((await self._session.execute(statement)).all())

    async def remove(self, upload_id: str) -> bool:
        """Whether it was still there."""
        statement = delete(UploadRow).where(UploadRow.id == upload_id).returning(UploadRow.id)
        return await self._session.scalar(statement) is not None
