"""The service's database, for commands that work beside the service."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, inspect, make_url, text
from sqlalchemy.exc import SQLAlchemyError

from app.cli.output import FAILED, fail
from app.cli.up import explained
from app.db import make_engine
from app.migrate import head
from app.settings import Settings


@contextmanager
def our_database(settings: Settings) -> Iterator[Engine]:
    """One that a service has made, at this version's migration: none is made here."""
    engine = _engine(settings)
    try:
        yield engine
    except SQLAlchemyError as error:
        fail(f"the database does not answer: {str(error).splitlines()[0]}", code=FAILED)
    finally:
        engine.dispose()


def _engine(settings: Settings) -> Engine:
    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        fail(
            f"there is no database at {url.database}",
            "Set FLATLORA_DATA_DIR or FLATLORA_DATABASE_URL to those of the service.",
        )
    with explained("FLATLORA_DATABASE_URL"):
        engine = make_engine(settings.database)
        with engine.connect() as connection:
            is_ours = inspect(connection).has_table("alembic_version")
            query = text("SELECT version_num FROM alembic_version")
            found = connection.scalar(query) if is_ours else None
    if found != head():
        fail(
            f"the database is at migration {found or 'none'}, this program expects {head()}",
            "Run `flatlora migrate`.",
        )
    return engine
