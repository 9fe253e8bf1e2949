"""Every statement on keys: for requests, and for ``flatlora keys`` beside the service."""

from datetime import timedelta
from typing import Any

from sqlalchemy import Insert, Select, Update, func, insert, select, update
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate

from app.access.keys import NewKey
from app.access.principal import Role
from app.db import now
from app.tables import ApiKeyRow, AuditRow


def add_key(
    new: NewKey, *, name: str, role: Role, lifetime: timedelta | None, by: str, **values: Any
) -> ReturningInsert[Any]:
    """``values``: the project, where the session does not give it."""
    statement = insert(ApiKeyRow).values(
        id=new.id,
        name=name,
        role=role,
        sha256=new.sha256,
        created_at=now(),
        created_by=by,
        expires_at=now(lifetime.total_seconds()) if lifetime else None,
        **values,
    )
    return statement.returning(ApiKeyRow)


def all_keys() -> Select[Any]:
    return select(ApiKeyRow).order_by(ApiKeyRow.created_at.desc(), ApiKeyRow.id)


def revoking(key_id: str) -> ReturningUpdate[Any]:
    """Once revoked it stays revoked since then."""
    statement: Update = update(ApiKeyRow).where(ApiKeyRow.id == key_id)
    statement = statement.values(revoked_at=func.coalesce(ApiKeyRow.revoked_at, now()))
    return statement.returning(ApiKeyRow)


def audit_by_operator(action: str, key_id: str, project: str) -> Insert:
    """For what the command line does beside the service."""
    return insert(AuditRow).values(
        project=project,
        at=now(),
        actor="operator (command line)",
        action=action,
        object=key_id,
        request_id="",
    )
