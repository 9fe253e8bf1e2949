"""The workers of a cluster, as they last spoke."""

from fastapi import APIRouter, Request
from sqlalchemy import select

from app.db import now
from app.errors import Unauthenticated
from app.jobs.states import HELD
from app.problems import problems
from app.sessions import ReadSession
from app.tables import JobRow, WorkerRow
from app.workers.schemas import Slot, Worker, WorkerList

router = APIRouter(prefix="/workers", tags=["workers"])


@router.get("", summary="List workers", responses=problems(Unauthenticated))
async def list_workers(request: Request, session: ReadSession) -> WorkerList:
    """Workers that run, drain, or have been lost within a day. None in embedded mode."""
    since = now(-request.state.settings.lease_seconds)
    is_lost = (WorkerRow.heartbeat_at < since).label("is_lost")
    rows = await session.execute(select(WorkerRow, is_lost).order_by(WorkerRow.name))
    found = rows.all()
    names = [slot["name"] for worker, _ in found for slot in worker.slots]
    jobs = await session.execute(
        select(JobRow.worker, JobRow.id).where(JobRow.status.in_(HELD), JobRow.worker.in_(names))
    )
    running = {job.worker: job.id for job in jobs}
    return WorkerList(items=[_present(worker, lost, running) for worker, lost in found])


def _present(worker: WorkerRow, is_lost: bool, running: dict[str | None, str]) -> Worker:
    slots = [Slot(**slot, job_id=running.get(slot["name"])) for slot in worker.slots]
    return Worker(
        name=worker.name,
        host=worker.host,
        pid=worker.pid,
        version=worker.version,
        state="lost" if is_lost else worker.state,
        slots=slots,
        started_at=worker.started_at,
        heartbeat_at=worker.heartbeat_at,
    )
