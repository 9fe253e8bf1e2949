"""A session sees and writes the rows of its own project, whatever its statements forget."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import delete, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, aliased

from app.db import Database, make_engine, now
from app.ids import new_id
from app.jobs.events import event
from app.jobs.states import Status
from app.scope import ScopedSession
from app.tables import AuditRow, EventRow, IdempotencyRow, JobRow, MetricRow, OfJob, Owned, Table


def values(job_id: str) -> dict[str, Any]:
    return {
        "id": job_id, "base_model": "m", "dataset_uri": "d", "spec": {}, "status": Status.QUEUED,
        "created_at": now(), "updated_at": now(), "labels": {}, "attempt": 0, "fence": 0,
        "runtime": 0.0, "recoveries": 0, "step": 0,
    }  # fmt: skip


@dataclass
class Two:
    """Two projects with the same in each: a job, its event, its idempotency key."""

    url: str
    mine: str
    theirs: str

    def within(self, say: Callable[[AsyncSession], Awaitable[Any]], project: str = "a") -> Any:
        """In a session of one project, whose transaction commits."""

        async def run() -> Any:
            database = Database(self.url)
            try:
                async with database.scoped(project, writes=True) as session:
                    return await say(session)
            finally:
                await database.engine.dispose()

        return asyncio.run(run())

    def all(self, statement: Any) -> list[Any]:
        """What is in the database, whoever it belongs to."""
        engine = make_engine(self.url)
        with Session(engine) as session:
            found = list(session.scalars(statement))
        engine.dispose()
        return found


@pytest.fixture
def two(migrated_url: str) -> Two:
    two = Two(migrated_url, new_id("job"), new_id("job"))

    async def fill(session: AsyncSession, job_id: str) -> None:
        await session.execute(insert(JobRow).values(values(job_id)))
        await session.execute(event(job_id, "job.queued", "x"))
        row = IdempotencyRow(key="k", body_sha256=job_id, job_id=job_id, created_at=now())
        session.add(row)

    two.within(lambda session: fill(session, two.mine), "a")
    two.within(lambda session: fill(session, two.theirs), "b")
    return two


READS: dict[str, Callable[[], Any]] = {
    "select": lambda: select(JobRow.id),
    "entity": lambda: select(JobRow).with_only_columns(JobRow.id),
    "where": lambda: select(JobRow.id).where(JobRow.status == Status.QUEUED),
    "aliased": lambda: select(aliased(JobRow).id),
    "count": lambda: select(func.count(JobRow.id)),
    "count of nothing": lambda: select(func.count()).select_from(aliased(JobRow)),
    "subquery": lambda: select(func.count()).select_from(select(JobRow.id).limit(9).subquery()),
    "scalar subquery": lambda: select(select(func.count(JobRow.id)).scalar_subquery()),
    "of a subquery": lambda: select(
        select(func.count()).select_from(select(JobRow.id).limit(9).subquery()).scalar_subquery()
    ),
    "cte": lambda: select(func.count()).select_from(select(JobRow.id).cte()),
    "union of two": lambda: select(
        func.count()
    ).select_from(select(JobRow.id).union_all(select(EventRow.job_id)).subquery()),
    "events": lambda: select(EventRow.job_id),
    "join": lambda: select(EventRow.job_id).join(JobRow, JobRow.id == EventRow.job_id),
    "outer join": lambda: select(JobRow.id).outerjoin(EventRow, JobRow.id == EventRow.job_id),
    "in": lambda: select(EventRow.job_id).where(EventRow.job_id.in_(select(JobRow.id))),
    "keys": lambda: select(IdempotencyRow.job_id),
    "locked": lambda: select(JobRow.id).with_for_update(),
}  # fmt: skip


class TestReading:
    def test_of_two_rows_one_is_seen_in_whatever_form_it_is_asked_for(self, two: Two) -> None:
        async def read(session: AsyncSession) -> dict[str, list[Any]]:
            return {form: list(await session.scalars(make())) for form, make in READS.items()}

        for form, found in two.within(read).items():
            one = [[two.mine], [2 if form == "union of two" else 1]]
            assert found in one, form

    def test_theirs_does_not_exist(self, two: Two) -> None:
        async def look(session: AsyncSession) -> list[Any]:
            theirs = select(JobRow.id).where(JobRow.id == two.theirs)
            return [
                await session.get(JobRow, two.theirs),
                await session.get(IdempotencyRow, ("b", "k")),
                await session.scalar(theirs),
                await session.scalar(select(exists(theirs))) or None,
                await session.scalar(select(EventRow).where(EventRow.job_id == two.theirs)),
            ]

        assert two.within(look) == [None] * 5

    def test_mine_does(self, two: Two) -> None:
        async def look(session: AsyncSession) -> list[bool]:
            return [
                await session.get(JobRow, two.mine) is not None,
                await session.get(IdempotencyRow, ("a", "k")) is not None,
                await session.get(EventRow, (two.mine, 1)) is not None,
            ]

        assert two.within(look) == [True] * 3

    def test_each_of_many_projects_sees_its_own_though_statements_are_cached(
        self, two: Two
    ) -> None:
        async def look(session: AsyncSession) -> list[str]:
            return list(await session.scalars(select(JobRow.id)))

        found = [two.within(look, project) for project in ("a", "b", "c", "a")]
        assert found == [[two.mine], [two.theirs], [], [two.mine]]


class TestWriting:
    def test_an_update_and_a_deletion_reach_no_row_of_another(self, two: Two) -> None:
        async def write(session: AsyncSession) -> list[list[str]]:
            changed = update(JobRow).values(step=3).returning(JobRow.id)
            theirs = update(JobRow).where(JobRow.id == two.theirs).values(step=9)
            told = delete(EventRow).returning(EventRow.job_id)
            gone = delete(JobRow).where(JobRow.id == two.theirs).returning(JobRow.id)
            return [
                list(await session.scalars(statement))
                for statement in (changed, theirs.returning(JobRow.id), told, gone)
            ]

        assert two.within(write) == [[two.mine], [], [two.mine], []]
        assert sorted(two.all(select(JobRow.step))) == [0, 3]
        assert two.all(select(EventRow.job_id)) == [two.theirs]

    def test_what_is_inserted_is_its_own_whatever_the_statement_says(self, two: Two) -> None:
        async def write(session: AsyncSession) -> None:
            audit = {"at": now(), "actor": "x", "action": "y", "object": "z", "request_id": "r"}
            await session.execute(insert(AuditRow).values(**audit))
            await session.execute(insert(AuditRow).values(**audit, project="b"))
            session.add(AuditRow(**audit, project="b"))
            await session.flush()
            session.add(AuditRow(**audit))

        two.within(write)
        assert two.all(select(AuditRow.project)) == ["a"] * 4


class TestWithoutAProject:
    def test_a_session_that_has_none_refuses(self, two: Two) -> None:
        engine = make_engine(two.url)
        with ScopedSession(engine) as session, pytest.raises(KeyError, match="project"):
            session.scalars(select(JobRow.id))
        with ScopedSession(engine) as session, pytest.raises(KeyError, match="project"):
            session.execute(delete(JobRow))
        with ScopedSession(engine) as session:
            session.add(IdempotencyRow(key="x", body_sha256="", job_id="", created_at=now()))
            with pytest.raises(KeyError, match="project"):
                session.flush()
        engine.dispose()

    def test_the_workers_sessions_see_all(self, two: Two) -> None:
        assert sorted(two.all(select(JobRow.id))) == sorted([two.mine, two.theirs])


def test_every_table_says_whom_its_rows_belong_to() -> None:
    """A new table is of a project, hangs on a job, or is named here with its reason."""
    nobodys = {
        "outbox",  # wake-ups for workers; no route shows them
        "workers",  # the machines are everybody's
    }
    for mapper in Table.registry.mappers:
        is_somebodys = issubclass(mapper.class_, Owned | OfJob)
        assert is_somebodys is not (mapper.class_.__tablename__ in nobodys), mapper.class_
    assert MetricRow.__tablename__ == "job_metrics"
