"""The queue's promises, on SQLite and Postgres: a job is taken once, and one attempt writes."""

import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.ids import new_id
from app.jobs.schemas import JobCreate
from app.jobs.states import Reason, Status
from app.migrate import upgrade
from app.tables import EventRow, JobRow, MetricRow
from worker.claims import RECOVERIES_LIMIT, Claims, Lease, LeaseLost
from worker.progress import Progress


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    upgrade(database_url)
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def claims(engine: Engine) -> Claims:
    return Claims(engine, worker="w1", lease_seconds=60, max_attempts=3)


def add_job(engine: Engine) -> str:
    spec = JobCreate(base_model="org/name", dataset_uri="file:rows.jsonl").resolved()
    job = JobRow(
        id=new_id("job"),
        base_model=spec.base_model,
        dataset_uri=spec.dataset_uri,
        labels={},
        spec=spec.model_dump(mode="json"),
        status=Status.QUEUED,
        created_at=now(),
        updated_at=now(),
    )
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        session.add(job)
        return job.id


def row(engine: Engine, job_id: str) -> JobRow:
    with Session(engine) as session:
        return session.get_one(JobRow, job_id)


def claimed(claims: Claims) -> Lease:
    lease = claims.claim_next()
    assert lease is not None
    return lease


def expire(engine: Engine, job_id: str) -> None:
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        session.execute(update(JobRow).where(JobRow.id == job_id).values(lease_until=now(-1)))


