"""Adding to a job's event list."""

from typing import Any

from sqlalchemy import Insert, func, insert, select

from app.db import now
from app.tables import EventRow


def event(job_id: str, type_: str, message: str, **data: Any) -> Insert:
    """The statement that adds an event.

    Run it in a transaction that has inserted or updated the job's row: the lock on that row is
    what keeps two writers from taking the same number.
    """
    newest = select(func.coalesce(func.max(EventRow.seq), 0)).where(EventRow.job_id == job_id)
    return insert(EventRow).values(
        job_id=job_id,
        seq=newest.scalar_subquery() + 1,
        at=now(),
        type=type_,
        message=message,
        data=data,
    )


# Built once and run without the ORM: a submission waits for it.
FIRST_EVENT = insert(EventRow).values(seq=1, at=now())
