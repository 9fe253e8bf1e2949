"""The rows of a new job: itself, its first event, its wake-up, its line in the audit log.

Postgres gets them in one statement, as a submission waits for each trip to it. SQLite is no trip
away, and has no INSERT within WITH: it gets the same inserts one after another.
"""

from typing import Any

from sqlalchemy import Insert, Label, bindparam, insert, literal, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.lines import ASKED, AUDIT_LINE
from app.db import now
from app.jobs.events import FIRST_EVENT
from app.jobs.places import counted, place
from app.jobs.states import Status
from app.outbox import WAKE_NOW
from app.scope import PROJECT
from app.tables import JobRow

NEW = {"attempt": 0, "fence": 0, "runtime": 0.0, "recoveries": 0, "step": 0}
ACCEPTED = "The job was accepted."


def _ahead() -> Label[int]:
    """Queued jobs of the project with this priority or a lower one, counted to the limit.

    A statement of Postgres does not see what it inserts, so the job itself is not among them.
    """
    waiting = select(literal(1)).where(
        JobRow.status == Status.QUEUED,
        JobRow.project == bindparam("of_project"),
        JobRow.priority <= bindparam("of_priority"),
    )
    return counted(waiting).label("ahead")


# Built once and run without the ORM: to build a statement takes longer than to run it. SQLAlchemy
# gives a parameter to every column of its name in the whole statement, so what the other rows
# repeat of the job has a name of its own, and their own ids are left to the database in so many
# words.
ADD = (
    insert(JobRow)
    .values(created_at=now(), updated_at=now(), **NEW)
    .returning(JobRow.created_at, JobRow.updated_at)
)
_EVENT = FIRST_EVENT.values(
    job_id=bindparam("of_job"),
    type=bindparam("event_type"),
    message=bindparam("event_message"),
    data=bindparam("event_data"),
)
_WAKE = WAKE_NOW.values(id=literal_column("DEFAULT"), job_id=bindparam("of_job"))
_AUDIT = AUDIT_LINE.values(
    id=literal_column("DEFAULT"),
    project=bindparam("of_project"),
    object=bindparam("of_job"),
    **{name: bindparam(f"audit_{name}") for name in ("actor", "action", "request_id")},
)
_WITH_EVENT = ADD.returning(_ahead()).add_cte(_EVENT.cte("first_event"))
_WITH_WAKE = _WITH_EVENT.add_cte(_WAKE.cte("wake_up"))
AT_ONCE = {
    (wakes, audited): statement.add_cte(_AUDIT.cte("audit_line")) if audited else statement
    for wakes, statement in ((False, _WITH_EVENT), (True, _WITH_WAKE))
    for audited in (False, True)
}


async def add_job(
    session: AsyncSession, values: dict[str, Any], *, waits: float | None, wakes: bool
) -> tuple[JobRow, int | None]:
    """Insert a queued job into the session's project; a request's leaves its audit line, too.

    Args:
        session: Of a request.
        values: Of the job's columns.
        waits: For so many seconds at most, in the queue.
        wakes: Whether workers are to hear of it.

    Returns:
        The job as it is read again, and how many jobs are ahead of it.
    """
    values = {**values, "project": session.sync_session.info[PROJECT]}
    again = {"retried_from": earlier} if (earlier := values.get("retried_from")) else {}
    event = {"type": "job.queued", "message": ACCEPTED, "data": again}
    connection = await session.connection()
    at_once = connection.dialect.name == "postgresql"
    asked: dict[str, str] = session.sync_session.info.pop(ASKED, {})
    statement: Insert = AT_ONCE[wakes, bool(asked)] if at_once else ADD
    if waits:
        statement = statement.values(queue_deadline=now(waits))
    if at_once:
        others = {
            "of_job": values["id"],
            "of_project": values["project"],
            "of_priority": values["priority"],
            **{f"event_{name}": value for name, value in event.items()},
            **{f"audit_{name}": value for name, value in asked.items()},
        }
        made = (await connection.execute(statement, values | others)).one()
        ahead: int | None = made.ahead
    else:
        made = (await connection.execute(statement, values)).one()
        await connection.execute(FIRST_EVENT, {"job_id": values["id"], **event})
        if wakes:
            await connection.execute(WAKE_NOW, {"job_id": values["id"]})
        if asked:
            line = {"project": values["project"], "object": values["id"], **asked}
            await connection.execute(AUDIT_LINE, line)
        ahead = await place(session, values["id"])
    row = JobRow(**NEW, **values, created_at=made.created_at, updated_at=made.updated_at)
    return row, ahead
