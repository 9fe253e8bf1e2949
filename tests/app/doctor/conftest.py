from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests.app.conftest import make_settings
from tests.app.doctor.patients import Make
from tests.faults.servers import RedisServer


@pytest.fixture
def make(tmp_path: Path, migrated_sqlite_url: str) -> Make:
    def make(**values: object) -> Settings:
        url = values.pop("database_url", migrated_sqlite_url)
        return make_settings(tmp_path, str(url), **values)

    return make


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), appendonly=True) as server:
        yield server
