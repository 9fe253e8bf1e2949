"""Bringing a database to the schema of this version."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import make_url

import migrations

FOLDER = Path(migrations.__file__).parent


def config(url: str) -> Config:
    settings = Config()
    settings.set_main_option("script_location", str(FOLDER))
    settings.attributes["url"] = url
    return settings


def upgrade(url: str, revision: str = "head") -> None:
    with _alone(url):
        command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    with _alone(url):
        command.downgrade(config(url), revision)


@lru_cache
def head() -> str:
    """The revision that this version's tables need."""
    revision = ScriptDirectory(str(FOLDER)).get_current_head()
    assert revision is not None
    return revision


@contextmanager
def _alone(url: str) -> Iterator[None]:
    """Two processes that start at once migrate one after the other.

    Postgres: an advisory lock, taken in ``migrations/env.py``. SQLite: a lock file beside the
    database, because a migration there is several transactions.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        yield
        return
    database = Path(parsed.database)
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".migrate").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
