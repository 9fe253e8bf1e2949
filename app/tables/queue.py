"""Between the queue and the workers."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.tables.base import Table


class OutboxRow(Table):
    """A wake-up for the workers, written with the job's move into the queue and sent after it."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    due_at: Mapped[datetime] = mapped_column(index=True)
    created_at: Mapped[datetime]


class WorkerRow(Table):
    """A machine's worker, as it last spoke."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    version: Mapped[str]
    slots: Mapped[list[dict[str, Any]]]
    """``{name, device}`` of each, a device being ``0`` or, of two together, ``0+1``; the name is
    what a job's row has as its worker."""
    state: Mapped[str]
    """``active`` or ``draining``; it removes its row when it stops."""
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
