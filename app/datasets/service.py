"""Uploads: streamed to a file beside the store, hashed on the way, kept once."""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from sqlalchemy.ext.asyncio import AsyncSession

from app.datasets.repository import DatasetRepository
from app.datasets.schemas import Dataset, DatasetPage
from app.db import now
from app.errors import DatasetNotFound, Fault, InvalidRequest, TooLarge
from app.ids import new_id
from app.settings import Settings
from app.storage import ArtifactStore
from app.tables import DatasetRow

MAX_FILENAME = 200


@dataclass(frozen=True)
class Upload:
    """Bytes that have arrived and been stored."""

    filename: str
    size: int
    sha256: str


async def receive(
    chunks: AsyncIterator[bytes], filename: str, settings: Settings, store: ArtifactStore
) -> Upload:
    """Take an upload in without holding it in memory; no database is held open meanwhile."""
    name = safe_filename(filename)
    folder = settings.data_dir / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        size = 0
        digest = hashlib.sha256()
        async for chunk in chunks:
            size += len(chunk)
            if size > settings.max_dataset_bytes:
                raise TooLarge(
                    f"A dataset may have {settings.max_dataset_bytes} bytes.",
                    "Compress it (.gz, .zst), or raise FLATLORA_MAX_DATASET_BYTES.",
                )
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
        if size == 0:
            raise InvalidRequest(
                "The body is empty.",
                "Send the file's bytes, or a form with a part named file.",
                faults=[Fault(pointer="", detail="empty body", code="empty")],
            )
        file.flush()
        await asyncio.to_thread(store.put_file, Path(file.name))
    return Upload(name, size, digest.hexdigest())


class DatasetService:
    def __init__(self, session: AsyncSession) -> None:
        self._datasets = DatasetRepository(session)

    async def keep(self, upload: Upload) -> tuple[Dataset, bool]:
        """The dataset with these bytes, and whether it is new."""
        known = await self._datasets.by_hash(upload.sha256)
        if known:
            return _present(known), False
        row = DatasetRow(
            id=new_id("ds"),
            sha256=upload.sha256,
            filename=upload.filename,
            size=upload.size,
            created_at=now(),
        )
        return _present(await self._datasets.add(row)), True

    async def get(self, dataset_id: str) -> Dataset:
        row = await self._datasets.get(dataset_id)
        if row is None:
            raise DatasetNotFound(dataset_id)
        return _present(row)

    async def list(self, *, limit: int, after: str | None) -> DatasetPage:
        rows = await self._datasets.page(limit=limit + 1, after=after)
        shown = rows[:limit]
        return DatasetPage(
            items=[_present(row) for row in shown],
            next=shown[-1].id if len(rows) > limit else None,
        )


def safe_filename(name: str) -> str:
    """The last part of a path, whichever system wrote it. It is only ever shown, and read for its
    suffix; files are stored under their hash."""
    last = PurePosixPath(PureWindowsPath(name).name).name
    cleaned = "".join(letter for letter in last if letter.isprintable())[-MAX_FILENAME:]
    if cleaned in {"", ".", ".."}:
        raise InvalidRequest(
            "The upload has no file name.",
            "Name it: POST /datasets?filename=rows.jsonl. Its suffix tells the format.",
            faults=[Fault(pointer="filename", detail="missing", code="missing")],
        )
    return cleaned


def _present(row: DatasetRow) -> Dataset:
    return Dataset(
        id=row.id,
        uri=f"dataset:{row.id}",
        filename=row.filename,
        size=row.size,
        sha256=row.sha256,
        created_at=row.created_at,
    )
