"""While a cluster is upgraded, 0.1 goes on beside this version on one database."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.ids import new_id
from app.jobs.states import Reason, Status
from app.tables import IdempotencyRow, JobRow, MetricRow
from tests.migrations.release_0_1 import OldLease, Release01
from tests.worker.jobs import (
    add_job,
    change,
    claimed,
    event_types,
    expire,
    make_spec,
    outbox,
    row,
)
from worker.claims import Claims
from worker.lease import LeaseLost
from worker.registry import Registry


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    engine = make_engine(migrated_url)
    yield engine
    engine.dispose()


@pytest.fixture
def old(engine: Engine) -> Release01:
    return Release01(engine)


@pytest.fixture
def new(engine: Engine) -> Claims:
    return Claims(
        engine, worker="new", lease_seconds=60, max_attempts=3, retry_seconds=60, wakes=True
    )


@pytest.fixture
def submitted(old: Release01) -> str:
    """By the old API."""
    job_id = new_id("job")
    old.submit(job_id, make_spec(), key="k")
    return job_id


def held(old: Release01) -> OldLease:
    lease = old.claim()
    assert lease is not None
    return lease


class TestOldAlone:
    def test_a_job_lives_its_whole_life(
        self, engine: Engine, old: Release01, submitted: str
    ) -> None:
        assert old.page() == [submitted]
        lease = held(old)
        for loss in (2.0, 1.0):  # the second replaces the first
            assert old.beat(lease, 3, loss) == "running"
        old.release(lease)
        lease = held(old)
        assert (lease.fence, lease.attempt) == (2, 1)
        assert old.wish(lease) == "running"
        assert old.expired() == []
        assert old.succeed(lease)
        job = row(engine, submitted)
        assert (job.status, job.step, job.runtime) == (Status.SUCCEEDED, 3, 3.0)
        assert (job.result, job.adapter) == ({"steps": 9}, {"files": [], "size": 0})
        assert (job.project, job.priority) == ("default", 5)
        assert event_types(engine, submitted) == [
            "job.queued", "job.running", "job.evaluated", "job.evaluated", "job.requeued",
            "job.running", "job.succeeded",
        ]  # fmt: skip
        with Session(engine) as session:
            assert session.scalars(select(MetricRow.data)).all() == [{"loss": 1.0}]
            assert session.get_one(IdempotencyRow, ("default", "k")).job_id == submitted

    def test_a_job_can_be_cancelled(self, engine: Engine, old: Release01, submitted: str) -> None:
        lease = held(old)
        assert old.cancel(submitted) == "cancelling"
        assert old.beat(lease, 1, 1.0) == "cancelling"


class TestOldToNew:
    def test_a_job_of_the_old_api_is_claimed_by_the_new_worker(
        self, engine: Engine, new: Claims, submitted: str
    ) -> None:
        lease = claimed(new)
        assert (lease.job_id, lease.inputs, lease.checkpoint) == (submitted, None, None)
        new.succeed(lease, result={}, adapter=None)
        assert row(engine, submitted).status == Status.SUCCEEDED

    def test_it_takes_its_turn_with_the_others(
        self, engine: Engine, new: Claims, submitted: str
    ) -> None:
        urgent = add_job(engine, priority=0)
        other = add_job(engine, project="other", priority=9)
        assert [claimed(new).job_id for _ in range(3)] == [urgent, other, submitted]

    def test_one_that_the_old_worker_puts_back_is_found_though_nobody_is_woken(
        self, engine: Engine, old: Release01, new: Claims, submitted: str
    ) -> None:
        old.release(held(old))
        assert outbox(engine) == []
        registry = Registry(engine, "m", [])
        assert registry.waiting_jobs(1, 10, for_seconds=30) == 0
        change(engine, submitted, updated_at=now(-40))
        assert registry.waiting_jobs(1, 10, for_seconds=30) == 1
        assert claimed(new).job_id == submitted

    def test_one_that_it_loses_comes_back_and_is_closed_to_it(
        self, engine: Engine, old: Release01, new: Claims, submitted: str
    ) -> None:
        lost = held(old)
        expire(engine, submitted)
        assert new.reap() == 1
        assert outbox(engine) == [submitted]
        lease = claimed(new)
        assert lease.fence == lost.fence + 1
        assert (old.beat(lost, 5, 1.0), old.wish(lost), old.succeed(lost)) == (None, None, False)
        assert row(engine, submitted).step == 0


class TestNewToOld:
    @pytest.fixture
    def modern(self, engine: Engine) -> str:
        """With all that 0.1 does not know of."""
        values: dict[str, Any] = {
            "project": "p", "priority": 0, "queue_deadline": now(600), "request_id": "r",
            "traceparent": "00-1-2-01", "inputs": {"clock": "then"},
            "checkpoint": {"fence": 1, "step": 5, "files": []},
        }  # fmt: skip
        return add_job(engine, **values)

    def test_the_old_worker_takes_it_and_leaves_what_it_does_not_know(
        self, engine: Engine, old: Release01, new: Claims, modern: str
    ) -> None:
        lease = held(old)
        assert lease.job_id == modern
        old.release(lease)
        job = row(engine, modern)
        assert (job.project, job.priority, job.request_id) == ("p", 0, "r")
        again = claimed(new)
        assert again.inputs == {"clock": "then"}
        assert again.checkpoint == {"fence": 1, "step": 5, "files": []}

    def test_what_the_new_one_loses_is_closed_to_it_once_the_old_one_has_it(
        self, old: Release01, new: Claims, modern: str
    ) -> None:
        lost = claimed(new)
        new.lose(lost, Reason.WORKER_LOST, "died")
        lease = held(old)  # it knows of no back-off
        assert lease.fence == lost.fence + 1
        with pytest.raises(LeaseLost):
            new.succeed(lost, result={}, adapter=None)

    def test_the_old_worker_knows_of_no_gpus_and_takes_a_job_of_several(
        self, engine: Engine, old: Release01
    ) -> None:
        """It would train it on one. Where that matters, such jobs wait for the last upgrade."""
        job_id = add_job(engine, gpus=2)
        assert held(old).job_id == job_id

    def test_the_old_api_lists_it(self, old: Release01, modern: str) -> None:
        assert old.page() == [modern]


def test_a_row_of_0_1_needs_no_more_than_it_had(engine: Engine) -> None:
    """Whatever is added to the table has a default, in the database and not in Python."""
    old_columns = {
        "id": "job_1", "labels": {}, "base_model": "a/b", "dataset_uri": "file:a", "spec": {},
        "status": "queued", "attempt": 0, "fence": 0, "runtime": 0.0, "recoveries": 0, "step": 0,
        "created_at": now(), "updated_at": now(),
    }  # fmt: skip
    missing = {
        column.name
        for column in JobRow.__table__.columns
        if not column.nullable and column.server_default is None
    }
    assert missing == old_columns.keys()
    with engine.execution_options(writes=True).begin() as connection:
        connection.execute(insert(JobRow).values(old_columns))
