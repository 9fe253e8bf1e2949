"""Which workers there are: each has a row that it renews, and removes when it stops."""

import os
import platform
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app import __version__
from app.db import now
from app.jobs.states import HELD
from app.tables import JobRow, WorkerRow
from worker.queue import Fit, is_ready
from worker.slot import Slot


class Registry:
    """One worker's row."""

    def __init__(self, engine: Engine, name: str, slots: Sequence[Slot]) -> None:
        self._engine = engine.execution_options(writes=True)
        self._name = name
        self._slots = slots
        self._has_begun = False
        self.is_draining = False

    def beat(self) -> None:
        """Say that it is alive. Makes the row, or takes over that of a killed predecessor."""
        values: dict[str, Any] = {
            "host": platform.node(),
            "pid": os.getpid(),
            "version": __version__,
            "slots": [{"name": slot.name, "device": slot.device} for slot in self._slots],
            "state": "draining" if self.is_draining else "active",
            "heartbeat_at": now(),
        }
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        row = insert(WorkerRow).values(name=self._name, started_at=now(), **values)
        changes = values if self._has_begun else values | {"started_at": now()}
        row = row.on_conflict_do_update(index_elements=[WorkerRow.name], set_=changes)
        with Session(self._engine) as session, session.begin():
            session.execute(row)
        self._has_begun = True

    def leave(self) -> None:
        with Session(self._engine) as session, session.begin():
            session.execute(delete(WorkerRow).where(WorkerRow.name == self._name))

    def forget_lost(self, silent_seconds: float) -> None:
        """Remove workers that have been silent for so long that they will not come back."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(WorkerRow).where(WorkerRow.heartbeat_at < now(-silent_seconds)))

    def idle_slots(self, size: int) -> int:
        """How many of this worker's slots of a size hold no job."""
        names = self._names(size)
        with Session(self._engine) as session:
            held = session.scalar(
                select(func.count())
                .select_from(JobRow)
                .where(JobRow.worker.in_(names), JobRow.status.in_(HELD))
            )
        return len(names) - (held or 0)

    def newest_start(self, size: int) -> datetime | None:
        """When a job has last begun in one of this worker's slots of a size."""
        newest = select(func.max(JobRow.started_at)).where(JobRow.worker.in_(self._names(size)))
        with Session(self._engine) as session:
            return session.scalar(newest)

    def _names(self, size: int) -> list[str]:
        return [slot.name for slot in self._slots if slot.size == size]

    def waiting_jobs(self, size: int, limit: int, *, for_seconds: float) -> int:
        """How many jobs, up to a limit, a slot could have taken for so long and did not."""
        late = (
            select(JobRow.id)
            .where(
                *is_ready(fit=Fit(size)),
                func.coalesce(JobRow.available_at, JobRow.updated_at) < now(-for_seconds),
            )
            .limit(limit)
        )
        with Session(self._engine) as session:
            return len(session.scalars(late).all())
