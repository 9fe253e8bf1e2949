"""The tables. The schema itself is made by the migrations alone; a test compares the two."""

import re
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.jobs.states import Status

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

Json = JSON().with_variant(JSONB(), "postgresql")


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite keeps no zone, so the zone is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a time needs a zone, got {value!r}")
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, _: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class Table(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {
        datetime: UtcDateTime(),
        dict[str, Any]: Json,
        list[dict[str, Any]]: Json,
        dict[str, str]: Json,
    }


DEFAULT_PROJECT = "default"


class Owned:
    """A row that belongs to a project: requests see those of their own (app/scope.py)."""

    project: Mapped[str] = mapped_column(server_default=DEFAULT_PROJECT)


class OfJob:
    """A row that hangs on a job, and belongs to whom the job belongs."""

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))


HAS_ADAPTER = "CAST(adapter AS VARCHAR) <> 'null'"
"""Of a job's row, in SQL: a dry run has left the JSON ``null`` there, which is not NULL.

The databases use the index of adapters for a query that says it in the same words."""
STATUS_VALUES = ", ".join(f"'{status}'" for status in Status)


class JobRow(Owned, Table):
    """One job. The row is the truth: status is read from here and from nowhere else."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN ({STATUS_VALUES})", name="status"),
        Index("ix_jobs_status_created_at_id", "status", "created_at", "id"),
        Index("ix_jobs_project_created_at_id", "project", "created_at", "id"),
        Index("ix_jobs_project_status_created_at_id", "project", "status", "created_at", "id"),
        Index("ix_jobs_queue", "status", "project", "priority", "created_at", "id"),
        Index("ix_jobs_project_started_at", "project", "started_at"),
        Index("ix_jobs_project_finished_at_started_at", "project", "finished_at", "started_at"),
        Index(
            "ix_jobs_several_gpus",
            *("status", "project", "priority", "created_at", "id"),
            postgresql_where=text("gpus > 1"),
            sqlite_where=text("gpus > 1"),
        ),
        Index(
            "ix_jobs_webhooks",
            *("status", "fence", "webhook_seq", "id"),
            postgresql_where=text("webhook_seq IS NOT NULL"),
            sqlite_where=text("webhook_seq IS NOT NULL"),
        ),
        Index(
            "ix_jobs_adapters",
            *("project", "finished_at", "id"),
            postgresql_where=text(HAS_ADAPTER),
            sqlite_where=text(HAS_ADAPTER),
        ),
        Index(
            "ix_jobs_retried_from",
            "retried_from",
            postgresql_where=text("retried_from IS NOT NULL"),
            sqlite_where=text("retried_from IS NOT NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    labels: Mapped[dict[str, str]] = mapped_column(default=dict)
    base_model: Mapped[str]
    dataset_uri: Mapped[str]
    spec: Mapped[dict[str, Any]]
    """The job as it was asked for, with every default resolved."""

    priority: Mapped[int] = mapped_column(server_default="5")
    """0 to 9; within a project the lower start first."""
    gpus: Mapped[int] = mapped_column(server_default="1")
    """Of one slot, that it needs; 1 also where it needs none."""
    available_at: Mapped[datetime | None]
    """Not to be claimed before; none: at once."""
    queue_deadline: Mapped[datetime | None]
    """Fails if it has not started by then."""
    paused_at: Mapped[datetime | None]
    """When it was last paused: what was left of its time in the queue is left when it goes on."""
    retried_from: Mapped[str | None]
    """The job that it does again. That one may be gone."""

    status: Mapped[str]
    phase: Mapped[str | None]
    reason: Mapped[str | None]
    message: Mapped[str | None]
    hint: Mapped[str | None]

    attempt: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(default=0)
    """Raised by every claim; a write that carries an older one is refused."""
    worker: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    runtime: Mapped[float] = mapped_column(Double, default=0.0)
    """Seconds that all attempts together have worked."""
    recoveries: Mapped[int] = mapped_column(default=0)
    """How often the service was killed while it held the job."""

    inputs: Mapped[dict[str, Any] | None]
    """What the first attempt has read, so that one on another machine reads the same: the commit
    of the base model, hashes of the datasets, the clock that templates see."""
    checkpoint: Mapped[dict[str, Any] | None]
    """The newest checkpoint in the store, for a worker on another machine: fence, step, files."""
    logged: Mapped[dict[str, Any] | None]
    """How far its trainer's logs are in ``job_logs``: lines, and bytes of each machine's file."""
    request_id: Mapped[str | None]
    """Of the request that has submitted it."""
    traceparent: Mapped[str | None]
    """Its W3C trace context."""
    webhook_seq: Mapped[int | None]
    """Events up to this one have their deliveries; none: it has no webhook, or all have them."""

    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    progress: Mapped[dict[str, Any] | None]
    """The newest metrics: loss, learning_rate, sigma, grad_norm, tokens_per_second, eta_seconds."""
    report: Mapped[dict[str, Any] | None]
    """The preflight report on the data."""
    result: Mapped[dict[str, Any] | None]
    """Held-out loss before and after, and what else the finished job says of itself."""
    adapter: Mapped[dict[str, Any] | None]
    """The published manifest: files with size and sha256."""

    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class OutboxRow(Table):
    """A wake-up for the workers, written with the job's move into the queue and sent after it."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    due_at: Mapped[datetime] = mapped_column(index=True)
    created_at: Mapped[datetime]


