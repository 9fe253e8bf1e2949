"""Who changed what."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from app.access.dependencies import admins_only
from app.audit.schemas import AuditEvent, AuditPage
from app.errors import Forbidden, InvalidRequest, Unauthenticated
from app.problems import problems
from app.sessions import ReadSession
from app.tables import AuditRow

router = APIRouter(prefix="/audit", tags=["audit"], dependencies=[Depends(admins_only)])


class AuditQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    action: str | None = Field(None, max_length=64, pattern=r"^[a-z_]+$")
    object: str | None = Field(None, max_length=255, pattern=r"^[^\x00]*$")
    limit: int = Field(100, ge=1, le=1000)
    before: int | None = Field(None, ge=1, le=2**63 - 1, description="`next` of the page before.")


@router.get(
    "",
    responses=problems(Unauthenticated, Forbidden, InvalidRequest),
    summary="List changes, newest first",
)
async def list_audit_events(
    session: ReadSession, query: Annotated[AuditQuery, Query()]
) -> AuditPage:
    """Every change that a request has made in this project."""
    statement = select(AuditRow).order_by(AuditRow.id.desc()).limit(query.limit + 1)
    if query.before:
        statement = statement.where(AuditRow.id < query.before)
    if query.action:
        statement = statement.where(AuditRow.action == query.action)
    if query.object:
        statement = statement.where(AuditRow.object == query.object)
    rows = (await session.scalars(statement)).all()
    shown = rows[: query.limit]
    return AuditPage(
        items=[AuditEvent.model_validate(row, from_attributes=True) for row in shown],
        next=shown[-1].id if len(rows) > query.limit else None,
    )
