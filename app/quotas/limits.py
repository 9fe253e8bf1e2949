"""What a project may use: its own limits, and the settings' where it has none."""

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import select

from app.db import Database
from app.errors import DatabaseUnavailable
from app.settings import Settings
from app.tables import NO_LIMIT, ProjectRow

Number = TypeVar("Number", int, float)

KNOWN_SECONDS = 5
MOST_KNOWN = 10_000


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    max_queued: int | None = None
    max_running: int | None = None
    gpu_minutes: float | None = None
    max_stored_bytes: int | None = None
    requests_per_minute: int | None = None


def limits_of(row: ProjectRow | None, settings: Settings) -> Limits:
    own = row or ProjectRow()
    return Limits(
        max_queued=_either(own.max_queued, settings.max_queued_jobs),
        max_running=_either(own.max_running, settings.max_running_jobs),
        gpu_minutes=_either(own.gpu_minutes, settings.gpu_minutes),
        max_stored_bytes=_either(own.max_stored_bytes, settings.max_stored_bytes),
        requests_per_minute=_either(
            own.requests_per_minute, settings.requests_per_minute or NO_LIMIT
        ),
    )


def _either(own: Number | None, default: Number | None) -> Number | None:
    value = default if own is None else own
    return None if value == NO_LIMIT else value


class KnownLimits:
    """The limits of projects as they were within the last five seconds.

    They are asked for at every request. What must be exact is read again under a lock.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._known: OrderedDict[str, tuple[Limits, float]] = OrderedDict()

    async def of(self, project: str) -> Limits:
        known = self._known.get(project)
        if known and time.monotonic() < known[1]:
            return known[0]
        try:
            limits = await self._read(project)
        except DatabaseUnavailable:
            if known is None:
                raise
            return known[0]
        self._known[project] = limits, time.monotonic() + KNOWN_SECONDS
        self._known.move_to_end(project)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return limits

    async def _read(self, project: str) -> Limits:
        async with self._database.scoped(project) as session:
            return limits_of(await session.scalar(select(ProjectRow)), self._settings)
