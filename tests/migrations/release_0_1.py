"""What the API and the worker of 0.1 say to the database: their statements, as they were recorded.

Their tables are those of migration 0001. A later schema must understand every one of these.
"""

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, bindparam, text

ROW = """
    id, name, labels, base_model, dataset_uri, spec, status, phase, reason, message, hint, attempt,
    fence, worker, lease_until, runtime, recoveries, step, total_steps, progress, report, result,
    adapter, created_at, updated_at, started_at, finished_at
"""

SUBMIT = f"""
    INSERT INTO jobs (
        id, name, labels, base_model, dataset_uri, spec, status, attempt, fence, runtime,
        recoveries, step, created_at, updated_at
    ) VALUES (
        :id, NULL, :labels, 'a/b', 'file:rows.jsonl', :spec, 'queued', 0, 0, 0.0, 0, 0, {{now}},
        {{now}}
    ) RETURNING {ROW}
"""  # noqa: S608 - no parameter is written into any of these

REMEMBER = """
    INSERT INTO idempotency_keys ("key", body_sha256, job_id, created_at)
    VALUES (:key, :sha256, :id, {now})
"""

EVENT = """
    INSERT INTO job_events (job_id, seq, at, type, message, data) VALUES (
        :id,
        ((SELECT coalesce(max(job_events.seq), 0) FROM job_events WHERE job_events.job_id = :same)
         + 1),
        {now}, :type, :message, :data
    ) RETURNING seq
"""

CLAIM = """
    UPDATE jobs SET
        status = 'running', phase = 'fetching', attempt = (jobs.attempt + 1),
        fence = (jobs.fence + 1), worker = :worker, lease_until = {later}, updated_at = {now},
        started_at = coalesce(jobs.started_at, {now})
    WHERE jobs.id = (
        SELECT jobs.id FROM jobs WHERE jobs.status = 'queued'
        ORDER BY jobs.created_at, jobs.id LIMIT 1 {locked}
    ) AND jobs.status = 'queued'
    RETURNING id, spec, attempt, fence, runtime
"""

HELD = "jobs.id = :id AND jobs.fence = :fence AND jobs.status IN :held"

BEAT = f"""
    UPDATE jobs SET
        lease_until = {{later}}, runtime = (jobs.runtime + 1.5), recoveries = 0, step = :step,
        total_steps = 9, progress = :progress, updated_at = {{now}}
    WHERE {HELD} RETURNING status
"""  # noqa: S608

METRIC = """
    INSERT INTO job_metrics (job_id, series, step, data) VALUES (:id, 'train', :step, :data)
    ON CONFLICT (job_id, series, step) DO UPDATE SET data = excluded.data
"""

WISH = f"SELECT jobs.status FROM jobs WHERE {HELD}"  # noqa: S608

EXTEND = f"""
    UPDATE jobs SET lease_until = {{later}}, updated_at = {{now}} WHERE {HELD} RETURNING status
"""  # noqa: S608

REQUEUE = f"""
    UPDATE jobs SET
        status = 'queued', phase = NULL, attempt = (jobs.attempt - 1), worker = NULL,
        lease_until = NULL, updated_at = {{now}}
    WHERE {HELD} AND jobs.status IN ('running', 'pausing')
"""  # noqa: S608

SUCCEED = f"""
    UPDATE jobs SET
        status = 'succeeded', phase = NULL, lease_until = NULL, result = :result,
        adapter = :adapter, updated_at = {{now}}, finished_at = {{now}}
    WHERE {HELD} AND jobs.status IN ('running', 'cancelling', 'pausing')
"""  # noqa: S608

EXPIRED = """
    SELECT jobs.id, jobs.fence, jobs.attempt, jobs.spec, jobs.runtime FROM jobs
    WHERE jobs.status IN :held AND jobs.lease_until < {now} {locked}
"""

CANCEL = """
    UPDATE jobs SET
        status = CASE WHEN (jobs.status IN ('queued', 'paused')) THEN 'cancelled'
                      ELSE 'cancelling' END,
        finished_at = CASE WHEN (jobs.status IN ('queued', 'paused')) THEN {now} END,
        updated_at = {now}
    WHERE jobs.id = :id AND jobs.status IN ('queued', 'paused', 'running', 'pausing')
    RETURNING jobs.status
"""

