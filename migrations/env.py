"""Runs migrations on the database whose URL the caller gives (app/migrate.py), or the settings."""

from alembic import context
from sqlalchemy import Connection, text

from app.db import make_engine
from app.settings import get_settings
from app.tables import Table

ADVISORY_LOCK = 0x666C6174  # "flat": one migration at a time on a Postgres database
LOCK_TIMEOUT = "5s"  # rather fail than hold up every request behind a waiting ALTER TABLE
STATEMENT_TIMEOUT = "60s"


def run() -> None:
    url = context.config.attributes.get("url") or get_settings().database
    engine = make_engine(url)
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_lock({ADVISORY_LOCK})"))
            connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
            connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'"))
            connection.commit()
        migrate(connection)
    engine.dispose()


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        render_as_batch=True,  # SQLite cannot alter most of a table: it is copied instead
        transaction_per_migration=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


run()
