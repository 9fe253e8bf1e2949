"""The tables. The schema itself is made by the migrations alone; a test compares the two."""

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
STATUS_VALUES = ", ".join(f"'{status}'" for status in Status)


class JobRow(Table):
    """One job. The row is the truth: status is read from here and from nowhere else."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN ({STATUS_VALUES})", name="status"),
        Index("ix_jobs_status_created_at_id", "status", "created_at", "id"),
        Index("ix_jobs_created_at_id", "created_at", "id"),
        Index("ix_jobs_queue", "status", "project", "priority", "created_at", "id", "gpus"),
        Index("ix_jobs_project_started_at", "project", "started_at"),
        Index(
            "ix_jobs_several_gpus",
            *("status", "project", "priority", "created_at", "id"),
            postgresql_where=text("gpus > 1"),
            sqlite_where=text("gpus > 1"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str] = mapped_column(server_default=DEFAULT_PROJECT)
    """Whose job it is: projects take turns."""
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
    request_id: Mapped[str | None]
    """Of the request that has submitted it."""
    traceparent: Mapped[str | None]
    """Its W3C trace context."""

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


class EventRow(Table):
    """What happened to a job, in order. Rows are only ever added."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    type: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)


class MetricRow(Table):
    """One step of one series. A step that is run again after a resume replaces its row."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    series: Mapped[str] = mapped_column(primary_key=True)
    """``train`` or ``held_out``."""
    step: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[dict[str, Any]]


class DatasetRow(Table):
    """An uploaded dataset; its bytes lie in the store under their hash, once."""

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("sha256", "filename"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    filename: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class IdempotencyRow(Table):
    """The job that a key has made, written in the same transaction as the job."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]
