"""The app on a real database that the migrations have made."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.app.house import house as house
from tests.app.house import used as used
from tests.app.service import Service
from tests.app.stored import azure_stored as azure_stored
from tests.app.stored import local_stored as local_stored
from tests.app.stored import s3_stored as s3_stored
from tests.app.stored import stored as stored


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite_url: str) -> Settings:
    """Tests that need other settings override this."""
    return make_settings(tmp_path, migrated_sqlite_url)


def make_settings(folder: Path, url: str, **values: object) -> Settings:
    rows, models = folder / "rows", folder / "models"
    rows.mkdir(exist_ok=True)
    models.mkdir(exist_ok=True)
    given = {
        "data_dir": folder / "data",
        "database_url": url,
        "auth": "none",
        "dataset_roots": [rows],
        "model_roots": [models],
    }
    return Settings.model_validate(given | values)


def serve(settings: Settings) -> Iterator[Service]:
    with TestClient(create_app(settings), base_url="http://localhost") as http:
        service = Service(http, settings)
        yield service
        service.engine.dispose()


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    yield from serve(settings)


@pytest.fixture(params=["sqlite", "postgres"])
def any_service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    """Each test that asks for it runs once on each database."""
    url = request.getfixturevalue(f"migrated_{request.param}_url")
    yield from serve(make_settings(tmp_path, url))
