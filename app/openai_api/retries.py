"""OpenAI's clients send a request again without saying so by a key of its own (decision 0015)."""

import hashlib
import json

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import now
from app.jobs.answers import Job
from app.jobs.repository import JobRepository
from app.jobs.schemas import JobCreate
from app.jobs.service import JobService
from app.tables import IdempotencyRow

RETRIED_WITHIN_SECONDS = 15 * 60  # the clients wait ten minutes for an answer, and then ask again
MARK = "openai"  # and a space after it, which no Idempotency-Key has


class Creation:
    """Submits a job once, however often the client's own retries ask for it.

    Every request leaves a note of the job that it was answered with: who asked, for what, and the
    number of the try. A client counts its tries, so a job has one note at most for each number.
    """

    def __init__(self, session: AsyncSession, jobs: JobService, *, actor: str) -> None:
        self._session = session
        self._jobs = jobs
        self._notes = JobRepository(session)
        self._actor = actor

    async def submit(self, spec: JobCreate, *, retry: int, request_id: str) -> tuple[Job, bool]:
        """The job, and whether it was there already. ``retry``: 0 is the first try."""
        said = json.dumps([self._actor, spec.resolved().stored()], sort_keys=True)
        sha256 = hashlib.sha256(said.encode()).hexdigest()
        await self._one_after_the_other(sha256)
        if retry and (job_id := await self._unanswered(sha256, retry)):
            await self._note(sha256, job_id, retry)
            return await self._jobs.get(job_id), True
        job, _ = await self._jobs.submit(spec, None, request_id=request_id)
        await self._note(sha256, job.id, retry)
        return job, False

    async def _one_after_the_other(self, sha256: str) -> None:
        """A retry waits for a first try that is still at work; SQLite has one writer anyway."""
        if self._session.get_bind().dialect.name == "postgresql":
            lock = int(sha256[:15], 16)
            await self._session.execute(select(func.pg_advisory_xact_lock(lock)))

    async def _unanswered(self, sha256: str, retry: int) -> str | None:
        """The job that this may be a retry for: best of the try just before, and the newest."""
        notes = await self._session.scalars(
            select(IdempotencyRow).where(
                IdempotencyRow.body_sha256 == sha256,
                IdempotencyRow.key.startswith(f"{MARK} "),
                IdempotencyRow.created_at > now(-RETRIED_WITHIN_SECONDS),
            )
        )
        last: dict[str, int] = {}
        for note in notes:
            last[note.job_id] = max(last.get(note.job_id, 0), int(note.key.rpartition(" ")[2]))
        waiting = [(tried, job_id) for job_id, tried in last.items() if tried < retry]
        return max(waiting)[1] if waiting else None  # ids sort by time

    async def _note(self, sha256: str, job_id: str, retry: int) -> None:
        await self._notes.remember(f"{MARK} {job_id} {retry}", sha256, job_id)