class TestClaim:
    def test_the_oldest_job_comes_first_and_then_there_is_none(
        self, engine: Engine, claims: Claims
    ) -> None:
        first, second = add_job(engine), add_job(engine)
        assert [claimed(claims).job_id, claimed(claims).job_id] == [first, second]
        assert claims.claim_next() is None

    def test_many_claimers_take_each_job_once(self, engine: Engine) -> None:
        jobs = {add_job(engine) for _ in range(40)}
        taken: list[str] = []

        def take_all(name: str) -> None:
            claims = Claims(engine, worker=name, lease_seconds=60, max_attempts=3)
            while lease := claims.claim_next():
                taken.append(lease.job_id)

        threads = [threading.Thread(target=take_all, args=(f"w{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 40
        assert set(taken) == jobs


class TestFence:
    def test_a_later_attempt_shuts_out_the_earlier(self, engine: Engine, claims: Claims) -> None:
        job_id = add_job(engine)
        old = claimed(claims)
        expire(engine, job_id)
        assert claims.reap() == 1
        new = claimed(claims)
        assert new.fence == old.fence + 1
        with pytest.raises(LeaseLost):
            claims.succeed(old, result={"from": "old"}, adapter=None)
        with pytest.raises(LeaseLost):
            claims.wish(old)
        claims.succeed(new, result={"from": "new"}, adapter=None)
        assert row(engine, job_id).result == {"from": "new"}

    def test_a_requeued_job_takes_no_writes_before_it_is_claimed_again(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        lease = claimed(claims)
        claims.release(lease, "drained")
        with pytest.raises(LeaseLost):
            claims.fail(lease, Reason.INTERNAL, "late", None)
        assert row(engine, job_id).status == Status.QUEUED

    def test_a_finished_job_is_immutable(self, engine: Engine, claims: Claims) -> None:
        job_id = add_job(engine)
        lease = claimed(claims)
        claims.succeed(lease, result={}, adapter=None)
        for write in (claims.cancel, lambda held: claims.fail(held, Reason.INTERNAL, "late", None)):
            with pytest.raises(LeaseLost):
                write(lease)
        assert row(engine, job_id).status == Status.SUCCEEDED


class TestAttempts:
    def test_a_drained_attempt_does_not_count(self, engine: Engine, claims: Claims) -> None:
        add_job(engine)
        for _ in range(5):
            lease = claimed(claims)
            assert lease.attempt == 1
            claims.release(lease, "drained")

    def test_a_lost_trainer_counts_and_the_third_fails_the_job(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        for attempt in (1, 2, 3):
            lease = claimed(claims)
            assert lease.attempt == attempt
            claims.lose(lease, Reason.WORKER_LOST, "The trainer was killed by SIGKILL.")
        job = row(engine, job_id)
        assert (job.status, job.reason) == (Status.FAILED, Reason.WORKER_LOST)
        assert job.message == "The trainer was killed by SIGKILL. That was attempt 3 of 3."

    def test_recovery_puts_back_only_what_this_worker_held(
        self, engine: Engine, claims: Claims
    ) -> None:
        mine, theirs = add_job(engine), add_job(engine)
        claimed(claims)
        claimed(Claims(engine, worker="w2", lease_seconds=60, max_attempts=3))
        assert claims.recover() == 1
        assert row(engine, mine).status == Status.QUEUED
        assert row(engine, mine).attempt == 0
        assert row(engine, theirs).status == Status.RUNNING

    def test_a_job_that_takes_the_service_down_each_time_does_not_come_back_for_ever(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id, other = add_job(engine), add_job(engine)
        for _ in range(RECOVERIES_LIMIT):
            assert claimed(claims).job_id == job_id
            assert claims.recover() == 1
        claimed(claims)
        claims.recover()
        job = row(engine, job_id)
        assert (job.status, job.reason) == (Status.FAILED, Reason.INTERNAL)
        assert job.message == "The service died 11 times while it held this job."
        assert claimed(claims).job_id == other

    def test_a_job_that_goes_forward_may_be_interrupted_any_number_of_times(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        for step in range(1, 2 * RECOVERIES_LIMIT):
            progress = Progress(claims, claimed(claims))
            progress.take({"kind": "step", "step": step, "total": 99, "metrics": {}})
            progress.flush()
            claims.recover()
        assert row(engine, job_id).status == Status.QUEUED

    def test_a_live_lease_is_not_reaped(self, engine: Engine, claims: Claims) -> None:
        add_job(engine)
        claimed(claims)
        assert claims.reap() == 0


class TestProgress:
    def test_the_time_that_attempts_have_worked_adds_up(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        lease = claimed(claims)
        assert lease.runtime == 0
        before = time.monotonic()
        progress = Progress(claims, lease)
        progress.flush()
        progress.flush()
        assert 0 < row(engine, job_id).runtime <= time.monotonic() - before
        claims.release(lease, "drained")
        assert claimed(claims).runtime == row(engine, job_id).runtime

    def test_a_flush_waits_for_what_another_thread_is_writing(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        progress = Progress(claims, claimed(claims))
        for n in range(200):
            progress.take({"kind": "held_out", "step": n, "metrics": {"loss": 1.0}})
            other = threading.Thread(target=progress.flush)
            other.start()
            progress.flush()
            with Session(engine) as session:
                count = (
                    select(func.count()).select_from(MetricRow).where(MetricRow.job_id == job_id)
                )
                assert session.scalar(count) == n + 1
            other.join()


class TestWishes:
    @pytest.fixture
    def cancelling(self, engine: Engine, claims: Claims) -> Lease:
        add_job(engine)
        lease = claimed(claims)
        with Session(engine.execution_options(writes=True)) as session, session.begin():
            session.execute(update(JobRow).values(status=Status.CANCELLING))
        return lease

    def test_the_heartbeat_brings_the_wish(self, claims: Claims, cancelling: Lease) -> None:
        assert claims.wish(cancelling) is Status.CANCELLING

    @pytest.mark.parametrize("end", ["release", "lose", "reap"])
    def test_a_job_that_was_to_be_cancelled_does_not_come_back(
        self, engine: Engine, claims: Claims, cancelling: Lease, end: str
    ) -> None:
        match end:
            case "release":
                claims.release(cancelling, "drained")
            case "lose":
                claims.lose(cancelling, Reason.WORKER_LOST, "died")
            case _:
                expire(engine, cancelling.job_id)
                claims.reap()
        assert row(engine, cancelling.job_id).status == Status.CANCELLED


class TestTransitions:
    def test_only_a_job_that_was_to_be_cancelled_is_cancelled_by_its_worker(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        lease = claimed(claims)
        with pytest.raises(LeaseLost):
            claims.cancel(lease)
        assert row(engine, job_id).status == Status.RUNNING

    def test_over_names_jobs_that_have_ended_with_their_reasons(
        self, engine: Engine, claims: Claims
    ) -> None:
        ended, failed, waiting = add_job(engine), add_job(engine), add_job(engine)
        claims.succeed(claimed(claims), result={}, adapter=None)
        claims.fail(claimed(claims), Reason.LOSS_DIVERGED, "NaN", None)
        assert claims.over([ended, failed, waiting, new_id("job")]) == {
            ended: None,
            failed: Reason.LOSS_DIVERGED,
        }


class TestEvents:
    def test_they_are_numbered_without_gaps(self, engine: Engine, claims: Claims) -> None:
        job_id = add_job(engine)
        for _ in range(3):
            claims.release(claimed(claims), "drained")
        claims.succeed(claimed(claims), result={}, adapter=None)
        with Session(engine) as session:
            events = session.execute(
                select(EventRow.seq, EventRow.type).where(EventRow.job_id == job_id)
            ).all()
        assert [event.seq for event in events] == list(range(1, 9))
        assert events[-1].type == "job.succeeded"