PAGE = f"SELECT {ROW} FROM jobs ORDER BY jobs.created_at DESC, jobs.id DESC LIMIT 20"  # noqa: S608

NAMES = {
    "sqlite": {
        "now": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '+0.000000 seconds')",
        "later": "strftime('%Y-%m-%d %H:%M:%f000', 'now', '+60.000000 seconds')",
        "locked": "",
    },
    "postgresql": {
        "now": "(clock_timestamp() + make_interval(secs => 0.000000))",
        "later": "(clock_timestamp() + make_interval(secs => 60.000000))",
        "locked": "FOR UPDATE SKIP LOCKED",
    },
}


@dataclass(frozen=True)
class OldLease:
    job_id: str
    fence: int
    attempt: int


class Release01:
    """Its API, and its worker."""

    def __init__(self, engine: Engine, worker: str = "old") -> None:
        self._engine = engine.execution_options(writes=True)
        self._worker = worker

    def submit(self, job_id: str, spec: dict[str, Any], key: str) -> None:
        with self._engine.begin() as connection:
            row = self._say(connection, SUBMIT, id=job_id, labels={}, spec=spec).one()
            assert row.status == "queued"
            self._event(connection, job_id, "job.queued")
            self._say(connection, REMEMBER, key=key, sha256="0" * 64, id=job_id)

    def cancel(self, job_id: str) -> str:
        with self._engine.begin() as connection:
            status: str = self._say(connection, CANCEL, id=job_id).scalar_one()
            self._event(connection, job_id, f"job.{status}")
            return status

    def page(self) -> list[str]:
        with self._engine.begin() as connection:
            return [row.id for row in self._say(connection, PAGE)]

    def claim(self) -> OldLease | None:
        with self._engine.begin() as connection:
            row = self._say(connection, CLAIM, worker=self._worker).one_or_none()
            if row is None:
                return None
            self._event(connection, row.id, "job.running")
            return OldLease(row.id, row.fence, row.attempt)

    def beat(self, lease: OldLease, step: int, loss: float) -> str | None:
        """The status that it finds; None: the lease is lost."""
        with self._engine.begin() as connection:
            progress = {"loss": loss}
            beaten = self._held(connection, BEAT, lease, step=step, progress=progress)
            status: str | None = beaten.scalar()
            if status is not None:
                self._say(connection, METRIC, id=lease.job_id, step=step, data=progress)
                self._event(connection, lease.job_id, "job.evaluated")
            return status

    def wish(self, lease: OldLease) -> str | None:
        with self._engine.begin() as connection:
            status: str | None = self._held(connection, WISH, lease).scalar()
            return status

    def release(self, lease: OldLease) -> None:
        with self._engine.begin() as connection:
            assert self._held(connection, EXTEND, lease).scalar() == "running"
            assert self._held(connection, REQUEUE, lease).rowcount == 1
            self._event(connection, lease.job_id, "job.requeued")

    def succeed(self, lease: OldLease) -> bool:
        """Whether it still had the right to."""
        with self._engine.begin() as connection:
            values = {"result": {"steps": 9}, "adapter": {"files": [], "size": 0}}
            if self._held(connection, SUCCEED, lease, **values).rowcount == 0:
                return False
            self._event(connection, lease.job_id, "job.succeeded")
            return True

    def expired(self) -> list[str]:
        with self._engine.begin() as connection:
            return [row.id for row in self._say(connection, EXPIRED)]

    def _held(self, connection: Connection, statement: str, lease: OldLease, **values: Any) -> Any:
        return self._say(connection, statement, id=lease.job_id, fence=lease.fence, **values)

    def _event(self, connection: Connection, job_id: str, type_: str) -> None:
        told = {"type": type_, "message": "It happened.", "data": {}}
        self._say(connection, EVENT, id=job_id, same=job_id, **told)

    def _say(self, connection: Connection, statement: str, **values: Any) -> Any:
        said = text(statement.format(**NAMES[connection.dialect.name]))
        if ":held" in statement:
            said = said.bindparams(bindparam("held", expanding=True))
            values["held"] = ["running", "cancelling", "pausing"]
        plain = {
            name: json.dumps(value) if isinstance(value, dict) else value
            for name, value in values.items()
        }
        return connection.execute(said, plain)
