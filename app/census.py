"""How the queue, the workers and the outbox stand, by the database's clock: one short reading.

For Prometheus (app/metrics.py) and for ``flatlora doctor``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, case, func, or_, select

from app.db import now
from app.jobs.states import HELD, Status
from app.tables import JobRow, OutboxRow, WebhookDeliveryRow, WorkerRow

SILENT_SECONDS = 30  # six heartbeats of a worker's row


@dataclass(frozen=True)
class WorkerSeen:
    """A worker's row, as old as it is."""

    state: str
    version: str
    slots: int
    age_seconds: float

    @property
    def is_silent(self) -> bool:
        return self.age_seconds > SILENT_SECONDS


@dataclass(frozen=True)
class Census:
    jobs: Mapping[Status, int]
    oldest_queued_seconds: float
    """How long the job has waited that has been ready to start for longest; 0 where none is."""
    outbox: int
    outbox_lag_seconds: float
    """For how long the oldest wake-up has been due; 0 where none is."""
    workers: Mapping[str, WorkerSeen]
    webhooks_pending: int
    webhook_oldest_seconds: float
    """How long ago the oldest that has not arrived was made; 0 where there is none."""
    webhook_lag_seconds: float
    """For how long the oldest attempt has been due; 0 where none is."""

    @property
    def held(self) -> int:
        return sum(self.jobs[status] for status in HELD)

    def count(self, state: str) -> int:
        """How many workers are ``active``, ``draining`` or ``silent``."""
        return sum(
            state == ("silent" if worker.is_silent else worker.state)
            for worker in self.workers.values()
        )

    @property
    def slots(self) -> int:
        """Of the workers that are heard."""
        return sum(worker.slots for worker in self.workers.values() if not worker.is_silent)


def take_census(connection: Connection) -> Census:
    moment = connection.scalar(select(now()))
    assert moment is not None
    counted = select(JobRow.status, func.count()).group_by(JobRow.status)
    found = {Status(status): number for status, number in connection.execute(counted)}
    due = connection.execute(
        select(func.count(), func.min(OutboxRow.due_at)).where(OutboxRow.due_at <= now())
    ).one()
    webhooks = connection.execute(
        select(
            func.count(),
            func.min(WebhookDeliveryRow.created_at),
            func.min(WebhookDeliveryRow.due_at),
        ).where(WebhookDeliveryRow.due_at.is_not(None))
    ).one()
    workers = select(
        WorkerRow.name, WorkerRow.state, WorkerRow.version, WorkerRow.slots, WorkerRow.heartbeat_at
    ).order_by(WorkerRow.name)
    return Census(
        jobs={status: found.get(status, 0) for status in Status},
        oldest_queued_seconds=_seconds(_ready_since(connection), moment),
        outbox=due[0],
        outbox_lag_seconds=_seconds(due[1], moment),
        workers={
            row.name: WorkerSeen(
                row.state, row.version, len(row.slots), _seconds(row.heartbeat_at, moment)
            )
            for row in connection.execute(workers)
        },
        webhooks_pending=webhooks[0],
        webhook_oldest_seconds=_seconds(webhooks[1], moment),
        webhook_lag_seconds=_seconds(webhooks[2], moment),
    )


def _ready_since(connection: Connection) -> datetime | None:
    """Since when the oldest job has waited that may start: one that came back counts from then."""
    is_late = JobRow.available_at > JobRow.updated_at
    since = case((is_late, JobRow.available_at), else_=JobRow.updated_at)
    moment: datetime | None = connection.scalar(
        select(func.min(since)).where(
            JobRow.status == Status.QUEUED,
            or_(JobRow.available_at.is_(None), JobRow.available_at <= now()),
        )
    )
    return moment


def _seconds(since: datetime | None, moment: datetime) -> float:
    return max(0.0, (moment - since).total_seconds()) if since else 0.0
