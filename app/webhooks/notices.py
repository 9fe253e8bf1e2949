"""From events to deliveries: each event of a job that has a webhook gets one, and only one.

``jobs.webhook_seq`` is how far that has come. It moves in the transaction that adds the deliveries,
under the lock on the job's row that every writer of events takes too; the key of a delivery is the
event's own. So nothing is lost or doubled, whoever dies when.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import structlog
from sqlalchemy import Engine, ScalarSelect, Select, func, or_, select
from sqlalchemy.orm import Session, defer

from app.db import OUTAGES, now
from app.failpoints import Point, failpoint
from app.ids import new_id
from app.jobs.service import summary
from app.jobs.states import Status
from app.tables import EventRow, JobRow, WebhookDeliveryRow
from app.webhooks.backoff import GIVE_UP_SECONDS

log = structlog.get_logger()

TOLD = (
    "job.running", "job.checkpoint", "job.paused", "job.succeeded", "job.failed", "job.cancelled",
)  # fmt: skip
JOBS_AT_ONCE = 200
EVENTS_AT_ONCE = 500
THOROUGH_EVERY = 60  # turns


class Notices:
    """Looks for events and makes their deliveries. Any number may run."""

    def __init__(self, engine: Engine) -> None:
        self._reading = engine
        self._writing = engine.execution_options(writes=True)
        self._turn = 0
        self._unreadable: set[str] = set()

    def make(self) -> int:
        """How many jobs had something to tell."""
        is_thorough = self._turn % THOROUGH_EVERY == 0
        self._turn += 1
        with Session(self._reading) as session:
            found = session.scalars(jobs_with_news(is_thorough=is_thorough)).all()
        told = [job_id for job_id in found if job_id not in self._unreadable]
        for job_id in told:
            self._make_for(job_id)
        return len(told)

    def _make_for(self, job_id: str) -> None:
        """In a transaction of its own: a row that cannot be read keeps no other from being told."""
        try:
            with Session(self._writing) as session, session.begin():
                _tell(session, job_id)
                failpoint(Point.WEBHOOK_BEFORE_NOTICED)
        except OUTAGES:
            raise
        except Exception:
            self._unreadable.add(job_id)
            log.exception("a job's events cannot be told to its webhook", job_id=job_id)


def jobs_with_news(*, is_thorough: bool = True) -> Select[str]:
    """Jobs with a webhook and an event that has not been looked at.

    Of jobs that have never begun only the thorough look asks: there may be thousands, and all that
    they can have to tell is a pause that is over.
    """
    statement = (
        select(JobRow.id)
        .where(JobRow.webhook_seq.is_not(None), JobRow.webhook_seq < _newest(JobRow.id))
        .limit(JOBS_AT_ONCE)
    )
    if not is_thorough:
        statement = statement.where(or_(JobRow.status != Status.QUEUED, JobRow.fence > 0))
    return statement


def _newest(job_id: Any) -> ScalarSelect[int]:
    return select(func.max(EventRow.seq)).where(EventRow.job_id == job_id).scalar_subquery()


def _tell(session: Session, job_id: str) -> None:
    job = session.scalar(
        select(JobRow)
        .options(defer(JobRow.report, raiseload=True))
        .where(JobRow.id == job_id, JobRow.webhook_seq.is_not(None))
        .with_for_update(skip_locked=True)
    )
    if job is None:  # somebody writes to it, or looks at it too: it is there at the next turn
        return
    newest = session.scalar(select(_newest(job_id))) or 0
    events = session.scalars(
        select(EventRow)
        .where(EventRow.job_id == job_id, EventRow.seq > job.webhook_seq, EventRow.type.in_(TOLD))
        .order_by(EventRow.seq)
        .limit(EVENTS_AT_ONCE)
    ).all()
    session.add_all(_deliveries(job, events))
    if len(events) == EVENTS_AT_ONCE and events[-1].seq < newest:
        job.webhook_seq = events[-1].seq
    elif Status(job.status).is_terminal:
        job.webhook_seq = None
    else:
        job.webhook_seq = newest


def _deliveries(job: JobRow, events: Sequence[EventRow]) -> Iterator[WebhookDeliveryRow]:
    shown = summary(job).model_dump(mode="json")
    url = job.spec["webhook_url"]
    for event in events:
        told = {"seq": event.seq, "message": event.message, "data": event.data}
        yield WebhookDeliveryRow(
            job_id=job.id,
            seq=event.seq,
            project=job.project,
            id=new_id("msg"),
            type=event.type,
            url=url,
            host=urlsplit(url).netloc.lower(),
            body=payload(event.type, event.at, shown, event=told),
            state="pending",
            attempts=[],
            due_at=now(),
            give_up_at=now(GIVE_UP_SECONDS),
            created_at=now(),
        )


def payload(type_: str, at: datetime, data: dict[str, Any], **more: Any) -> str:
    """What is signed and sent. Made once: every attempt sends the same bytes."""
    moment = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": type_, "timestamp": moment, "data": data, **more})
