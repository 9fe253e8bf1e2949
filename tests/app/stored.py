"""A store under test, and what others, time and power cuts may do to what lies there."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
import pytest

from app.settings import Settings
from app.storage import ArtifactStore, open_store
from tests.s3 import S3Server


@dataclass
class Stored:
    store: ArtifactStore
    url: str
    folder: Path | None
    """Where it is one."""
    s3: S3Server | None

    @property
    def is_azure(self) -> bool:
        return self.url.startswith("az:")

    def listed(self, prefix: str | None = None) -> set[str]:
        found = obstore.list(self.store.raw, prefix).collect()
        return {entry["path"] for entry in found} - {"clock"}

    def read(self, key: str) -> bytes:
        return bytes(obstore.get(self.store.raw, key).bytes())

    def damage(self, key: str, body: bytes | None) -> None:
        if body is None:
            obstore.delete(self.store.raw, key)
        elif self.folder:
            (self.folder / key).write_bytes(body)
        else:
            obstore.put(self.store.raw, key, body)

    def age(self, key: str, **by: float) -> None:
        """Make it look older: ``hours=13``."""
        if self.folder:
            path = self.folder / key
            then = path.stat().st_mtime - timedelta(**by).total_seconds()
            os.utime(path, (then, then))
        elif self.s3:
            prefix = self.url.removeprefix(self.s3.url()).lstrip("/")
            self.s3.age(f"{prefix}/{key}", timedelta(**by))
        else:
            pytest.skip("Azurite has no way to make a blob look older")

    def age_of(self, key: str) -> timedelta:
        return datetime.now(UTC) - obstore.head(self.store.raw, key)["last_modified"]


def local(folder: Path) -> Stored:
    store = open_store(Settings(store_url=f"file://{folder}"))
    return Stored(store, f"file://{folder}", folder, None)


@pytest.fixture
def local_stored(tmp_path: Path) -> Stored:
    return local(tmp_path / "store")


@pytest.fixture
def s3_stored(s3_server: S3Server, s3_url: str) -> Stored:
    return Stored(open_store(Settings(store_url=s3_url)), s3_url, None, s3_server)


@pytest.fixture
def azure_stored(azure_url: str) -> Stored:
    return Stored(open_store(Settings(store_url=azure_url)), azure_url, None, None)


@pytest.fixture(params=["local", "s3", pytest.param("azure", marks=pytest.mark.torture)])
def stored(request: pytest.FixtureRequest) -> Stored:
    """Each test that asks for it runs once on a folder, and once on a real S3 server.

    Where torture is asked for, also on Azurite.
    """
    found: Stored = request.getfixturevalue(f"{request.param}_stored")
    return found
