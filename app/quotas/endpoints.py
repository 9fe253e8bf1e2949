"""What the project uses, and what it may use."""

from fastapi import APIRouter, Request
from sqlalchemy import select

from app.access.dependencies import Asking
from app.errors import Unauthenticated
from app.problems import problems
from app.quotas import usage
from app.quotas.limits import limits_of
from app.quotas.schemas import Quota, QuotaCount, QuotaMinutes
from app.sessions import ReadSession
from app.tables import ProjectRow

router = APIRouter(prefix="/quota", tags=["quota"])


@router.get("", responses=problems(Unauthenticated), summary="What is used, and what is allowed")
async def get_quota(asking: Asking, session: ReadSession, request: Request) -> Quota:
    """Of the project that the key opens. `flatlora projects set` changes what is allowed."""
    row = await session.scalar(select(ProjectRow))
    limits = limits_of(row, request.state.settings)
    return Quota(
        project=asking.project,
        queued=QuotaCount(used=await usage.queued(session), allowed=limits.max_queued),
        running=QuotaCount(used=await usage.running(session), allowed=limits.max_running),
        gpu_minutes=QuotaMinutes(
            used=round(await usage.gpu_minutes(session), 2),
            allowed=limits.gpu_minutes,
            window_days=usage.WINDOW_DAYS,
        ),
        stored_bytes=QuotaCount(
            used=await usage.stored_bytes(session), allowed=limits.max_stored_bytes
        ),
        requests_per_minute=limits.requests_per_minute,
    )
