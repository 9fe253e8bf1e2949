"""Webhooks on their way."""

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import DEFAULT_PROJECT, Owned, Table


class WebhookDeliveryRow(Owned, Table):
    """An event on its way to the webhook of its job, with what came of every attempt."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="state"),
        Index(
            "ix_webhook_deliveries_due_at",
            "due_at",
            postgresql_where=text("due_at IS NOT NULL"),
            sqlite_where=text("due_at IS NOT NULL"),
        ),
    )

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    """Of the event."""
    id: Mapped[str] = mapped_column(unique=True)
    """The receiver sees it as ``webhook-id``, the same at every attempt."""
    type: Mapped[str]
    url: Mapped[str]
    host: Mapped[str]
    """With the port: who is slow or gone holds up nobody else."""
    body: Mapped[str]
    """JSON, as it is signed and sent."""
    state: Mapped[str]
    """``pending``, ``delivered`` or ``failed``."""
    attempts: Mapped[list[dict[str, Any]]]
    """``{at, seconds, status, error, excerpt}`` of each, the oldest first."""
    tries: Mapped[int] = mapped_column(server_default="0")
    """Attempts since it was made, or since somebody has asked for it again."""
    due_at: Mapped[datetime | None]
    """The next attempt; none once it is over."""
    give_up_at: Mapped[datetime]
    claims: Mapped[int] = mapped_column(server_default="0")
    """Raised by every sender that takes it; one that comes back late writes nothing."""
    leased_until: Mapped[datetime | None]
    """A sender has it; if that one dies, another takes it then."""
    created_at: Mapped[datetime]


class WebhookSecretRow(Owned, Table):
    """What the webhooks of a project are signed with. Sealed where FLATLORA_SECRET_KEY is set."""

    __tablename__ = "webhook_secrets"

    project: Mapped[str] = mapped_column(primary_key=True, server_default=DEFAULT_PROJECT)
    secret: Mapped[str]
    created_at: Mapped[datetime]
    previous: Mapped[str | None]
    previous_until: Mapped[datetime | None]
    """Until then the one before signs too."""
