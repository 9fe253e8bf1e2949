"""The wire types of keys."""

from datetime import datetime, timedelta
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.access.principal import Role
from app.jobs.schemas import Body
from app.settings import PROJECT_NAME

ProjectName = Annotated[str, Field(pattern=PROJECT_NAME)]


class KeyCreate(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "nightly training", "role": "submitter", "expires_in_days": 90}]
        }
    )

    name: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        description="Whose it is, or what for; the audit log says it."
    )
    role: Annotated[Role, Field(strict=False)] = Role.SUBMITTER
    project: ProjectName | None = Field(
        None, description="Only the operator may name one that is not their own."
    )
    expires_in_days: Annotated[float, Field(gt=0, le=36500)] | None = Field(
        None, description="Default: it does not expire."
    )

    @property
    def lifetime(self) -> timedelta | None:
        return None if self.expires_in_days is None else timedelta(days=self.expires_in_days)


class Key(BaseModel):
    id: str
    name: str
    project: str
    role: Role
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    last_used_at: datetime | None = Field(description="To the minute.")
    revoked_at: datetime | None


class KeyMade(Key):
    key: str = Field(description="The key itself: it is shown this once.")


class KeyList(BaseModel):
    items: list[Key]
