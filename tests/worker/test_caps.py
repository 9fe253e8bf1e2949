"""No project runs more jobs than it may, however many workers ask at once."""

import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session

from app.db import make_engine
from app.jobs.states import Status
from app.quotas.repository import add_project, limiting
from app.tables import JobRow
from tests.app.listening import said
from tests.system.service import until
from tests.waiting import seconds_of
from tests.worker.jobs import add_job, add_jobs, change, claimed
from worker.caps import Cap, check_cap
from worker.claims import Claims


def allow(engine: Engine, project: str, max_running: int | None) -> None:
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        session.execute(add_project(engine.dialect.name, project=project))
        session.execute(limiting(project, {"max_running": max_running}))


def running(engine: Engine) -> Counter[str]:
    with Session(engine) as session:
        held = select(JobRow.project).where(JobRow.status != Status.QUEUED)
        return Counter(session.scalars(held))


def make_claims(engine: Engine, most: int | None = None, worker: str = "w") -> Claims:
    return Claims(engine, worker=worker, lease_seconds=60, max_attempts=3, max_running=most)


class TestCap:
    def test_a_project_that_runs_as_many_as_it_may_is_passed_over(self, engine: Engine) -> None:
        add_jobs(engine, 5, project="small")
        add_jobs(engine, 5, project="large")
        allow(engine, "small", 1)
        claims = make_claims(engine)
        leases = [claimed(claims) for _ in range(6)]
        assert running(engine) == {"small": 1, "large": 5}
        assert claims.claim_next() is None
        held = next(lease for lease in leases if "small" in project_of(engine, lease.job_id))
        claims.succeed(held, result={}, adapter=None)
        assert project_of(engine, claimed(claims).job_id) == "small"
        assert claims.claim_next() is None

    def test_the_settings_say_it_for_those_that_have_none_of_their_own(
        self, engine: Engine
    ) -> None:
        for project, own in (("usual", None), ("wide", 3), ("open", -1), ("shut", 0)):
            add_jobs(engine, 5, project=project)
            if own is not None:
                allow(engine, project, own)
        claims = make_claims(engine, most=2)
        while claims.claim_next():
            pass
        assert running(engine) == {"usual": 2, "wide": 3, "open": 5}

    def test_a_job_that_is_to_be_stopped_runs_still(self, engine: Engine) -> None:
        add_jobs(engine, 2, project="a")
        claims = make_claims(engine, most=1)
        change(engine, claimed(claims).job_id, status=Status.CANCELLING)
        assert claims.claim_next() is None

    def test_a_locked_job_of_another_does_not_open_a_full_project(
        self, migrated_postgres_url: str
    ) -> None:
        engine = make_engine(migrated_postgres_url)
        only = add_job(engine, age=60, project="a")
        add_jobs(engine, 3, project="full")
        allow(engine, "full", 0)
        with engine.begin() as hanging:
            hanging.execute(select(JobRow.id).where(JobRow.id == only).with_for_update())
            assert make_claims(engine).claim_next() is None
        assert claimed(make_claims(engine)).job_id == only
        engine.dispose()

    def test_to_ask_in_vain_costs_little(self, engine: Engine) -> None:
        """An idle worker asks twice a second, also for days while a project is full."""
        add_jobs(engine, 50, project="full")
        claims = make_claims(engine, most=0)
        with said("jobs") as statements:
            assert claims.claim_next() is None
        assert len(statements) <= 3

    def test_where_no_project_is_limited_a_claim_asks_as_much_as_before(
        self, engine: Engine
    ) -> None:
        add_jobs(engine, 3)
        claims = make_claims(engine)
        with said("") as statements:
            claimed(claims)
        told = [statement for statement, _ in statements if "BEGIN" not in statement]
        assert len(told) == 3  # is there one, take it, tell it
        assert [statement for statement in told[1:] if "projects" in statement] == []


class TestRace:
    def test_two_that_choose_the_same_project_at_once_pass_one_by_one(
        self, migrated_postgres_url: str
    ) -> None:
        """Neither sees what the other has not committed."""
        engine = make_engine(migrated_postgres_url)
        first, _ = add_jobs(engine, 2, project="a")
        with ThreadPoolExecutor(1) as pool:
            with Session(engine) as one, one.begin():
                one.execute(update(JobRow).where(JobRow.id == first).values(status=Status.RUNNING))
                check_cap(one, "a", Cap(1))
                other = pool.submit(make_claims(engine, most=1).claim_next)
                until(lambda: waits(engine) or other.done())
                assert not other.done()
            assert other.result() is None
        assert running(engine) == {"a": 1}
        engine.dispose()


def waits(engine: Engine) -> bool:
    """Whether somebody on this database waits for a lock."""
    with engine.connect() as connection:
        locks = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        mine = " AND datname = current_database()"
        return bool(connection.scalar(text(locks + mine)))


def test_a_claim_among_many_projects_is_quick_with_a_limit_too(engine: Engine) -> None:
    for number in range(20):
        add_jobs(engine, 100, project=f"project-{number}")
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("ANALYZE jobs"))
    claims = make_claims(engine, most=2)
    claimed(claims)
    assert statistics.median(seconds_of(lambda: claimed(claims)) for _ in range(20)) < 0.1


def project_of(engine: Engine, job_id: str) -> str:
    with Session(engine) as session:
        return session.get_one(JobRow, job_id).project
