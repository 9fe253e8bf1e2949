"""A database with the tables in it, for what the worker's parts say to it."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine
from structlog.testing import capture_logs
from structlog.typing import EventDict

from app.db import make_engine
from app.settings import Settings
from app.tables import Table
from worker.claims import Claims

POSTGRES = "postgresql+psycopg:"


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[EventDict]]:
    """What is logged meanwhile; shown where a test fails, and in colours for nobody."""
    with capture_logs() as entries:
        yield entries
    for entry in entries:
        print(entry)  # noqa: T201


@pytest.fixture(scope="session")
def shared_postgres_url(postgres_server: str, migrated_postgres: str) -> str:
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE shared TEMPLATE {migrated_postgres}".encode())
    return postgres_server.replace("/postgres?", "/shared?").replace("postgresql:", POSTGRES)


@pytest.fixture
def migrated_postgres_url(shared_postgres_url: str) -> str:
    """Emptied, which is faster than a new one."""
    with psycopg.connect(shared_postgres_url.replace(POSTGRES, "postgresql:")) as connection:
        names = ", ".join(Table.metadata.tables)
        connection.execute(f"TRUNCATE {names} RESTART IDENTITY".encode())
    return shared_postgres_url


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    engine = make_engine(migrated_url)
    yield engine
    engine.dispose()


@pytest.fixture
def claims(engine: Engine) -> Claims:
    return Claims(engine, worker="w1", lease_seconds=60, max_attempts=3)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of an embedded service that has nothing yet."""
    return Settings(data_dir=tmp_path / "data", dataset_roots=[tmp_path], model_roots=[tmp_path])
