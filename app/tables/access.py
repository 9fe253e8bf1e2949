"""Who may do what and how much, and who has done what."""

from datetime import datetime

from sqlalchemy import BigInteger, Double, Index, Integer
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Owned, Table


class ApiKeyRow(Owned, Table):
    """A key that opens one project. The key itself is shown once, and kept nowhere."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    """Twelve hexadecimal digits, which the key carries too."""
    name: Mapped[str]
    role: Mapped[str]
    sha256: Mapped[str]
    """Of the whole key: that has too much chance in it to be guessed, so no slow hash is needed."""
    created_at: Mapped[datetime]
    created_by: Mapped[str]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    """To the minute."""
    revoked_at: Mapped[datetime | None]


class AuditRow(Owned, Table):
    """Who changed what: written in the transaction of the change. Rows are only ever added."""

    __tablename__ = "audit_events"
    __table_args__ = (Index("ix_audit_events_project_id", "project", "id"),)

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    at: Mapped[datetime]
    actor: Mapped[str]
    """The name and id of a key, or the subject of a token."""
    action: Mapped[str]
    """The operation's name in the OpenAPI document, such as ``create_job``."""
    object: Mapped[str]
    """The id of what was changed."""
    request_id: Mapped[str]


NO_LIMIT = -1


class ProjectRow(Owned, Table):
    """What one project may use. None: as the settings say; ``NO_LIMIT``: whatever they say."""

    __tablename__ = "projects"

    project: Mapped[str] = mapped_column(primary_key=True)
    max_queued: Mapped[int | None]
    max_running: Mapped[int | None]
    gpu_minutes: Mapped[float | None] = mapped_column(Double)
    """In 30 days."""
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    requests_per_minute: Mapped[int | None]


class UsageRow(Owned, Table):
    """What a job has used that is deleted since: its project is still charged for it."""

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_project_ended_at", "project", "ended_at"),)

    job_id: Mapped[str] = mapped_column(primary_key=True)
    ended_at: Mapped[datetime]
    gpu_seconds: Mapped[float] = mapped_column(Double)
