"""From what a request carries to who sent it."""

import asyncio
import secrets
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.access.keys import digest, key_id
from app.access.principal import ANYBODY, OPERATOR, Principal, Role
from app.access.rates import Guesses
from app.db import Database, now
from app.errors import DatabaseUnavailable, Forbidden, Unauthenticated
from app.tables import ApiKeyRow

if TYPE_CHECKING:
    from app.access.oidc import Tokens  # loaded where there is an identity provider

Value = TypeVar("Value")

REVOKED_WITHIN_SECONDS = 5
STILL_SECONDS = 2  # that a stream believes an answer, which it asks for again and again
LAST_USED_SECONDS = 60
MOST_KNOWN = 10_000
LONG = 32  # letters of an operator's key that nobody guesses


@dataclass
class Known:
    principal: Principal
    since: float
    """By the clock of this process. After a while the database is asked again."""

    def is_young(self, seconds: float) -> bool:
        return time.monotonic() - self.since < seconds and not self.principal.is_expired


class Authenticator:
    """Knows the operator's key, the keys in the database, and the identity provider's tokens.

    A key that was found is believed for ``REVOKED_WITHIN_SECONDS``, so that a busy client costs the
    database little. What was not found is never remembered, but for how often it came from one
    address: one that guesses has nothing looked up for it any more, while keys that were found
    before still open.
    """

    def __init__(
        self,
        database: Database,
        operator_key: str | None,
        tokens: "Tokens | None" = None,
        failed_keys_per_minute: int = 0,
    ) -> None:
        """``operator_key``: None where nobody is asked for a key."""
        self._database = database
        self._operator_key = operator_key
        self._tokens = tokens
        self._guesses = Guesses(failed_keys_per_minute)
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._valid_ids: OrderedDict[str, float] = OrderedDict()
        self._notes: set[asyncio.Task[None]] = set()

    async def principal(
        self, given: str | None, *, address: str = "", project: str | None = None
    ) -> Principal:
        """Whose key or token this is.

        Args:
            given: What came with the request.
            address: Of the client.
            project: That the request names; a token may open several.

        Raises:
            Unauthenticated: If it is nobody's, or no longer.
            RateLimited: If too many wrong ones came from the address.
            IssuerUnavailable: If whose it is cannot be told now.
            Forbidden: If it opens another project than the one that is named, or none.
        """
        if self._operator_key is None:
            return _in(project, ANYBODY)
        if given is None:
            raise Unauthenticated(
                "This service asks for a key.",
                "Send it as `Authorization: Bearer <key>`. On a laptop it was printed at the first "
                "start and lies in the file api_key of the data folder; elsewhere ask whoever "
                "runs the service for one (flatlora keys create).",
            )
        sha256 = digest(f"{given} {project}" if self._is_token(given) and project else given)
        known = self._known.get(sha256)
        if known and known.is_young(REVOKED_WITHIN_SECONDS):
            return _in(project, known.principal)
        if known is None:
            self._guesses.check(address)
        try:
            principal = await self._find(given, sha256, project)
        except Unauthenticated:
            self._known.pop(sha256, None)
            self._guesses.count(address)
            raise
        # Who has a short key of the operator's could try all of them where known ones pass.
        if not principal.is_operator or len(given) >= LONG:
            _remember(self._known, sha256, Known(principal, time.monotonic()))
        return _in(project, principal)

    async def is_still(self, principal: Principal) -> bool:
        """Whether someone who was here a moment ago may still be."""
        if principal.is_expired:
            return False
        if principal.key_id is None:
            return True
        asked_at = self._valid_ids.get(principal.key_id, float("-inf"))
        if time.monotonic() - asked_at < STILL_SECONDS:
            return True
        try:
            async with asyncio.timeout(STILL_SECONDS), self._database.unscoped() as session:
                is_valid = await _valid_key(session, principal.key_id) is not None
        except (DatabaseUnavailable, TimeoutError):
            return True  # nobody can revoke it meanwhile either; the next turn asks again
        if is_valid:
            _remember(self._valid_ids, principal.key_id, time.monotonic())
        return is_valid

    async def close(self) -> None:
        await asyncio.gather(*self._notes, return_exceptions=True)
        if self._tokens:
            await self._tokens.close()

    def _is_token(self, given: str) -> bool:
        return self._tokens is not None and given.count(".") == 2

    async def _find(self, given: str, sha256: str, project: str | None) -> Principal:
        assert self._operator_key is not None
        if secrets.compare_digest(given.encode(), self._operator_key.encode()):
            return OPERATOR
        if self._tokens and self._is_token(given):
            return await self._tokens.principal(given, project)
        return await self._look_up(given, sha256)

    async def _look_up(self, given: str, sha256: str) -> Principal:
        found = key_id(given)
        valid = None
        if found:
            async with self._database.unscoped() as session:
                valid = await _valid_key(session, found)
        if valid is None or not secrets.compare_digest(valid[0].sha256, sha256):
            raise Unauthenticated(
                "This is not a key of this service, or no longer.",
                "It may have been revoked, or have expired: `flatlora keys list` shows them. On a "
                "laptop the key lies in the file api_key of the service's data folder.",
            )
        row, seconds_left = valid
        self._note_use(row.id)
        return Principal(
            row.project,
            Role(row.role),
            f"{row.name} ({row.id})",
            key_id=row.id,
            expires_at=None if seconds_left is None else time.time() + seconds_left,
        )

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


async def _valid_key(session: AsyncSession, found: str) -> tuple[ApiKeyRow, float | None] | None:
    """The key, and for how many seconds it is one, by the database's clock."""
    statement = select(ApiKeyRow, now()).where(
        ApiKeyRow.id == found,
        ApiKeyRow.revoked_at.is_(None),
        or_(ApiKeyRow.expires_at.is_(None), ApiKeyRow.expires_at > now()),
    )
    valid = (await session.execute(statement)).one_or_none()
    if valid is None:
        return None
    row, clock = valid
    return row, (row.expires_at - clock).total_seconds() if row.expires_at else None


def _in(project: str | None, principal: Principal) -> Principal:
    """Raises ``Forbidden``."""
    if project in {None, principal.project}:
        return principal
    raise Forbidden(
        f"This key opens the project {principal.project!r}, and the request names {project!r}.",
        "Leave the header Flatlora-Project out: only a token that opens several needs it.",
    )


def _remember(known: "OrderedDict[str, Value]", name: str, value: "Value") -> None:
    """In place of what has been known for longest, if there is too much."""
    known[name] = value
    known.move_to_end(name)
    while len(known) > MOST_KNOWN:
        known.popitem(last=False)
