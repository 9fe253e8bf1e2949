"""Finished adapters, as the rows of their jobs tell them."""

from urllib.parse import quote

from sqlalchemy.ext.asyncio import AsyncSession

from app.adapters.repository import AdapterRepository
from app.adapters.schemas import AdapterMetrics, AdapterPage, FinishedAdapter, StoredFile
from app.cursors import cursor_of, place_of
from app.errors import AdapterNotFound
from app.jobs.answers import Adapter
from app.jobs.repository import JobFilter
from app.tables import JobRow


class AdapterService:
    def __init__(self, session: AsyncSession, root_path: str) -> None:
        """``root_path``: below which the service is reached."""
        self._adapters = AdapterRepository(session)
        self._root = root_path

    async def get(self, job_id: str) -> FinishedAdapter:
        row = await self._adapters.get(job_id)
        if row is None:
            raise AdapterNotFound(job_id)
        return self._present(row)

    async def list(self, wanted: JobFilter, *, limit: int, after: str | None) -> AdapterPage:
        place = place_of(after, "job") if after else None
        rows = await self._adapters.page(wanted, limit=limit + 1, after=place)
        items = [self._present(row) for row in rows[:limit]]
        more = len(rows) > limit
        return AdapterPage(
            items=items,
            next=cursor_of((items[-1].created_at, items[-1].job_id)) if more else None,
        )

    def _present(self, row: JobRow) -> FinishedAdapter:
        adapter = Adapter.model_validate(row.adapter)
        url = f"{self._root}/jobs/{row.id}/adapter"
        assert row.finished_at is not None, "a job without an end is none of these"
        return FinishedAdapter(
            job_id=row.id,
            name=row.name,
            labels=row.labels,
            base_model=row.base_model,
            base_model_revision=_revision(row),
            rank=row.spec["rank"],
            sigma=row.spec["sigma"],
            metrics=AdapterMetrics.of(row.result or {}),
            size=adapter.size,
            files=[
                StoredFile(**file.model_dump(), url=f"{url}/{quote(file.name, safe='')}")
                for file in adapter.files
            ],
            url=url,
            created_at=row.finished_at,
        )


def _revision(row: JobRow) -> str | None:
    """The trainer says which commit it had; of older jobs a cluster has pinned it."""
    result, inputs = row.result or {}, row.inputs or {}
    pinned = (inputs.get("base_model") or {}).get("revision")
    return result.get("base_model_revision") or pinned or row.spec.get("base_model_revision")
