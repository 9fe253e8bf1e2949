"""The queue's promises, on SQLite and Postgres: a job is taken once, and one attempt writes."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, func, inspect, select
from sqlalchemy.orm import Session

from app.db import now
from app.failpoints import VARIABLE
from app.ids import new_id
from app.jobs.states import Reason, Status
from app.tables import EventRow, JobRow, MetricRow
from tests.worker.jobs import (
    add_job,
    change,
    claimed,
    expire,
    row,
    seconds_from_now,
)
from worker.claims import RECOVERIES_LIMIT, Claims
from worker.lease import Lease, LeaseLost
from worker.progress import Progress, upsert_metric

WRITES: dict[str, Callable[[Claims, Lease], object]] = {
    "beat": lambda claims, lease: claims.beat(
        lease,
        [upsert_metric(claims.dialect, {
            "job_id": lease.job_id, "series": "train", "step": 1, "data": {"loss": 1.0}
        })],
        step=1,
    ),
    "pin": lambda claims, lease: claims.pin(lease, {"clock": "then"}),
    "hand_over": lambda claims, lease: claims.hand_over(lease, {"fence": 1, "step": 9}),
    "succeed": lambda claims, lease: claims.succeed(lease, result={}, adapter=None),
    "fail": lambda claims, lease: claims.fail(lease, Reason.INTERNAL, "late", None),
    "cancel": lambda claims, lease: claims.cancel(lease),
    "release": lambda claims, lease: claims.release(lease, "drained"),
    "lose": lambda claims, lease: claims.lose(lease, Reason.WORKER_LOST, "died"),
}  # fmt: skip


def everything(engine: Engine) -> list[Any]:
    """All that the database holds, to see that nothing has changed."""
    with engine.connect() as connection:
        tables = inspect(connection).get_table_names()
        return [connection.exec_driver_sql(f"SELECT * FROM {name}").all() for name in tables]  # noqa: S608 - our own tables


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

    def test_the_time_that_the_answer_took_belongs_to_the_lease(
        self, engine: Engine, claims: Claims, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(VARIABLE, "claim.after_commit=sleep:0.3")
        add_job(engine)
        lease = claimed(claims)
        assert time.monotonic() - lease.asked_at >= 0.3


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

    def test_it_rises_with_every_claim_whatever_came_before(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        fences = []
        for end in ("release", "lose", "reap", "recover"):
            lease = claimed(claims)
            fences.append(lease.fence)
            if end in WRITES:
                WRITES[end](claims, lease)
            elif end == "reap":
                expire(engine, job_id)
                claims.reap()
            else:
                claims.recover()
        assert fences == [1, 2, 3, 4]

    @pytest.mark.parametrize("since", ["claimed again", "waits", "is over"])
    def test_a_write_of_an_earlier_attempt_is_refused_and_changes_nothing(
        self, engine: Engine, since: str
    ) -> None:
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3, wakes=True)
        job_id = add_job(engine)
        old = claimed(claims)
        expire(engine, job_id)
        claims.reap()
        if since != "waits":
            new = claimed(claims)
            change(engine, job_id, status=Status.CANCELLING)  # all moves would be allowed
            if since == "is over":
                claims.cancel(new)
        before = everything(engine)
        for name, write in WRITES.items():
            with pytest.raises(LeaseLost, match=job_id):
                write(claims, old)
            assert everything(engine) == before, name


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

    def test_recovery_passes_over_what_somebody_else_has_put_back(self, engine: Engine) -> None:
        class Overtaken(Claims):
            def release(self, lease: Lease, why: str, **values: Any) -> None:
                if lease.job_id == first:
                    expire(engine, first)
                    assert self.reap() == 1
                super().release(lease, why, **values)

        claims = Overtaken(engine, worker="w1", lease_seconds=60, max_attempts=3)
        first, second = add_job(engine), add_job(engine)
        for _ in range(2):
            claimed(claims)
        assert claims.recover() == 1
        assert [row(engine, job_id).status for job_id in (first, second)] == [Status.QUEUED] * 2

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


class TestBackOff:
    def test_it_doubles_with_each_death_and_no_two_jobs_wait_equally_long(
        self, engine: Engine
    ) -> None:
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=9, retry_seconds=100)
        jobs = [add_job(engine) for _ in range(6)]
        for attempt in range(1, 5):
            waits = []
            for lease in [claimed(claims) for _ in jobs]:
                assert lease.attempt == attempt
                claims.lose(lease, Reason.WORKER_LOST, "died")
                waits.append(
                    seconds_from_now(engine, JobRow.available_at, JobRow.id == lease.job_id)
                )
            usual = 100 * 2 ** (attempt - 1)
            assert 0.8 * usual - 5 < min(waits) < max(waits) < 1.2 * usual
            assert max(waits) - min(waits) > 0.01 * usual
            for job_id in jobs:
                change(engine, job_id, available_at=now())

    def test_it_ends_at_an_hour_however_many_attempts_a_job_is_given(self, engine: Engine) -> None:
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=9999, retry_seconds=10)
        job_id = add_job(engine)
        lease = replace(claimed(claims), attempt=2000)
        claims.lose(lease, Reason.WORKER_LOST, "died")
        wait = seconds_from_now(engine, JobRow.available_at, JobRow.id == job_id)
        assert 0.8 * 3600 - 5 < wait < 1.2 * 3600

    def test_others_go_first_meanwhile(self, engine: Engine) -> None:
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3, retry_seconds=60)
        add_job(engine, age=60, priority=0)
        other = add_job(engine)
        claims.lose(claimed(claims), Reason.WORKER_LOST, "died")
        assert claimed(claims).job_id == other
        assert claims.claim_next() is None

    @pytest.mark.parametrize("end", ["release", "reap"])
    def test_a_job_whose_trainer_has_not_died_does_not_wait(self, engine: Engine, end: str) -> None:
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3, retry_seconds=60)
        job_id = add_job(engine)
        lease = claimed(claims)
        if end == "reap":
            expire(engine, job_id)
            claims.reap()
        else:
            claims.release(lease, "drained")
        assert claimed(claims).job_id == job_id


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

    def test_rows_that_are_validated_are_progress_and_a_sign_of_life(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        progress = Progress(claims, claimed(claims))
        heard_at = progress.heard_at
        progress.take({"kind": "rows", "done": 5, "total": None})
        assert progress.heard_at > heard_at
        progress.flush()
        assert row(engine, job_id).progress == {"rows": 5, "of": None}

    def test_a_flush_waits_for_what_another_thread_is_writing(
        self, engine: Engine, claims: Claims
    ) -> None:
        job_id = add_job(engine)
        progress = Progress(claims, claimed(claims))
        for n in range(60):
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
        change(engine, lease.job_id, status=Status.CANCELLING)
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
