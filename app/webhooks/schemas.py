"""The wire types of webhooks."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.jobs.schemas import Body
from app.tables import WebhookDeliveryRow


class Attempt(BaseModel):
    at: datetime
    seconds: float
    status: int | None = Field(description="None where there was no answer.")
    error: str | None = Field(description="Why there was none, or why it does not count.")
    excerpt: str | None = Field(description="The beginning of the answer.")


class DeliveredEvent(BaseModel):
    seq: int
    type: str


class Delivery(BaseModel):
    id: str = Field(description="The receiver has it as `webhook-id`, at every attempt.")
    job_id: str
    event: DeliveredEvent
    state: Literal["pending", "delivered", "failed"]
    attempts: list[Attempt] = Field(description="The oldest first; of very many, the last 50.")
    next_attempt_at: datetime | None
    created_at: datetime


class DeliveryPage(BaseModel):
    items: list[Delivery]
    next: int | None = Field(description="Pass it as `after` for the next page.")


class WebhookSecret(BaseModel):
    secret: str = Field(description="`whsec_` and Base64: as the libraries of the standard take it")
    created_at: datetime
    previous_until: datetime | None = Field(
        description="Until then the secret before it signs too."
    )


class WebhookTest(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"url": "https://hooks.example.com/flatlora"}]}
    )

    url: Annotated[str, Field(min_length=1, max_length=2048)]


class WebhookTested(Attempt):
    id: str = Field(description="The receiver has it as `webhook-id`.")
    delivered: bool


def present(row: WebhookDeliveryRow) -> Delivery:
    values: dict[str, Any] = {
        "event": {"seq": row.seq, "type": row.type},
        "next_attempt_at": row.due_at,
    }
    for name in ("id", "job_id", "state", "attempts", "created_at"):
        values[name] = getattr(row, name)
    return Delivery.model_validate(values)
