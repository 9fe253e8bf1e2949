"""Keys of several projects, and requests with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.tables import ApiKeyRow, AuditRow
from tests.app.service import Json, Service, ok


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def operator(service: Service) -> dict[str, str]:
    return bearer(service.settings.key_file.read_text().strip())


def make_key(
    service: Service, project: str = "default", role: str = "submitter", **more: Any
) -> Json:
    body = {"name": f"{role} of {project}", "project": project, "role": role} | more
    return ok(service.http.post("/keys", json=body, headers=operator(service)), 201)


@contextmanager
def acting(service: Service, key: str) -> Iterator[httpx2.Client]:
    """The service's client sends this key meanwhile, so that its helpers do too."""
    before = service.http.headers.get("Authorization")
    service.http.headers["Authorization"] = f"Bearer {key}"
    try:
        yield service.http
    finally:
        del service.http.headers["Authorization"]
        if before:
            service.http.headers["Authorization"] = before


def change_key(service: Service, key_id: str, **values: Any) -> None:
    with Session(service.engine) as session, session.begin():
        session.execute(update(ApiKeyRow).where(ApiKeyRow.id == key_id).values(**values))


def key_row(service: Service, key_id: str) -> ApiKeyRow:
    with Session(service.engine) as session:
        return session.get_one(ApiKeyRow, key_id)


def audited(service: Service) -> list[tuple[str, str, str, str]]:
    """Project, actor, action and object of each change, the oldest first."""
    with Session(service.engine) as session:
        rows = session.scalars(select(AuditRow).order_by(AuditRow.id))
        return [(row.project, row.actor, row.action, row.object) for row in rows]
