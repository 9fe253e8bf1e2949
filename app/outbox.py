"""Wake-ups for the workers: written with the job's move into the queue, sent after the commit.

A row of the outbox exists if and only if the move does, so no job waits unheard of: whatever dies
between the commit and the broker, the next relay sends what is left.
"""

from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, Insert, delete, insert, select

from app.db import now
from app.failpoints import Point, failpoint
from app.tables import JobRow, OutboxRow

if TYPE_CHECKING:
    from celery import Celery

BATCH = 200
GATHER_SECONDS = 0.05
"""From a job's coming in to its wake-up: one transaction then sends those of all that came."""


def wake(job_id: str, after_seconds: float = 0) -> Insert:
    """The statement that leaves a wake-up, in the transaction that queues the job."""
    return insert(OutboxRow).values(job_id=job_id, due_at=now(after_seconds), created_at=now())


# Built once and run without the ORM: a submission waits for it.
WAKE_NOW = insert(OutboxRow).values(due_at=now(), created_at=now())


class Relay:
    """From the outbox to the broker. Any number may run: each row is taken by one at a time."""

    def __init__(self, engine: Engine, celery: "Celery") -> None:
        self._engine = engine.execution_options(writes=True)
        self._celery = celery

    def send_due(self) -> int:
        """Send what is due. Raises what the broker raises; the rows stay then."""
        sent = batch = self._send_batch()
        while batch == BATCH:  # else those that came first have been all
            sent += (batch := self._send_batch())
        return sent

    def _send_batch(self) -> int:
        due = (
            select(OutboxRow.id, OutboxRow.job_id, JobRow.gpus)
            .join(JobRow, JobRow.id == OutboxRow.job_id)
            .where(OutboxRow.due_at <= now())
            .order_by(OutboxRow.id)
            .limit(BATCH)
            .with_for_update(skip_locked=True, of=OutboxRow)
        )
        with self._engine.begin() as connection:
            rows = connection.execute(due).all()
            if not rows:
                return 0
            failpoint(Point.RELAY_BEFORE_SEND)
            with self._celery.producer_or_acquire() as producer:
                for row in rows:
                    send_wake_up(self._celery, row.job_id, gpus=row.gpus, producer=producer)
            failpoint(Point.RELAY_AFTER_SEND)
            connection.execute(delete(OutboxRow).where(OutboxRow.id.in_([row.id for row in rows])))
        return len(rows)


def send_wake_up(celery: "Celery", *about: Any, gpus: int = 1, producer: Any = None) -> None:
    """To a slot of so many GPUs, or more; by a producer that is at hand, if there is one."""
    from app.broker import WAKE, queue_of

    celery.send_task(WAKE, args=about, queue=queue_of(gpus), producer=producer)
