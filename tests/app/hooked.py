"""The app with webhooks that may reach receivers on the loopback, and jobs that tell them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.db import now
from app.jobs.events import event
from app.settings import Settings
from app.tables import JobRow, WebhookDeliveryRow
from tests.app.conftest import make_settings, serve
from tests.app.receiver import Receiver
from tests.app.service import Json, Service
from tests.system.service import until

Row = WebhookDeliveryRow
ENDED = {"job.succeeded", "job.failed", "job.cancelled"}


def hook_settings(folder: Path, url: str, *receivers: Receiver, **values: Any) -> Settings:
    given = {
        "allowed_networks": ["127.0.0.1/32"],
        "allow_http": True,
        "allowed_ports": [receiver.port for receiver in receivers],
        "webhook_seconds": 0.05,
    }
    return make_settings(folder, url, **{**given, **values})


@dataclass
class Hooked:
    service: Service
    receiver: Receiver

    def submit(self, receiver: Receiver | None = None, **values: Any) -> str:
        url = (receiver or self.receiver).url()
        return str(self.service.submit(webhook_url=url, **values)["id"])

    def happen(self, job_id: str, *types: str, **data: Any) -> None:
        """As a worker writes it: in the transaction that changes the row."""
        with Session(self.service.engine) as session, session.begin():
            for type_ in types:
                status = type_.removeprefix("job.")
                values: Json = {"status": status} if type_ in {"job.running", *ENDED} else {}
                changed = update(JobRow).where(JobRow.id == job_id)
                session.execute(changed.values(updated_at=now(), fence=1, **values))
                session.execute(event(job_id, type_, f"It is {status}.", **data))

    def log(self, job_id: str) -> list[Json]:
        found: list[Json] = self.service.get(f"/jobs/{job_id}/deliveries")["items"]
        return found

    def attempted(self, job_id: str, times: int = 1) -> Json:
        """The job's first delivery, once it was tried so often."""

        def look() -> Json | None:
            log = self.log(job_id)
            return log[0] if log and len(log[0]["attempts"]) >= times else None

        found = until(look, seconds=20, every=0.02)
        assert found
        return found

    def settled(self, job_id: str, events: int = 1) -> list[Json]:
        """All of its deliveries, once none is pending."""

        def look() -> list[Json]:
            log = self.log(job_id)
            is_done = len(log) >= events and all(one["state"] != "pending" for one in log)
            return log if is_done else []

        return until(look, seconds=20, every=0.02)

    def change(self, *, only: str | None = None, **values: Any) -> None:
        """Deliveries as time would have changed them; ``due_at=now()``: do not wait."""
        statement = update(Row).where(Row.state == "pending").values(**values)
        if only:
            statement = statement.where(Row.job_id == only)
        with Session(self.service.engine) as session, session.begin():
            session.execute(statement)

    def count(self, **values: Any) -> int:
        statement = select(func.count()).select_from(Row).filter_by(**values)
        with Session(self.service.engine) as session:
            return session.scalar(statement) or 0

    @property
    def secret(self) -> str:
        return str(self.service.get("/webhooks/secret")["secret"])


@contextmanager
def hooked(settings: Settings, receiver: Receiver) -> Iterator[Hooked]:
    for service in serve(settings):
        yield Hooked(service, receiver)
