"""A job, and what hangs on it."""

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Double, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from app.jobs.states import Status
from app.tables.base import DEFAULT_PROJECT, OfJob, Owned, Table

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
        Index("ix_jobs_queue", "status", "project", "priority", "created_at", "id", "gpus"),
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


class IdempotencyRow(Owned, Table):
    """The job that a key has made, written in the same transaction as the job."""

    __tablename__ = "idempotency_keys"

    project: Mapped[str] = mapped_column(primary_key=True, server_default=DEFAULT_PROJECT)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime]
