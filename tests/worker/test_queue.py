"""Whose turn it is: projects take turns, nobody starves, and nothing blocks those behind it."""

import re
import statistics
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.jobs.states import Status
from app.tables import JobRow
from tests.waiting import seconds_of
from tests.worker.jobs import add_job, add_jobs, change, claimed, row
from worker.claims import Claims
from worker.lease import Lease


def projects(engine: Engine, leases: Sequence[Lease]) -> list[str]:
    return [row(engine, lease.job_id).project for lease in leases]


class TestOrder:
    def test_priority_0_comes_before_9_and_then_the_older(
        self, engine: Engine, claims: Claims
    ) -> None:
        last = add_job(engine, age=90, priority=9)
        usual = add_job(engine, age=20)
        older = add_job(engine, age=30)
        first = add_job(engine, priority=0)
        assert [claimed(claims).job_id for _ in range(4)] == [first, older, usual, last]

    def test_jobs_of_the_same_moment_have_an_order(self, engine: Engine, claims: Claims) -> None:
        jobs = [add_job(engine) for _ in range(5)]
        for job_id in jobs:
            change(engine, job_id, created_at=row(engine, jobs[0]).created_at)
        assert [claimed(claims).job_id for _ in jobs] == sorted(jobs)


class TestSizes:
    @staticmethod
    def slot(engine: Engine, gpus: int | None) -> Claims:
        return Claims(engine, worker=f"w{gpus}", lease_seconds=60, max_attempts=3, gpus=gpus)

    @staticmethod
    def taken(claims: Claims) -> str | None:
        lease = claims.claim_next()
        return lease.job_id if lease else None

    def test_a_slot_leaves_what_it_is_too_small_for_to_others(self, engine: Engine) -> None:
        large = add_job(engine, age=30, gpus=4, priority=0)
        middle = add_job(engine, age=20, gpus=2)
        small = add_job(engine, age=10)
        one, two, four = (self.slot(engine, gpus) for gpus in (1, 2, 4))
        assert [self.taken(one), self.taken(one)] == [small, None]
        assert [self.taken(two), self.taken(two)] == [middle, None]
        assert self.taken(four) == large

    def test_another_project_is_not_held_up_by_a_job_that_fits_nowhere(
        self, engine: Engine
    ) -> None:
        add_job(engine, age=30, gpus=8, project="large")
        small = add_job(engine, project="small")
        assert self.taken(self.slot(engine, 1)) == small

    def test_one_of_several_gpus_gives_every_other_turn_to_jobs_that_need_them(
        self, engine: Engine
    ) -> None:
        small = [add_job(engine, age=90 - n) for n in range(3)]
        large = [add_job(engine, age=50 - n, gpus=2, priority=9) for n in range(2)]
        four = self.slot(engine, 4)
        order = [self.taken(four) for _ in range(6)]
        assert order == [large[0], small[0], large[1], small[1], small[2], None]

    def test_an_embedded_worker_takes_all_in_their_order(self, engine: Engine) -> None:
        jobs = [add_job(engine, age=90 - n, gpus=1 + n % 3) for n in range(5)]
        claims = self.slot(engine, None)
        assert [self.taken(claims) for _ in jobs] == jobs


class TestTurns:
    def test_with_one_slot_a_single_new_job_is_second_behind_a_thousand_old_ones(
        self, engine: Engine, claims: Claims
    ) -> None:
        add_jobs(engine, 1000, project="big")
        for project in ("small", "other"):
            add_job(engine, project=project)
        order = []
        for _ in range(5):
            lease = claimed(claims)
            order += projects(engine, [lease])
            claims.succeed(lease, result={}, adapter=None)
        assert order == ["big", "small", "other", "big", "big"]

    def test_with_one_slot_they_alternate(self, engine: Engine, claims: Claims) -> None:
        add_jobs(engine, 20, project="big")
        for _ in range(3):
            add_job(engine, project="small", priority=9)
        order = []
        for _ in range(7):
            lease = claimed(claims)
            order += projects(engine, [lease])
            claims.succeed(lease, result={}, adapter=None)
        assert order == ["big", "small", "big", "small", "big", "small", "big"]

    def test_with_several_slots_the_project_with_the_fewest_running_jobs_comes_first(
        self, engine: Engine, claims: Claims
    ) -> None:
        add_jobs(engine, 20, project="big")
        running = [claimed(claims) for _ in range(4)]
        for _ in range(20):
            add_job(engine, project="small")
        running += [claimed(claims) for _ in range(4)]
        assert projects(engine, running) == ["big"] * 4 + ["small"] * 4
        running += [claimed(claims) for _ in range(4)]
        assert Counter(projects(engine, running)) == {"big": 6, "small": 6}
        for lease in running[:3]:
            claims.succeed(lease, result={}, adapter=None)
        assert projects(engine, [claimed(claims) for _ in range(3)]) == ["big"] * 3

    def test_a_job_that_is_to_be_cancelled_still_counts_as_running(
        self, engine: Engine, claims: Claims
    ) -> None:
        held = add_job(engine, project="a")
        claimed(claims)
        change(engine, held, status=Status.CANCELLING)
        add_job(engine, project="a", age=60)
        other = add_job(engine, project="b")
        assert claimed(claims).job_id == other

    def test_a_projects_own_jobs_never_wait_for_it_while_nobody_else_does(
        self, engine: Engine, claims: Claims
    ) -> None:
        add_jobs(engine, 5, project="only")
        assert len([claimed(claims) for _ in range(5)]) == 5
        assert claims.claim_next() is None


