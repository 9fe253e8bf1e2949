"""Bringing a database to the schema of this version.

Alembic is imported where it is used: a server that only asks for the head starts without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text

if TYPE_CHECKING:
    from alembic.config import Config

FOLDER = Path(__file__).parent.parent / "migrations"
ADVISORY_LOCK = 0x666C6174  # "flat": one migration at a time on a Postgres database
SQLITE_WAIT_SECONDS = 60


def upgrade(url: str, revision: str = "head") -> None:
    """All or nothing: every migration that is missing, in one transaction."""
    from alembic import command

    with migrating(url) as connection:
        command.upgrade(_config(connection), revision)


def downgrade(url: str, revision: str) -> None:
    from alembic import command

    with migrating(url) as connection:
        command.downgrade(_config(connection), revision)


@lru_cache
def head() -> str:
    """The revision that this version's tables need."""
    from alembic.script import ScriptDirectory

    revision = ScriptDirectory(str(FOLDER)).get_current_head()
    assert revision is not None
    return revision


def _config(connection: Connection) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def migrating(url: str) -> Iterator[Connection]:
    """A transaction in which nobody else migrates; who comes second waits, and finds it done."""
    engine = _engine(url)
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})"))
            yield connection
            if connection.dialect.name == "sqlite":
                _check_references(connection)
    finally:
        engine.dispose()


def _engine(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        folder = Path(make_url(url).database or "").parent
        folder.mkdir(parents=True, exist_ok=True)
        _prepare_sqlite(engine)
    return engine


def _prepare_sqlite(engine: Engine) -> None:
    """The writer's lock from the start, and no foreign keys.

    SQLite alters a table by copying it and dropping the old one; with foreign keys on, that
    deletes the rows of every table that refers to it.
    """

    @event.listens_for(engine, "connect")
    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {SQLITE_WAIT_SECONDS * 1000}")
        connection.execute("PRAGMA foreign_keys = OFF")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _check_references(connection: Connection) -> None:
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
    if broken:
        raise ValueError(f"a migration left rows that refer to nothing, first {broken[0]}")
