"""The schema's history. ``app/migrate.py`` runs it."""

from alembic import op


def limit_waiting(*, lock: str, statement: str) -> None:
    """Postgres: rather fail than hold up every request behind a waiting ALTER TABLE."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"SET LOCAL lock_timeout = '{lock}'")
        op.execute(f"SET LOCAL statement_timeout = '{statement}'")