class TestKeptBack:
    def test_a_job_that_is_kept_back_is_passed_over_until_its_time(
        self, engine: Engine, claims: Claims
    ) -> None:
        kept = add_job(engine, age=60, priority=0, available_at=now(60))
        other = add_job(engine)
        assert claimed(claims).job_id == other
        assert claims.claim_next() is None
        change(engine, kept, available_at=now())
        assert claimed(claims).job_id == kept
        assert row(engine, kept).available_at is None

    def test_a_project_that_has_only_such_jobs_blocks_nobody(
        self, engine: Engine, claims: Claims
    ) -> None:
        add_jobs(engine, 10, project="a", available_at=moment(engine, 60))
        waiting = [add_job(engine, project=project) for project in ("b", "c")]
        assert [claimed(claims).job_id for _ in waiting] == waiting
        assert claims.claim_next() is None


def moment(engine: Engine, plus_seconds: float = 0) -> Any:
    with Session(engine) as session:
        return session.scalar(select(now(plus_seconds)))


class TestRace:
    def test_sixteen_claimers_take_each_job_once_and_none_fails(
        self, engine: Engine, migrated_url: str
    ) -> None:
        jobs = [job for project in "abc" for job in add_jobs(engine, 50, project=project)]
        taken: list[str] = []
        troubles: list[Exception] = []
        start = threading.Barrier(16)

        def take_all(name: str) -> None:
            own = make_engine(migrated_url)
            claims = Claims(own, worker=name, lease_seconds=60, max_attempts=3)
            start.wait()
            try:
                while lease := claims.claim_next():
                    taken.append(lease.job_id)
            except Exception as error:
                troubles.append(error)
            own.dispose()

        threads = [threading.Thread(target=take_all, args=(f"w{n}",)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert troubles == []
        assert sorted(taken) == sorted(jobs)

    def test_a_claimer_that_hangs_in_its_transaction_blocks_none_of_the_others(
        self, migrated_postgres_url: str
    ) -> None:
        """As one does whose machine has lost its power between the claim and its commit."""
        engine = make_engine(migrated_postgres_url)
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3)
        only = add_job(engine, age=60, project="a")
        others = add_jobs(engine, 3, project="b")
        change(engine, others[0], status=Status.RUNNING)  # so that it is the turn of a
        with engine.begin() as hanging:
            hanging.execute(select(JobRow.id).where(JobRow.id == only).with_for_update())
            assert {claimed(claims).job_id for _ in range(2)} == set(others[1:])
            assert claims.claim_next() is None
        assert claimed(claims).job_id == only
        engine.dispose()


class TestCost:
    @pytest.mark.parametrize("gpus", [None, 4])
    def test_with_ten_thousand_waiting_jobs_a_claim_is_some_index_look_ups(
        self, engine: Engine, gpus: int | None
    ) -> None:
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3, gpus=gpus)
        add_jobs(engine, 5000, status=Status.SUCCEEDED, project="a", started_at=moment(engine))
        for number in range(20):
            add_jobs(engine, 500, project=f"project-{number}")
        is_postgres = engine.dialect.name == "postgresql"
        if is_postgres:
            with engine.begin() as connection:
                connection.execute(text("ANALYZE jobs"))
        with told(engine) as statements:
            claimed(claims)
        statement, values = next(said for said in statements if "UPDATE jobs" in said[0])
        with engine.connect() as connection:
            explain = "EXPLAIN" if is_postgres else "EXPLAIN QUERY PLAN"
            plan = connection.exec_driver_sql(f"{explain} {statement}", values).all()
        steps = [str(step[-1]) for step in plan]
        reads = [step for step in steps if re.search(r"(Scan|SCAN|SEARCH)\b.* jobs", step)]
        assert len(reads) > 5, steps
        for step in reads:
            assert "Index" in step or "USING" in step, "\n".join(steps)
        assert statistics.median(seconds_of(lambda: claimed(claims)) for _ in range(20)) < 0.1

    def test_larger_jobs_are_passed_over_within_the_index(self, migrated_postgres_url: str) -> None:
        """Of ten thousand larger ones before it no row is read."""
        engine = make_engine(migrated_postgres_url)
        claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3, gpus=1)
        for number in range(4):
            add_jobs(engine, 2500, project=f"project-{number}", gpus=4)
            add_job(engine, project=f"project-{number}", priority=9)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE jobs"))
        with told(engine) as statements:
            claimed(claims)
        statement, values = next(said for said in statements if "UPDATE jobs" in said[0])
        explain = "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF)"
        with engine.connect() as connection:
            plan = connection.exec_driver_sql(f"{explain} {statement}", values).all()
        steps = [str(step[-1]) for step in plan]
        removed = [int(step.rpartition(":")[2]) for step in steps if "Removed by Filter" in step]
        assert sum(removed) < 100, "\n".join(steps)
        engine.dispose()


@contextmanager
def told(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    """What is said to the database meanwhile."""
    said: list[tuple[str, Any]] = []

    def listen(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        said.append((statement, values))

    event.listen(engine, "before_cursor_execute", listen)
    yield said
    event.remove(engine, "before_cursor_execute", listen)
