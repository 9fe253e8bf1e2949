"""Taking a job, keeping it, and giving it back: each one fenced statement on its row.

A claim raises the row's fence. Every later write carries that fence and the condition that the
job is still held; it changes nothing, and raises ``LeaseLost``, once another attempt has begun.

A little over 400 lines: whoever wonders how a worker may move a job finds all of it here.
"""

import random
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from sqlalchemy import CursorResult, Engine, ScalarSelect, func, null, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from app.db import now
from app.failpoints import Point, failpoint
from app.jobs.events import event
from app.jobs.states import HELD, TERMINAL, Phase, Reason, Status, may_move
from app.outbox import wake
from app.tables import JobRow
from worker.caps import Cap, ProjectIsFull, check_cap, is_capped
from worker.lease import LEASE, Lease, LeaseLost
from worker.queue import Fit, best, is_ready, turn, unlocked

RECOVERIES_LIMIT = 10  # times that a job may be held by a service that is killed
CLAIM_TRIES = 20
LONGEST_WAIT_SECONDS = 3600  # for its next attempt, of a job whose trainers die


class Claims:
    """One worker's way to the queue."""

    def __init__(
        self,
        engine: Engine,
        worker: str,
        *,
        lease_seconds: float,
        max_attempts: int,
        retry_seconds: float = 0,
        wakes: bool = False,
        gpus: int | None = None,
        max_running: int | None = None,
    ) -> None:
        """``wakes``: what is put back into the queue leaves a wake-up in the outbox.

        ``gpus``: of the slot; jobs that need more are left to others. None: there are no others.

        ``max_running``: jobs of a project that has no limit of its own. None: any number.
        """
        self._reading = engine
        self._writing = engine.execution_options(writes=True)
        self._worker = worker
        self._lease_seconds = lease_seconds
        self._max_attempts = max_attempts
        self._retry_seconds = retry_seconds
        self._wakes = wakes
        self._any, self._several = Fit(gpus), Fit(gpus, several=True)
        self._prefers_several = gpus is not None and gpus > 1
        self._took_several = False
        self._cap = Cap(max_running)
        self._takes = {
            (fit, cap): (self._taking(best(fit, cap)), self._taking(unlocked(fit, cap)))
            for fit in (self._any, self._several)
            for cap in (None, self._cap)
        }
        self.dialect = engine.dialect.name

    def claim_next(self) -> Lease | None:
        """Take the job whose turn it is, if one waits.

        A slot of several GPUs gives every other turn to the jobs that need several: they can run
        nowhere else, and those that need one do not wait for ever where it is the only slot.
        """
        lease = None
        if self._prefers_several and not self._took_several:
            lease = self._claim(self._several)
        self._took_several = lease is not None
        return lease or self._claim(self._any)

    def _claim(self, fit: Fit) -> Lease | None:
        cap = None
        for _ in range(CLAIM_TRIES):
            with Session(self._reading) as session:
                ready = select(JobRow.id, is_capped()).where(*is_ready(fit=fit)).limit(1)
                found = session.execute(ready).one_or_none()
            if found is None:
                return None
            cap = self._cap if found[1] or self._cap.default is not None else None
            if lease := self._take(self._takes[fit, cap][0], cap):
                return lease
            if cap and self._is_nobodys_turn(fit, cap):
                return None
            time.sleep(random.uniform(0, 0.02))  # noqa: S311 - others are taking the last ones
        # The best one stays locked, perhaps by a machine that is gone: it must not hold up others.
        return self._take(self._takes[fit, cap][1], cap)

    def _is_nobodys_turn(self, fit: Fit, cap: Cap) -> bool:
        with Session(self._reading) as session:
            return session.scalar(turn(fit, cap)) is None

    def _taking(self, choice: ScalarSelect[str]) -> ReturningUpdate[Any]:
        return (
            update(JobRow)
            .where(JobRow.id == choice, JobRow.status == Status.QUEUED)
            .values(
                status=Status.RUNNING,
                phase=Phase.FETCHING,
                fence=JobRow.fence + 1,
                attempt=JobRow.attempt + 1,
                worker=self._worker,
                lease_until=now(self._lease_seconds),
                available_at=None,
                started_at=func.coalesce(JobRow.started_at, now()),
                updated_at=now(),
            )
            .returning(*LEASE, JobRow.project)
        )

    def _take(self, take: ReturningUpdate[Any], cap: Cap | None) -> Lease | None:
        asked_at = time.monotonic()
        committing = self._committing(Point.CLAIM_BEFORE_COMMIT, Point.CLAIM_AFTER_COMMIT)
        with suppress(ProjectIsFull), committing as session:
            row = session.execute(take).one_or_none()
            if row is None:
                return None
            *values, project = row
            if cap:
                check_cap(session, project, cap)
            lease = replace(Lease(*values), asked_at=asked_at)
            what = f"Attempt {lease.attempt} is running."
            session.execute(event(lease.job_id, "job.running", what, worker=self._worker))
            return lease
        return None

    def wish(self, lease: Lease) -> Status:
        """What the row says now: ``running``, or a wish to cancel or pause."""
        with Session(self._reading) as session:
            status = session.scalar(select(JobRow.status).where(*self._held(lease)))
        return self._status(lease, status)

    def extend(self, session: Session, lease: Lease, **values: Any) -> Status:
        """Heartbeat: move the lease on and carry values out, in the caller's transaction."""
        statement = (
            update(JobRow)
            .where(*self._held(lease))
            .values(lease_until=now(self._lease_seconds), updated_at=now(), **values)
            .returning(JobRow.status)
        )
        return self._status(lease, session.scalar(statement))

    def beat(self, lease: Lease, statements: Collection[Any], **values: Any) -> Status:
        """Heartbeat with what has gathered since the last one, in one transaction."""
        with self._committing(
            Point.HEARTBEAT_BEFORE_COMMIT, Point.HEARTBEAT_AFTER_COMMIT
        ) as session:
            status = self.extend(session, lease, **values)
            for statement in statements:
                session.execute(statement)
            return status

    def pin(self, lease: Lease, inputs: Mapping[str, Any]) -> None:
        """Say what the job has read, once and for all attempts."""
        with self._committing(Point.INPUTS_BEFORE_PIN, Point.INPUTS_AFTER_PIN) as session:
            self.extend(session, lease, inputs=dict(inputs))

    def hand_over(self, lease: Lease, checkpoint: Mapping[str, Any]) -> None:
        """Point at a checkpoint that is in the store."""
        with self._committing(Point.HANDOVER_BEFORE_COMMIT, Point.HANDOVER_AFTER_COMMIT) as session:
            self.extend(session, lease, checkpoint=dict(checkpoint))

    @contextmanager
    def _committing(self, before: Point, after: Point) -> Iterator[Session]:
        with Session(self._writing) as session, session.begin():
            yield session
            failpoint(before)
        failpoint(after)

    def _requeueing(self) -> Any:
        return self._committing(Point.REQUEUE_BEFORE_COMMIT, Point.REQUEUE_AFTER_COMMIT)

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
        """Put a drained job back, or pause it if that is wished; the attempt does not count."""
        with self._requeueing() as session:
            status = self.extend(session, lease)
            if not self._fulfil(session, lease, status, why, attempt=JobRow.attempt - 1, **values):
                self._requeue(session, lease, why, attempt=JobRow.attempt - 1, **values)

    def lose(self, lease: Lease, reason: Reason, why: str) -> None:
        """Put a job back whose trainer has died, or fail it after the last attempt.

        It waits, longer each time, so that others go first and what was wrong may pass.
        """
        wait = self._retry_seconds * 2.0 ** min(lease.attempt - 1, 32)
        wait = min(wait, max(LONGEST_WAIT_SECONDS, self._retry_seconds))
        wait *= random.uniform(0.8, 1.2)  # noqa: S311 - not all at once after an outage
        with self._requeueing() as session:
            self._lose(session, lease, reason, why, wait)

    def recover(self) -> int:
        """Put back what this worker held before it died. The caller knows that it is alone.

        The service died, not the job, so the attempt does not count; but a job that takes the
        service down with it each time must not come back for ever.
        """
        with Session(self._reading) as session:
            held = session.execute(
                select(*LEASE, JobRow.recoveries).where(
                    JobRow.worker == self._worker, JobRow.status.in_(HELD)
                )
            ).all()
        recovered = 0
        for *values, recoveries in held:
            with suppress(LeaseLost):  # the reaper was faster
                self._recover(Lease(*values), recoveries + 1)
                recovered += 1
        return recovered

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
        is_expired = (JobRow.status.in_(HELD), JobRow.lease_until < now())
        with Session(self._reading) as session:
            if session.scalar(select(JobRow.id).where(*is_expired).limit(1)) is None:
                return 0  # mostly, and then nothing is locked or written
        with self._requeueing() as session:
            expired = session.execute(
                select(*LEASE).where(*is_expired).with_for_update(skip_locked=True)
            ).all()
            for row in expired:
                self._lose(
                    session, Lease(*row), Reason.WORKER_LOST, "The worker's heartbeat stopped."
                )
        return len(expired)

    def expire(self) -> int:
        """Fail every job that has waited longer than its author wants to wait."""
        late = (
            update(JobRow)
            .where(
                JobRow.status == Status.QUEUED,
                JobRow.started_at.is_(None),
                JobRow.queue_deadline < now(),
            )
            .values(
                status=Status.FAILED,
                reason=Reason.MAX_QUEUE_TIME,
                message="No worker was free before the time that the job was given.",
                hint="Raise resources.max_queue_time, or start more workers.",
                updated_at=now(),
                finished_at=now(),
            )
            .returning(JobRow.id)
        )
        with Session(self._writing) as session, session.begin():
            expired = session.scalars(late).all()
            why, reason = "The job has waited for too long.", Reason.MAX_QUEUE_TIME
            for job_id in expired:
                session.execute(event(job_id, "job.failed", why, reason=reason))
        return len(expired)

    def over(self, job_ids: Collection[str]) -> dict[str, str | None]:
        """Of these jobs, those that exist and are over, each with its reason."""
        with Session(self._reading) as session:
            rows = session.execute(
                select(JobRow.id, JobRow.reason).where(
                    JobRow.id.in_(job_ids), JobRow.status.in_(TERMINAL)
                )
            )
            return {row.id: row.reason for row in rows}

    def known(self, job_ids: Collection[str]) -> set[str]:
        """Those of these jobs that exist."""
        with Session(self._reading) as session:
            return set(session.scalars(select(JobRow.id).where(JobRow.id.in_(job_ids))))

    def has_jobs(self) -> bool:
        with Session(self._reading) as session:
            return session.scalar(select(JobRow.id).limit(1)) is not None

    def _lose(
        self, session: Session, lease: Lease, reason: Reason, why: str, wait: float = 0
    ) -> None:
        status = self.extend(session, lease)
        attempt = min(lease.attempt, self._max_attempts - 1)  # one is left for when it goes on
        if self._fulfil(session, lease, status, why, attempt=attempt):
            return
        if lease.attempt >= self._max_attempts:
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
            self._requeue(session, lease, why, wait)

    def _fulfil(
        self, session: Session, lease: Lease, status: Status, why: str, **values: Any
    ) -> bool:
        """Nobody runs the job any more: whoever wished so has what he wants."""
        if status is Status.CANCELLING:
            self._finish(session, lease, Status.CANCELLED, "The job was cancelled.")
            return True
        if status is Status.PAUSING:
            freed = {"phase": None, "worker": None, "lease_until": None, "paused_at": now()}
            told = f"The job is paused. {why}"
            self._move(session, lease, Status.PAUSED, "job.paused", told, **freed, **values)
            return True
        return False

    def _requeue(
        self, session: Session, lease: Lease, why: str, wait: float = 0, **values: Any
    ) -> None:
        self._move(
            session,
            lease,
            Status.QUEUED,
            "job.requeued",
            why,
            phase=None,
            worker=None,
            lease_until=None,
            available_at=now(wait) if wait else None,
            **values,
        )
        if self._wakes:
            session.execute(wake(lease.job_id, wait))

    def _end(self, lease: Lease, status: Status, event_message: str, **values: Any) -> None:
        with self._committing(Point.END_BEFORE_COMMIT, Point.END_AFTER_COMMIT) as session:
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
            checkpoint=null(),  # nobody goes on from it; the store forgets it
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
    def _status(lease: Lease, found: str | None) -> Status:
        if found is None:
            raise LeaseLost(lease.job_id)
        return Status(found)

    @staticmethod
    def _held(lease: Lease) -> tuple[Any, ...]:
        return (JobRow.id == lease.job_id, JobRow.fence == lease.fence, JobRow.status.in_(HELD))
