"""Which workers there are, which of their slots are idle, and which jobs nobody comes for."""

import os
import platform
from typing import Any

import pytest
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from app import __version__
from app.db import now
from app.jobs.states import Status
from app.tables import WorkerRow
from tests.worker.jobs import add_job, add_jobs, change, claimed
from worker.claims import Claims
from worker.registry import Registry
from worker.slot import Slot

SLOTS = [Slot("m-a", "0"), Slot("m-b", "1")]


@pytest.fixture
def registry(engine: Engine) -> Registry:
    return Registry(engine, "machine", SLOTS)


def workers(engine: Engine) -> dict[str, WorkerRow]:
    with Session(engine) as session:
        return {worker.name: worker for worker in session.scalars(select(WorkerRow))}


def age(engine: Engine, seconds: float) -> None:
    values: dict[str, Any] = {"heartbeat_at": now(-seconds), "started_at": now(-seconds)}
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        session.execute(update(WorkerRow).values(**values))


class TestRow:
    def test_it_says_who_works_where_on_what(self, engine: Engine, registry: Registry) -> None:
        registry.beat()
        (worker,) = workers(engine).values()
        assert (worker.name, worker.host) == ("machine", platform.node())
        assert (worker.pid, worker.version, worker.state) == (os.getpid(), __version__, "active")
        assert worker.slots == [{"name": "m-a", "device": "0"}, {"name": "m-b", "device": "1"}]
        assert worker.started_at <= worker.heartbeat_at

    def test_a_beat_moves_the_heartbeat_and_not_the_start(
        self, engine: Engine, registry: Registry
    ) -> None:
        registry.beat()
        age(engine, 100)
        started = workers(engine)["machine"].started_at
        registry.beat()
        worker = workers(engine)["machine"]
        assert worker.started_at == started
        assert 95 < (worker.heartbeat_at - started).total_seconds() < 130

    def test_one_that_drains_says_so(self, engine: Engine, registry: Registry) -> None:
        registry.beat()
        registry.is_draining = True
        registry.beat()
        assert workers(engine)["machine"].state == "draining"

    def test_a_successor_takes_the_row_of_one_that_was_killed(
        self, engine: Engine, registry: Registry
    ) -> None:
        registry.is_draining = True
        registry.beat()
        age(engine, 100)
        Registry(engine, "machine", SLOTS[:1]).beat()
        worker = workers(engine)["machine"]
        assert (worker.state, len(worker.slots)) == ("active", 1)
        assert abs((worker.heartbeat_at - worker.started_at).total_seconds()) < 5

    def test_one_that_leaves_is_gone_and_the_others_stay(
        self, engine: Engine, registry: Registry
    ) -> None:
        for each in (registry, Registry(engine, "other", [])):
            each.beat()
        registry.leave()
        assert list(workers(engine)) == ["other"]

    def test_one_that_was_removed_meanwhile_comes_back(
        self, engine: Engine, registry: Registry
    ) -> None:
        registry.beat()
        registry.forget_lost(-1)
        registry.beat()
        assert list(workers(engine)) == ["machine"]

    def test_those_that_are_silent_for_too_long_are_forgotten(
        self, engine: Engine, registry: Registry
    ) -> None:
        Registry(engine, "lost", []).beat()
        age(engine, 100)
        registry.beat()
        registry.forget_lost(200)
        assert set(workers(engine)) == {"machine", "lost"}
        registry.forget_lost(50)
        assert set(workers(engine)) == {"machine"}


class TestIdleSlots:
    def test_a_slot_that_holds_a_job_is_not_idle(self, engine: Engine, registry: Registry) -> None:
        add_jobs(engine, 3)
        assert registry.idle_slots(1) == 2
        lease = claimed(Claims(engine, worker="m-a", lease_seconds=60, max_attempts=3))
        claimed(Claims(engine, worker="elsewhere", lease_seconds=60, max_attempts=3))
        assert registry.idle_slots(1) == 1
        change(engine, lease.job_id, status=Status.CANCELLING)
        assert registry.idle_slots(1) == 1
        change(engine, lease.job_id, status=Status.CANCELLED)
        assert registry.idle_slots(1) == 2


class TestSizes:
    """Slots of different sizes are looked after apart."""

    @pytest.fixture
    def registry(self, engine: Engine) -> Registry:
        slots = [Slot("m-a", "0+1"), Slot("m-b", "2"), Slot("m-c", "3")]
        return Registry(engine, "machine", slots)

    def test_each_size_has_its_idle_slots_and_starts(
        self, engine: Engine, registry: Registry
    ) -> None:
        assert [registry.idle_slots(size) for size in (1, 2, 3)] == [2, 1, 0]
        add_job(engine, gpus=2)
        claimed(Claims(engine, worker="m-a", lease_seconds=60, max_attempts=3))
        assert [registry.idle_slots(size) for size in (1, 2)] == [2, 0]
        assert registry.newest_start(1) is None
        assert registry.newest_start(2) is not None

    def test_a_job_waits_for_those_alone_into_which_it_fits(
        self, engine: Engine, registry: Registry
    ) -> None:
        for gpus in (1, 2, 4):
            add_job(engine, age=100, gpus=gpus)
        waiting = [registry.waiting_jobs(size, 10, for_seconds=30) for size in (1, 2, 4)]
        assert waiting == [1, 2, 3]


class TestWaitingJobs:
    def test_only_those_count_that_could_have_been_taken_for_so_long(
        self, engine: Engine, registry: Registry
    ) -> None:
        add_job(engine, age=100)
        add_job(engine, age=10)
        add_job(engine, age=100, available_at=now(60))
        add_job(engine, age=100, available_at=now(-10))
        add_job(engine, age=100, available_at=now(-50))
        add_job(engine, age=100, status=Status.RUNNING)
        add_job(engine, age=100, status=Status.FAILED)
        assert registry.waiting_jobs(1, 10, for_seconds=30) == 2
        assert registry.waiting_jobs(1, 10, for_seconds=5) == 4
        assert registry.waiting_jobs(1, 10, for_seconds=200) == 0

    def test_no_more_than_asked_for(self, engine: Engine, registry: Registry) -> None:
        add_jobs(engine, 50)
        assert registry.waiting_jobs(1, 2, for_seconds=30) == 2

    def test_a_job_that_came_back_waits_since_then(
        self, engine: Engine, registry: Registry, claims: Claims
    ) -> None:
        job_id = add_job(engine, age=1000)
        claims.release(claimed(claims), "drained")
        assert registry.waiting_jobs(1, 1, for_seconds=30) == 0
        change(engine, job_id, updated_at=now(-40))
        assert registry.waiting_jobs(1, 1, for_seconds=30) == 1
