"""Runs migrations in the transaction of app/migrate.py, also for the ``alembic`` command."""

from alembic import context
from sqlalchemy import Connection

from app.migrate import migrating
from app.settings import get_settings
from app.tables import Table


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        render_as_batch=True,  # SQLite cannot alter most of a table: it is copied instead
        compare_server_default=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    with migrating(get_settings().database) as connection:
        migrate(connection)
