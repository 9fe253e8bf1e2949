"""Who may have more: asked in the transaction that takes it.

Where a limit is set the project's row is locked first, so that of many requests at once none sees
room that another is taking. Without a limit nothing is asked and nothing is locked.
"""

from fastapi import Request
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import QuotaExceeded, TooLarge
from app.quotas import usage
from app.quotas.limits import Limits, limits_of
from app.quotas.repository import add_project
from app.sessions import transaction
from app.settings import Settings
from app.tables import ProjectRow

LIMITS = "limits"
"""Where a request's session carries what is known of its project's limits."""

QUEUE_RETRY_SECONDS = 30
HOUR = 3600


class Quotas:
    def __init__(self, session: AsyncSession, settings: Settings) -> None:
        self._session = session
        self._settings = settings

    async def admit_job(self) -> None:
        """Raises ``QuotaExceeded`` where the project may queue no more jobs now."""
        known = await self._known()
        if known.max_queued is None and known.gpu_minutes is None:
            return
        limits = await self._locked()
        if limits.max_queued is not None:
            self._check_queue(await usage.queued(self._session), limits.max_queued)
        if limits.gpu_minutes is not None:
            self._check_minutes(await usage.gpu_minutes(self._session), limits.gpu_minutes)

    async def admit_bytes(self, size: int, sha256: str) -> None:
        """Raises ``QuotaExceeded`` or ``TooLarge`` where the project may not store so much more."""
        if (await self._known()).max_stored_bytes is None:
            return
        allowed = (await self._locked()).max_stored_bytes
        if allowed is not None and not await usage.is_stored(self._session, sha256):
            check_bytes(size, await usage.stored_bytes(self._session), allowed)

    async def _known(self) -> Limits:
        found = self._session.sync_session.info.get(LIMITS)
        return found if isinstance(found, Limits) else await self._read()

    async def _read(self) -> Limits:
        return limits_of(await self._session.scalar(select(ProjectRow)), self._settings)

    async def _locked(self) -> Limits:
        """Holds the project's row until the transaction ends."""
        await self._session.execute(add_project(self._session.get_bind().dialect.name))
        locked = select(ProjectRow).with_for_update()
        return limits_of(await self._session.scalar(locked), self._settings)

    @staticmethod
    def _check_queue(used: int, allowed: int) -> None:
        if used >= allowed:
            raise QuotaExceeded(
                f"The project has {used} queued jobs, and may have {allowed} (max_queued).",
                "Send it again when some of them have started, or cancel one. GET /quota shows "
                "what is used.",
                retry_after=QUEUE_RETRY_SECONDS,
            )

    @staticmethod
    def _check_minutes(used: float, allowed: float) -> None:
        if used >= allowed:
            raise QuotaExceeded(
                f"The project has used {used:.1f} GPU-minutes in the last {usage.WINDOW_DAYS} "
                f"days, and may use {allowed:g} (gpu_minutes).",
                "What was used longer ago is free again. Whoever runs the service can allow "
                "more: flatlora projects set.",
                retry_after=HOUR,
            )


async def check_room(request: Request, size: int) -> None:
    """Refuse an upload before it is sent, where it is certain that it would be refused after it.

    One that is as long as a dataset that is there may be the same bytes again.
    """
    allowed: int | None = request.state.limits.max_stored_bytes
    if allowed is None:
        return
    async with transaction(request) as session:
        if not await usage.has_size(session, size):
            check_bytes(size, await usage.stored_bytes(session), allowed)


def check_bytes(size: int, used: int, allowed: int) -> None:
    """Raises ``TooLarge`` for what would not fit an empty project, else ``QuotaExceeded``."""
    if size > allowed:
        raise TooLarge(
            f"The project may store {allowed} bytes of datasets (max_stored_bytes); this upload "
            f"has {size}.",
            "Compress it (.gz, .zst), or ask whoever runs the service for more.",
        )
    if used + size > allowed:
        raise QuotaExceeded(
            f"The project stores {used} bytes of datasets, and may store {allowed} "
            f"(max_stored_bytes); this upload has {size}.",
            "Delete datasets that are not needed, or ask whoever runs the service for more.",
            retry_after=HOUR,
        )