class WorkerRow(Table):
    """A machine's worker, as it last spoke."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    version: Mapped[str]
    slots: Mapped[list[dict[str, Any]]]
    """``{name, device}`` of each, a device being ``0`` or, of two together, ``0+1``; the name is
    what a job's row has as its worker."""
    state: Mapped[str]
    """``active`` or ``draining``; it removes its row when it stops."""
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]


class EventRow(OfJob, Table):
    """What happened to a job, in order. Rows are only ever added."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)


class MetricRow(OfJob, Table):
    """One step of one series. A step that is run again after a resume replaces its row."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    series: Mapped[str] = mapped_column(primary_key=True)
    """``train`` or ``held_out``."""
    step: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[dict[str, Any]]


class LogRow(OfJob, Table):
    """A line of the trainer's log. Of a long log the newest are kept."""

    __tablename__ = "job_logs"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    """When it was read; what the line itself says of the time is the trainer's."""
    text: Mapped[str]


class DatasetRow(Owned, Table):
    """An uploaded dataset; its bytes lie in the store under their hash, once."""

    __tablename__ = "datasets"
    __table_args__ = (
        UniqueConstraint("project", "sha256", "filename"),
        Index("ix_datasets_project_id", "project", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    filename: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class UploadRow(Owned, Table):
    """A dataset on its way in, part after part. The row goes when the dataset is there."""

    __tablename__ = "uploads"
    __table_args__ = (UniqueConstraint("project", "sha256"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    """Of the whole, as the client has announced it."""
    filename: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    received: Mapped[int] = mapped_column(BigInteger)
    """Bytes from the beginning that are stored: where the next part goes."""
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime] = mapped_column(index=True)
    """When it last grew, or was asked for."""

    @property
    def folder(self) -> str:
        """In the store; the id makes it the only one, the rest is for who looks there."""
        project = re.sub(r"[^A-Za-z0-9_-]", "_", self.project)
        return f"{project}/{self.sha256}/{self.id}"


class UploadPartRow(Table):
    """A part that counts: of several for one place, the one whose row was written."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[str] = mapped_column(
        ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True
    )
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    size: Mapped[int] = mapped_column(BigInteger)
    name: Mapped[str]
    """In the upload's folder."""


class IdempotencyRow(Owned, Table):
    """The job that a key has made, written in the same transaction as the job."""

    __tablename__ = "idempotency_keys"

    project: Mapped[str] = mapped_column(primary_key=True, server_default=DEFAULT_PROJECT)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]


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
