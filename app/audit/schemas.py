from datetime import datetime

from pydantic import BaseModel, Field


class AuditEvent(BaseModel):
    id: int
    at: datetime
    actor: str = Field(description="Name and id of the key, or who the token is of.")
    action: str = Field(description="The operation, as this document names it: create_job.")
    object: str = Field(description="The id of what was changed.")
    request_id: str


class AuditPage(BaseModel):
    items: list[AuditEvent]
    next: int | None = Field(description="Pass it as `before` for the next page.")
