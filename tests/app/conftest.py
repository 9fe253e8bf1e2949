"""The app on a real database that the migrations have made."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from starlette.testclient import TestClient

from app.ids import new_id
from app.main import create_app
from app.migrate import upgrade
from app.settings import Settings
from tests.app.service import Service


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "flatlora.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: str) -> str:
    """Name of a database to copy."""
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        # Thrown away at the end: nothing of it has to survive a power cut.
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("CREATE DATABASE migrated")
    upgrade(_with_name(postgres_server, "migrated"))
    return "migrated"


@pytest.fixture
def migrated_sqlite_url(migrated_file: Path, tmp_path: Path) -> str:
    copy = tmp_path / "flatlora.db"
    shutil.copy(migrated_file, copy)
    return f"sqlite:///{copy}"


@pytest.fixture
def migrated_postgres_url(postgres_server: str, migrated_postgres: str) -> Iterator[str]:
    name = new_id("db")
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_postgres}".encode())
        yield _with_name(postgres_server, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _with_name(server: str, name: str) -> str:
    return server.replace("/postgres?", f"/{name}?").replace("postgresql:", "postgresql+psycopg:")


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
