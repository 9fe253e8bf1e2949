"""Jobs whose worker is gone come back once, and nobody is blamed for an outage of the database."""

import threading
import time

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.jobs.states import Reason, Status
from app.tables import JobRow
from tests.worker.jobs import add_job, add_jobs, change, claimed, event_types, expire, outbox, row
from worker.claims import Claims
from worker.reaper import Reaper

EVERY, LEASE = 0.1, 0.6


class TestReap:
    def test_five_at_once_put_each_lost_job_back_once(
        self, engine: Engine, migrated_url: str
    ) -> None:
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3, wakes=True)
        jobs = add_jobs(engine, 20)
        for _ in jobs:
            expire(engine, claimed(claims).job_id)
        engines = [make_engine(migrated_url) for _ in range(5)]
        start, reaped = threading.Barrier(5), []

        def reap(own: Engine) -> None:
            other = Claims(own, worker="w2", lease_seconds=60, max_attempts=3, wakes=True)
            start.wait()
            reaped.append(other.reap())

        threads = [threading.Thread(target=reap, args=(own,)) for own in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for own in engines:
            own.dispose()
        assert sum(reaped) == len(jobs)
        assert sorted(outbox(engine)) == sorted(jobs)
        for job_id in jobs:
            assert event_types(engine, job_id) == ["job.running", "job.requeued"]
            assert (row(engine, job_id).status, row(engine, job_id).worker) == ("queued", None)

    def test_the_third_lost_attempt_fails_the_job(self, engine: Engine, claims: Claims) -> None:
        job_id = add_job(engine)
        for _ in range(3):
            claimed(claims)
            expire(engine, job_id)
            assert claims.reap() == 1
        job = row(engine, job_id)
        assert (job.status, job.reason) == (Status.FAILED, Reason.WORKER_LOST)
        assert job.message == "The worker's heartbeat stopped. That was attempt 3 of 3."

    def test_a_row_that_somebody_else_holds_locked_is_left_to_them(
        self, migrated_postgres_url: str
    ) -> None:
        engine = make_engine(migrated_postgres_url)
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3)
        locked, other = add_job(engine, age=9), add_job(engine)
        for job_id in (locked, other):
            claimed(claims)
            expire(engine, job_id)
        with engine.begin() as heartbeat:
            heartbeat.execute(select(JobRow.id).where(JobRow.id == locked).with_for_update())
            assert claims.reap() == 1
        assert row(engine, other).status == Status.QUEUED
        assert row(engine, locked).status == Status.RUNNING
        engine.dispose()


class TestQueueDeadline:
    def test_a_job_that_has_waited_for_too_long_fails_with_its_reason(
        self, engine: Engine, claims: Claims
    ) -> None:
        late = add_job(engine, queue_deadline=now(-1))
        others = [add_job(engine, queue_deadline=now(60)), add_job(engine)]
        assert claims.expire() == 1
        job = row(engine, late)
        assert (job.status, job.reason) == (Status.FAILED, Reason.MAX_QUEUE_TIME)
        assert job.finished_at is not None
        assert job.hint == "Raise resources.max_queue_time, or start more workers."
        assert event_types(engine, late) == ["job.failed"]
        assert {row(engine, job_id).status for job_id in others} == {Status.QUEUED}
        assert claims.expire() == 0

    def test_one_that_has_ever_started_does_not(self, engine: Engine, claims: Claims) -> None:
        running, back = (add_job(engine, queue_deadline=now(60)) for _ in range(2))
        leases = [claimed(claims), claimed(claims)]
        claims.release(leases[1], "drained")
        for job_id in (running, back):
            change(engine, job_id, queue_deadline=now(-1))
        assert claims.expire() == 0
        assert row(engine, back).status == Status.QUEUED


class TestPatience:
    @pytest.fixture
    def reaper(self, claims: Claims) -> Reaper:
        return Reaper(claims, every_seconds=EVERY, lease_seconds=LEASE)

    @pytest.fixture
    def lost(self, engine: Engine, claims: Claims) -> str:
        job_id = add_job(engine)
        claimed(claims)
        expire(engine, job_id)
        return job_id

    def test_after_its_start_the_workers_have_the_time_of_a_lease_to_be_heard(
        self, engine: Engine, reaper: Reaper, lost: str
    ) -> None:
        assert self.reaps_after(reaper) >= LEASE
        assert row(engine, lost).status == Status.QUEUED

    def test_after_an_outage_too(
        self, engine: Engine, claims: Claims, reaper: Reaper, lost: str
    ) -> None:
        self.reaps_after(reaper)
        again = claimed(claims)
        expire(engine, again.job_id)
        time.sleep(3 * EVERY + 0.1)  # the outage: nobody gets an answer
        assert self.reaps_after(reaper) >= LEASE
        assert row(engine, lost).status == Status.QUEUED

    def test_a_worker_that_is_heard_again_keeps_its_job(
        self, engine: Engine, claims: Claims, reaper: Reaper
    ) -> None:
        add_job(engine)
        lease = claimed(claims)
        expire(engine, lease.job_id)
        assert reaper.reap() == 0
        claims.beat(lease, [])
        deadline = time.monotonic() + LEASE + 3 * EVERY
        while time.monotonic() < deadline:
            assert reaper.reap() == 0
            time.sleep(EVERY / 2)
        assert row(engine, lease.job_id).fence == lease.fence

    def test_a_database_that_hangs_in_a_look_was_out_of_sight(
        self, engine: Engine, claims: Claims, lost: str
    ) -> None:
        class Hanging(Claims):
            hangs = False

            def expire(self) -> int:
                time.sleep(3 * EVERY + 0.1 if self.hangs else 0)
                return super().expire()

        hanging = Hanging(engine, worker="w2", lease_seconds=60, max_attempts=3)
        reaper = Reaper(hanging, every_seconds=EVERY, lease_seconds=LEASE)
        self.reaps_after(reaper)
        expire(engine, claimed(claims).job_id)
        hanging.hangs = True
        assert reaper.reap() == 0

    def test_a_job_that_waits_for_too_long_is_failed_meanwhile(
        self, engine: Engine, reaper: Reaper
    ) -> None:
        late = add_job(engine)
        change(engine, late, queue_deadline=now(-1))
        assert reaper.reap() == 1
        assert row(engine, late).status == Status.FAILED

    @staticmethod
    def reaps_after(reaper: Reaper) -> float:
        """How long it takes until a reaper that looks often puts the one lost job back."""
        started = time.monotonic()
        while not reaper.reap():
            assert time.monotonic() < started + 20 * LEASE
            time.sleep(EVERY / 4)
        return time.monotonic() - started


def test_the_clock_is_the_databases(engine: Engine, claims: Claims) -> None:
    """A worker whose own clock is wrong neither loses its jobs nor takes others'."""
    add_job(engine)
    claimed(claims)
    with Session(engine) as session:
        ahead = session.scalar(select(JobRow.lease_until > now(30)))
        behind = session.scalar(select(JobRow.lease_until < now(61)))
    assert (ahead, behind) == (True, True)
