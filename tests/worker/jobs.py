"""Jobs in a database, and what becomes of them there."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, func, insert, select, update
from sqlalchemy.orm import Session

from app.db import now
from app.ids import new_id
from app.jobs.schemas import JobCreate
from app.jobs.states import Status
from app.tables import EventRow, JobRow, OutboxRow
from worker.claims import Claims
from worker.lease import Lease

Json = dict[str, Any]


def make_spec(**values: Any) -> Json:
    """A job as it is asked for, with the defaults of the HTTP contract."""
    asked = {"base_model": "org/name", "dataset_uri": "file:rows.jsonl"} | values
    return JobCreate.model_validate(asked).resolved().model_dump(mode="json")


def add_job(
    engine: Engine, *, age: float = 0, spec: Mapping[str, Any] | None = None, **values: Any
) -> str:
    """A queued job that was submitted so many seconds ago."""
    described = dict(spec or make_spec())
    job_id = new_id("job")
    row = {
        "id": job_id,
        "base_model": described["base_model"],
        "dataset_uri": described["dataset_uri"],
        "spec": described,
        "status": Status.QUEUED,
        "created_at": now(-age),
        "updated_at": now(-age),
    }
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        session.execute(insert(JobRow).values(row | values))
    return job_id


def add_jobs(engine: Engine, count: int, **values: Any) -> list[str]:
    """Many, the first the oldest, all older than a minute."""
    spec, oldest = make_spec(), datetime.now(UTC) - timedelta(seconds=60 + count)
    moments = [oldest + timedelta(seconds=number) for number in range(count)]
    rows = [
        {
            "id": new_id("job"),
            "base_model": spec["base_model"],
            "dataset_uri": spec["dataset_uri"],
            "spec": spec,
            "status": Status.QUEUED,
            "created_at": moment,
            "updated_at": moment,
            **values,
        }
        for moment in moments
    ]
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        session.execute(insert(JobRow), rows)
    return [str(row["id"]) for row in rows]


def change(engine: Engine, job_id: str, **values: Any) -> None:
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        session.execute(update(JobRow).where(JobRow.id == job_id).values(**values))


def expire(engine: Engine, job_id: str) -> None:
    """Let the lease run out."""
    change(engine, job_id, lease_until=now(-1))


def row(engine: Engine, job_id: str) -> JobRow:
    with Session(engine) as session:
        return session.get_one(JobRow, job_id)


def claimed(claims: Claims) -> Lease:
    lease = claims.claim_next()
    assert lease is not None
    return lease


def event_types(engine: Engine, job_id: str) -> list[str]:
    with Session(engine) as session:
        statement = select(EventRow.type).where(EventRow.job_id == job_id).order_by(EventRow.seq)
        return list(session.scalars(statement))


def outbox(engine: Engine) -> list[str]:
    """The jobs that a wake-up waits for, in order."""
    with Session(engine) as session:
        return list(session.scalars(select(OutboxRow.job_id).order_by(OutboxRow.id)))


def seconds_from_now(engine: Engine, column: Any, *conditions: Any) -> float:
    """How far ahead of the database's clock a moment is."""
    with Session(engine) as session:
        moment, clock = session.execute(select(column, now()).where(*conditions)).one()
    return float((moment - clock).total_seconds())


def count(engine: Engine, *conditions: Any) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(JobRow).where(*conditions)) or 0
