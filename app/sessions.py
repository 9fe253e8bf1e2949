"""The sessions of requests: each one transaction of one project; changes are written down."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.lines import ASKED, AUDIT_LINE
from app.db import Database
from app.failpoints import Point, failpoint
from app.scope import PROJECT


def transaction(
    request: Request, *, writes: bool = False
) -> AbstractAsyncContextManager[AsyncSession]:
    """A transaction of the request's project: for routes that need several, one after another."""
    database: Database = request.state.database
    state = request.state
    return database.scoped(
        state.principal.project, writes=writes, limits=getattr(state, "limits", None)
    )


async def _read_session(request: Request) -> AsyncIterator[AsyncSession]:
    async with transaction(request) as session:
        yield session


async def _write_session(request: Request) -> AsyncIterator[AsyncSession]:
    """One request is one transaction, and leaves one line in the audit log."""
    async with transaction(request, writes=True) as session:
        info = session.sync_session.info
        info[ASKED] = _asked(request)
        yield session
        if ASKED in info and (changed := _changed(request)):
            await write_down(request, session, changed)
        failpoint(Point.REQUEST_BEFORE_COMMIT)
    failpoint(Point.REQUEST_AFTER_COMMIT)


def note_change(request: Request, changed: str | None) -> None:
    """For the audit log: the id of what this request has made; None if it has changed nothing."""
    request.state.changed = changed


def _changed(request: Request) -> str | None:
    named = next(iter(request.path_params.values()), None)
    changed: str | None = getattr(request.state, "changed", named)
    return changed


async def write_down(request: Request, session: AsyncSession, changed: str) -> None:
    """Who did what, in the project that the session writes, in its transaction.

    Sessions given by ``WriteSession`` do it by themselves.
    """
    line = {"project": session.sync_session.info[PROJECT], "object": changed, **_asked(request)}
    connection = await session.connection()
    await connection.execute(AUDIT_LINE, line)


def _asked(request: Request) -> dict[str, str]:
    return {
        "actor": request.state.principal.actor,
        "action": request.scope["route"].name,
        "request_id": request.state.request_id,
    }


# scope="function": the commit comes before the response leaves, not after it.
ReadSession = Annotated[AsyncSession, Depends(_read_session, scope="function")]
WriteSession = Annotated[AsyncSession, Depends(_write_session, scope="function")]
