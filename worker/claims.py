"""Taking a job, keeping it, and giving it back: each one fenced statement on its row.

A claim raises the row's fence. Every later write carries that fence and the condition that the
job is still held; it changes nothing, and raises ``LeaseLost``, once another attempt has begun.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CursorResult, Engine, func, select, update
from sqlalchemy.orm import Session

from app.db import now
from app.jobs.events import event
from app.jobs.states import Phase, Reason, Status, may_move
from app.tables import JobRow

HELD = [status for status in Status if status.is_held]
RECOVERIES_LIMIT = 10  # times that a job may be held by a service that is killed


class LeaseLost(Exception):
    """Another attempt holds the job, or nobody does: whoever sees this must stop at once."""


@dataclass(frozen=True)
class Lease:
    job_id: str
    fence: int
    attempt: int
    spec: Mapping[str, Any]
    runtime: float
    """Seconds that earlier attempts have worked."""


LEASE = (JobRow.id, JobRow.fence, JobRow.attempt, JobRow.spec, JobRow.runtime)


class Claims:
    """One worker's way to the queue."""

    def __init__(
        self, engine: Engine, worker: str, *, lease_seconds: float, max_attempts: int
    ) -> None:
        self._reading = engine
        self._writing = engine.execution_options(writes=True)
        self._worker = worker
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts

    def claim_next(self) -> Lease | None:
        """Take the oldest queued job, if there is one."""
        oldest = (
            select(JobRow.id)
            .where(JobRow.status == Status.QUEUED)
            .order_by(JobRow.created_at, JobRow.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        take = (
            update(JobRow)
            .where(JobRow.id == oldest.scalar_subquery(), JobRow.status == Status.QUEUED)
            .values(
                status=Status.RUNNING,
                phase=Phase.FETCHING,
                fence=JobRow.fence + 1,
                attempt=JobRow.attempt + 1,
                worker=self._worker,
                lease_until=now(self._lease_seconds),
                started_at=func.coalesce(JobRow.started_at, now()),
                updated_at=now(),
            )
            .returning(*LEASE)
        )
        with Session(self._writing) as session, session.begin():
            row = session.execute(take).one_or_none()
            if row is None:
                return None
            lease = Lease(*row)
            session.execute(
                event(lease.job_id, "job.running", f"Attempt {lease.attempt} is running.")
            )
            return lease

    def wish(self, lease: Lease) -> Status:
        """What the row says now: ``running``, or a wish to cancel or pause."""
        with Session(self._reading) as session:
            status = session.scalar(select(JobRow.status).where(*self._held(lease)))
        if status is None:
            raise LeaseLost(lease.job_id)
        return Status(status)

    def extend(self, session: Session, lease: Lease, **values: Any) -> Status:
        """Heartbeat: move the lease on and carry values out, in the caller's transaction."""
        statement = (
            update(JobRow)
            .where(*self._held(lease))
            .values(lease_until=now(self._lease_seconds), updated_at=now(), **values)
            .returning(JobRow.status)
        )
        status = session.scalar(statement)
        if status is None:
            raise LeaseLost(lease.job_id)
        return Status(status)

    def transaction(self) -> Session:
        return Session(self._writing)

    def succeed(
        self, lease: Lease, *, result: Mapping[str, Any], adapter: Mapping[str, Any] | None
    ) -> None:
        message = "The adapter is published." if adapter else "The dry run has ended."
        self._end(lease, Status.SUCCEEDED, message, result=dict(result), adapter=adapter)

    def fail(self, lease: Lease, reason: Reason, message: str, hint: str | None) -> None:
        self._end(lease, Status.FAILED, message, reason=reason, message=message, hint=hint)

    def cancel(self, lease: Lease) -> None:
        self._end(lease, Status.CANCELLED, "The job was cancelled while it ran.")

    def release(self, lease: Lease, why: str, **values: Any) -> None:
        """Put a drained job back; the attempt does not count."""
        with self.transaction() as session, session.begin():
            status = self.extend(session, lease)
            if status is Status.CANCELLING:
                self._finish(session, lease, Status.CANCELLED, "The job was cancelled.")
                return
            self._requeue(session, lease, why, attempt=JobRow.attempt - 1, **values)

    def lose(self, lease: Lease, reason: Reason, why: str) -> None:
        """Put a job back whose trainer has died, or fail it after the last attempt."""
        with self.transaction() as session, session.begin():
            self._lose(session, lease, reason, why)

    def recover(self) -> int:
        """Put back what this worker held before it died. The caller knows that it is alone.

        The service died, not the job, so the attempt does not count; but a job that takes the
        service down with it each time must not come back for ever.
        """
        with self.transaction() as session, session.begin():
            held = session.execute(
                select(*LEASE, JobRow.recoveries).where(
                    JobRow.worker == self._worker, JobRow.status.in_(HELD)
                )
            ).all()
        for *values, recoveries in held:
            self._recover(Lease(*values), recoveries + 1)
        return len(held)

    def _recover(self, lease: Lease, recoveries: int) -> None:
        if recoveries > RECOVERIES_LIMIT:
            self.fail(
                lease,
                Reason.INTERNAL,
                f"The service died {recoveries} times while it held this job.",
                "Its log has the details. Please report it.",
            )
        else:
            self.release(
                lease,
                "The service was restarted; the job goes on from its last checkpoint.",
                recoveries=recoveries,
            )

    def reap(self) -> int:
        """Put back every job whose lease has run out."""
        with self.transaction() as session, session.begin():
            expired = session.execute(
                select(*LEASE)
                .where(JobRow.status.in_(HELD), JobRow.lease_until < now())
                .with_for_update(skip_locked=True)
            ).all()
            for row in expired:
                self._lose(
                    session, Lease(*row), Reason.WORKER_LOST, "The worker's heartbeat stopped."
                )
        return len(expired)

    def over(self, job_ids: Collection[str]) -> dict[str, str | None]:
        """Of these jobs, those that exist and are over, each with its reason."""
        terminal = [status for status in Status if status.is_terminal]
        with Session(self._reading) as session:
            rows = session.execute(
                select(JobRow.id, JobRow.reason).where(
                    JobRow.id.in_(job_ids), JobRow.status.in_(terminal)
                )
            )
            return {row.id: row.reason for row in rows}

    def _lose(self, session: Session, lease: Lease, reason: Reason, why: str) -> None:
        status = self.extend(session, lease)
        if status is Status.CANCELLING:
            self._finish(session, lease, Status.CANCELLED, "The job was cancelled.")
        elif lease.attempt >= self._max_attempts:
            message = f"{why} That was attempt {lease.attempt} of {self._max_attempts}."
            self._finish(
                session,
                lease,
                Status.FAILED,
                message,
                reason=reason,
                message=message,
                hint="See the trainer's log on the worker, then submit the job again.",
            )
        else:
            self._requeue(session, lease, why)

    def _requeue(self, session: Session, lease: Lease, why: str, **values: Any) -> None:
        self._move(
            session,
            lease,
            Status.QUEUED,
            "job.requeued",
            why,
            phase=None,
            worker=None,
            lease_until=None,
            **values,
        )

    def _end(self, lease: Lease, status: Status, event_message: str, **values: Any) -> None:
        with self.transaction() as session, session.begin():
            self._finish(session, lease, status, event_message, **values)

    def _finish(
        self, session: Session, lease: Lease, status: Status, event_message: str, **values: Any
    ) -> None:
        self._move(
            session,
            lease,
            status,
            f"job.{status}",
            event_message,
            phase=None,
            lease_until=None,
            finished_at=now(),
            **values,
        )

    def _move(
        self, session: Session, lease: Lease, status: Status, type_: str, why: str, **values: Any
    ) -> None:
        origins = [origin for origin in HELD if may_move(origin, status)]
        statement = (
            update(JobRow)
            .where(*self._held(lease), JobRow.status.in_(origins))
            .values(status=status, updated_at=now(), **values)
        )
        outcome = session.execute(statement)
        assert isinstance(outcome, CursorResult)
        if outcome.rowcount == 0:
            raise LeaseLost(lease.job_id)
        data = {"reason": values["reason"]} if "reason" in values else {}
        session.execute(event(lease.job_id, type_, why, **data))

    @staticmethod
    def _held(lease: Lease) -> tuple[Any, ...]:
        return (JobRow.id == lease.job_id, JobRow.fence == lease.fence, JobRow.status.in_(HELD))
