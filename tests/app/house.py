"""A database and a store under test, with what jobs and uploads leave in both."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from app.db import make_engine
from app.ids import new_id
from app.jobs.states import Status
from app.retention import Cleaned, Retention
from app.settings import Settings
from app.storage import ArtifactStore
from app.tables import DatasetRow, JobRow, Table
from tests.app.stored import Stored


@dataclass
class House:
    """A database and a store."""

    engine: Engine
    stored: Stored
    settings: Settings
    scratch: Path

    def clean(self, *, dry_run: bool = False, store: ArtifactStore | None = None) -> Cleaned:
        retention = Retention(self.engine, store or self.stored.store, self.settings)
        return retention.clean(dry_run=dry_run)

    def put(self, body: bytes, *, hours: float = 30) -> str:
        """A file in the store, so old."""
        self.scratch.write_bytes(body)
        digest = self.stored.store.put_file(self.scratch)
        self.stored.age(blob(digest), hours=hours)
        return digest

    def add(self, *rows: Table) -> None:
        with Session(self.engine.execution_options(writes=True)) as session, session.begin():
            session.add_all(rows)

    def job(self, status: Status, *, days: float = 0, **values: Any) -> str:
        """A job that ended so long ago, or has not."""
        job_id, then = new_id("job"), datetime.now(UTC) - timedelta(days=days)
        ended = {"finished_at": then} if status.is_terminal else {}
        self.add(
            JobRow(
                id=job_id, base_model="file:m", dataset_uri="file:d", spec={}, status=status,
                created_at=then, updated_at=then, **ended, **values,
            )
        )  # fmt: skip
        return job_id

    def checkpoint(self, job_id: str, *, hours: float = 30) -> None:
        folder = self.scratch.parent / "ckpt"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_bytes(b"{}")
        self.stored.store.put_checkpoint(job_id, 1, 10, folder)
        self.stored.age(f"jobs/{job_id}/checkpoints/1/10/state.json", hours=hours)

    def manifest(self, job_id: str, *digests: str, hours: float = 30) -> None:
        manifest = {"job_id": job_id, "adapter": adapter(*digests), "result": {}}
        self.stored.store.put_manifest(job_id, manifest)
        self.stored.age(f"jobs/{job_id}/manifest.json", hours=hours)

    def ids(self) -> set[str]:
        with Session(self.engine) as session:
            return set(session.scalars(select(JobRow.id)))

    def count(self, table: type[Table]) -> int:
        with Session(self.engine) as session:
            return session.scalar(select(func.count()).select_from(table)) or 0


def blob(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def adapter(*digests: str) -> dict[str, Any]:
    return {"files": [{"name": f"f{n}", "sha256": digest} for n, digest in enumerate(digests)]}


def dataset(digest: str) -> DatasetRow:
    return DatasetRow(
        id=new_id("ds"), sha256=digest, filename="a.jsonl", size=1, created_at=datetime.now(UTC)
    )


@pytest.fixture(params=["sqlite-local", "postgres-s3"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """Each test runs on both databases and on both stores, in two runs."""
    database, store = request.param.split("-")
    url = request.getfixturevalue(f"migrated_{database}_url")
    stored = request.getfixturevalue(f"{store}_stored")
    values = {"data_dir": tmp_path / "data", "database_url": url, "store_url": stored.url}
    engine = make_engine(url)
    yield House(engine, stored, Settings.model_validate(values), tmp_path / "scratch")
    engine.dispose()


@pytest.fixture
def used(house: House) -> House:
    """One with a dataset, so that its database is not an empty one."""
    house.add(dataset(house.put(b"the rows of somebody")))
    return house


def keeping(house: House, **values: Any) -> House:
    settings = house.settings.model_copy(update=values)
    return House(house.engine, house.stored, settings, house.scratch)


def environment(house: House) -> dict[str, str]:
    return {
        **os.environ,
        "FLATLORA_DATA_DIR": str(house.settings.data_dir),
        "FLATLORA_DATABASE_URL": house.settings.database_url,
        "FLATLORA_STORE_URL": house.settings.store_url,
        "FLATLORA_KEEP_JOBS_DAYS": "30",
    }
