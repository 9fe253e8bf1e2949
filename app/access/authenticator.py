"""From what a request carries to who sent it."""

import asyncio
import secrets
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.access.keys import digest, key_id
from app.access.principal import ANYBODY, OPERATOR, Principal, Role
from app.db import Database, now
from app.errors import DatabaseUnavailable, Unauthenticated
from app.tables import ApiKeyRow

REVOKED_WITHIN_SECONDS = 5
LAST_USED_SECONDS = 60
MOST_KNOWN = 10_000


@dataclass(frozen=True)
class Known:
    principal: Principal
    until: float
    """By the clock of this process; then the database is asked again."""


class Authenticator:
    """Knows the operator's key, and the keys in the database.

    A key that was found is believed for ``REVOKED_WITHIN_SECONDS``, so that a busy client costs the
    database little; what was not found is never remembered.
    """

    def __init__(self, database: Database, operator_key: str | None) -> None:
        """``operator_key``: None where nobody is asked for a key."""
        self._database = database
        self._operator_key = operator_key
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._notes: set[asyncio.Task[None]] = set()

    async def principal(self, given: str | None) -> Principal:
        """Whose key this is.

        Raises:
            Unauthenticated: If it is nobody's, or no longer.
        """
        if self._operator_key is None:
            return ANYBODY
        if given is None:
            raise Unauthenticated(
                "This service asks for a key.",
                "Send it as `Authorization: Bearer <key>`. On a laptop it was printed at the first "
                "start and lies in the file api_key of the data folder; elsewhere ask whoever "
                "runs the service for one (flatlora keys create).",
            )
        if secrets.compare_digest(given.encode(), self._operator_key.encode()):
            return OPERATOR
        return await self._of_a_project(given)

    async def close(self) -> None:
        await asyncio.gather(*self._notes, return_exceptions=True)

    async def _of_a_project(self, given: str) -> Principal:
        sha256 = digest(given)
        known = self._known.get(sha256)
        if known and time.monotonic() < known.until:
            return known.principal
        self._known.pop(sha256, None)
        principal = await self._look_up(given, sha256)
        self._known[sha256] = Known(principal, time.monotonic() + REVOKED_WITHIN_SECONDS)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return principal

    async def _look_up(self, given: str, sha256: str) -> Principal:
        found = key_id(given)
        row = None
        if found:
            async with self._database.unscoped() as session:
                row = await _valid_key(session, found)
        if row is None or not secrets.compare_digest(row.sha256, sha256):
            raise Unauthenticated(
                "This is not a key of this service, or no longer.",
                "It may have been revoked, or have expired: `flatlora keys list` shows them. On a "
                "laptop the key lies in the file api_key of the service's data folder.",
            )
        self._note_use(row.id)
        return Principal(row.project, Role(row.role), f"{row.name} ({row.id})", key_id=row.id)

    def _note_use(self, found: str) -> None:
        note = asyncio.create_task(self._write_use(found))
        self._notes.add(note)
        note.add_done_callback(self._notes.discard)

    async def _write_use(self, found: str) -> None:
        is_older = or_(
            ApiKeyRow.last_used_at.is_(None), ApiKeyRow.last_used_at < now(-LAST_USED_SECONDS)
        )
        with suppress(DatabaseUnavailable):  # only a note
            async with self._database.unscoped() as session:
                key = select(ApiKeyRow.id).where(ApiKeyRow.id == found, is_older)
                if await session.scalar(key) is None:
                    return
            async with self._database.unscoped(writes=True) as session:
                await session.execute(
                    update(ApiKeyRow).where(ApiKeyRow.id == found).values(last_used_at=now())
                )


async def _valid_key(session: AsyncSession, found: str) -> ApiKeyRow | None:
    key: ApiKeyRow | None = await session.scalar(
        select(ApiKeyRow).where(
            ApiKeyRow.id == found,
            ApiKeyRow.revoked_at.is_(None),
            or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > now()),
        )
    )
    return key
