"""The rules of jobs: what may be submitted, and what may be asked of a job when."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.cursors import cursor_of, place_of
from app.datasets.repository import DatasetRepository
from app.datasets.uris import check_dataset_uri
from app.errors import (
    IdempotencyKeyReused,
    IllegalTransition,
    InvalidRequest,
    JobNotFound,
    QuotaExceeded,
)
from app.faults import Fault
from app.ids import is_id, new_id
from app.jobs.answers import (
    Adapter,
    Event,
    EventPage,
    Failure,
    Job,
    JobPage,
    JobSummary,
    Metric,
    MetricSeries,
)
from app.jobs.places import place, places, with_place
from app.jobs.repository import JobFilter, JobRepository
from app.jobs.schemas import JobCreate
from app.jobs.states import Reason, Status
from app.net.rules import Rules
from app.net.urls import check_url
from app.quotas.service import Quotas
from app.settings import Settings
from app.tables import JobRow
from app.tracing import inject
from app.uris import (
    UriError,
    check_hub_id,
    resolve_model_folder,
)

log = structlog.get_logger()


class JobService:
    def __init__(self, session: AsyncSession, settings: Settings) -> None:
        self._session = session
        self._jobs = JobRepository(session, wakes=settings.is_cluster)
        self._datasets = DatasetRepository(session)
        self._settings = settings

    async def submit(
        self, body: JobCreate, key: str | None, *, request_id: str | None = None
    ) -> tuple[Job, bool]:
        """Accept a job; with the key of an earlier request, return that one's job.

        Returns:
            The job, and whether the key was seen before.
        """
        spec = body.resolved()
        return await self._accept(spec, key, _digest(spec), request_id)

    async def _accept(
        self, spec: JobCreate, key: str | None, digest: str, request_id: str | None, **more: Any
    ) -> tuple[Job, bool]:
        faults = await asyncio.to_thread(self._check_paths, spec)  # before the database is locked
        if key and (earlier := await self._replay(key, digest)):
            return earlier, True
        faults += await self._check_uploads(spec)
        if faults:
            raise InvalidRequest(
                " ".join(fault.detail for fault in faults),
                "GET /models and GET /datasets list what is here.",
                faults=faults,
            )

        async def add() -> tuple[JobRow, int | None]:
            row, ahead = await self._jobs.add(**_new_row(spec), request_id=request_id, **more)
            await self._tell_if_too_large(row)
            return row, ahead

        return await self._once(key, digest, add)

    async def _once(
        self,
        key: str | None,
        digest: str,
        make: Callable[[], Awaitable[tuple[JobRow, int | None]]],
        *,
        is_new: bool = True,
    ) -> tuple[Job, bool]:
        try:
            if is_new:
                await Quotas(self._session, self._settings).admit_job()
            async with self._session.begin_nested() if key else nullcontext():
                row, ahead = await make()
                if key:
                    await self._jobs.remember(key, digest, row.id)
        except (IntegrityError, QuotaExceeded):
            # The same key in another request, committed a moment ago: its job is the answer.
            if key and (earlier := await self._replay(key, digest)):
                return earlier, True
            raise
        return Job(**_summary(row, ahead), report=row.report), False

    async def retry(
        self, job_id: str, key: str | None, *, request_id: str | None = None
    ) -> tuple[Job, bool]:
        """Accept a job again that is over; while that runs, it is the answer to all who ask.

        Returns:
            The new job, and whether it was there before.
        """
        digest = hashlib.sha256(f"retry {job_id}".encode()).hexdigest()
        row = await self._jobs.lock(job_id)
        if key and (earlier := await self._replay(key, digest)):
            return earlier, True
        if row is None:
            raise JobNotFound(job_id)
        if not Status(row.status).is_terminal:
            raise IllegalTransition(
                f"The job is {row.status} and cannot be retried.",
                "Only a job that is over can be done again.",
                status=row.status,
            )
        if running := await self._jobs.retry_of(job_id):

            async def found() -> tuple[JobRow, int | None]:
                return running, await place(self._session, running.id)

            job, _ = await self._once(key, digest, found, is_new=False)
            return job, True
        spec = JobCreate.model_validate(row.spec).resolved()
        return await self._accept(spec, key, digest, request_id, retried_from=job_id)

    async def delete(self, job_id: str) -> None:
        """Its rows; the caller sees to its files."""
        if is_id(job_id, "job") and await self._jobs.delete(job_id):
            log.info("job deleted", job_id=job_id)
            return
        row = await self.row(job_id)
        raise IllegalTransition(
            f"The job is {row.status} and cannot be deleted.",
            "Only a job that is over can be deleted: cancel it first.",
            status=row.status,
        )

    async def _tell_if_too_large(self, row: JobRow) -> None:
        """In the job's events: no error, as a worker with such a slot may come tomorrow."""
        if row.gpus == 1 or not self._settings.is_cluster:
            return
        largest = await self._jobs.largest_slot(alive_seconds=self._settings.lease_seconds)
        if largest < row.gpus:
            await self._jobs.tell(
                row.id,
                "job.waiting",
                f"The job needs {row.gpus} GPUs in one slot, and the largest slot of the workers "
                f"that are there has {largest}: it waits until one with more comes.",
                gpus=row.gpus,
                largest_slot=largest,
            )

    async def _replay(self, key: str, digest: str) -> Job | None:
        known = await self._jobs.remembered(key)
        if known is None:
            return None
        if known.body_sha256 != digest:
            raise IdempotencyKeyReused(
                f"The key {key!r} came before with another body.",
                "Use a new Idempotency-Key for a new job.",
            )
        return await self.get(known.job_id)

    async def get(self, job_id: str) -> Job:
        found = await with_place(self._session, job_id) if is_id(job_id, "job") else None
        if found is None:
            raise JobNotFound(job_id)
        row, position = found
        return Job(**_summary(row, position), report=row.report)

    async def row(self, job_id: str) -> JobRow:
        row = await self._jobs.get(job_id)
        if row is None:
            raise JobNotFound(job_id)
        return row

    async def cancel(self, job_id: str) -> Job:
        if is_id(job_id, "job"):
            await self._jobs.cancel(job_id)
        row = await self.row(job_id)
        if row.status not in {Status.CANCELLING, Status.CANCELLED}:
            raise IllegalTransition(
                f"The job is {row.status} and cannot be cancelled.",
                "Only a job that is not over can be cancelled.",
                status=row.status,
            )
        return await self._present(row)

    async def pause(self, job_id: str) -> Job:
        if is_id(job_id, "job"):
            await self._jobs.pause(job_id)
        row = await self.row(job_id)
        if row.status not in {Status.PAUSING, Status.PAUSED}:
            raise IllegalTransition(
                f"The job is {row.status} and cannot be paused.",
                "Only a job that waits or runs can be paused.",
                status=row.status,
            )
        return await self._present(row)

    async def resume(self, job_id: str) -> Job:
        if is_id(job_id, "job"):
            found = await self._jobs.lock(job_id)
            if found is not None and found.status == Status.PAUSED:
                await Quotas(self._session, self._settings).admit_job()
            await self._jobs.resume(job_id)
        row = await self.row(job_id)
        if row.status not in {Status.QUEUED, Status.RUNNING}:
            hint = "Only a paused job can be resumed."
            if row.status == Status.PAUSING:
                hint = "Its trainer has not stopped yet: wait until the job is paused."
            raise IllegalTransition(
                f"The job is {row.status} and cannot be resumed.", hint, status=row.status
            )
        return await self._present(row)

    async def events(self, job_id: str, *, after: int, limit: int) -> EventPage:
        await self.row(job_id)
        rows = await self._jobs.events(job_id, after=after, limit=limit)
        items = [Event.model_validate(row, from_attributes=True) for row in rows]
        return EventPage(items=items, next=items[-1].seq if items else after)

    async def metrics(
        self, job_id: str, *, since_step: int, series: str | None, limit: int
    ) -> MetricSeries:
        await self.row(job_id)
        rows = await self._jobs.metrics(
            job_id, since_step=since_step, series=series, limit=limit + 1
        )
        # A page ends between two steps, so that the next one can begin at a step.
        more_from = rows[-1].step if len(rows) > limit else None
        items = [row for row in rows if row.step != more_from]
        return MetricSeries(
            items=[Metric.model_validate(row, from_attributes=True) for row in items],
            next=more_from,
        )

    def _check_paths(self, spec: JobCreate) -> list[Fault]:
        """What the file system and the settings have against a job; all of it. No network."""
        faults = []
        try:
            self._check_base_model(spec)
        except UriError as error:
            faults.append(_fault("/base_model", error))
        if spec.base_model_revision and spec.base_model.startswith("file:"):
            faults.append(
                Fault(
                    pointer="/base_model_revision",
                    detail=f"{spec.base_model} is a folder, and a folder has no revisions; found "
                    f"{spec.base_model_revision!r}. Leave it out, or name a model of the hub.",
                    code="revision_not_allowed",
                )
            )
        for pointer, uri in _dataset_uris(spec):
            try:
                check_dataset_uri(uri, self._settings)
            except UriError as error:
                faults.append(_fault(pointer, error))
        if spec.webhook_url:
            try:
                check_url(spec.webhook_url, Rules.of(self._settings))
            except UriError as error:
                faults.append(_fault("/webhook_url", error))
        return faults

    def _check_base_model(self, spec: JobCreate) -> None:
        if spec.base_model.startswith("file:"):
            resolve_model_folder(spec.base_model, self._settings.model_roots)
        else:
            check_hub_id(spec.base_model, self._settings.hub_models)

    async def _check_uploads(self, spec: JobCreate) -> list[Fault]:
        faults = []
        for pointer, uri in _dataset_uris(spec):
            if uri.startswith("dataset:") and not await self._datasets.held(
                uri.removeprefix("dataset:")
            ):
                missing = UriError(
                    "dataset_not_found", f"There is no {uri}.", "Upload it with POST /datasets."
                )
                faults.append(_fault(pointer, missing))
        return faults

    async def _present(self, row: JobRow) -> Job:
        position = await place(self._session, row.id)
        return Job(**_summary(row, position), report=row.report)

    async def list(self, wanted: JobFilter, *, limit: int, after: str | None) -> JobPage:
        place = place_of(after, "job") if after else None
        rows = await self._jobs.page(wanted, limit=limit + 1, after=place)
        shown = rows[:limit]
        positions = await places(self._session, shown)
        return JobPage(
            items=[JobSummary(**_summary(row, positions.get(row.id))) for row in shown],
            next=cursor_of((shown[-1].created_at, shown[-1].id)) if len(rows) > limit else None,
        )


def _new_row(spec: JobCreate) -> dict[str, Any]:
    return {
        "id": new_id("job"),
        "name": spec.name,
        "labels": spec.labels,
        "base_model": spec.base_model,
        "dataset_uri": spec.dataset_uri,
        "spec": spec.stored(),
        "status": Status.QUEUED,
        "traceparent": inject(),
        "priority": spec.priority,
        "gpus": 1 if spec.dry_run else spec.resources.gpus,
        "waits": spec.resources.max_queue_time,
        "webhook_seq": 0 if spec.webhook_url else None,
    }


def summary(row: JobRow, queue_position: int | None = None) -> JobSummary:
    """A job without its report, which need not be loaded."""
    return JobSummary(**_summary(row, queue_position))


def _summary(row: JobRow, queue_position: int | None) -> dict[str, Any]:
    failure = None
    if row.status == Status.FAILED and row.reason:
        reason = Reason(row.reason)
        failure = Failure(
            reason=reason,
            message=row.message or "",
            hint=row.hint,
            yours_to_fix=reason.is_users_to_fix,
        )
    return {
        "id": row.id,
        "name": row.name,
        "labels": row.labels,
        "status": Status(row.status),
        "phase": row.phase,
        "queue_position": queue_position,
        "step": row.step,
        "total_steps": row.total_steps,
        "progress": row.progress,
        "attempt": row.attempt,
        "retried_from": row.retried_from,
        "failure": failure,
        "spec": JobCreate.model_validate(row.spec).told(),
        "result": row.result,
        "adapter": Adapter.model_validate(row.adapter) if row.adapter else None,
        "created_at": row.created_at,
        "updated_at": row.updated_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
    }


def _dataset_uris(spec: JobCreate) -> list[tuple[str, str]]:
    uris = [("/dataset_uri", spec.dataset_uri)]
    if spec.evaluation.validation_uri:
        uris.append(("/evaluation/validation_uri", spec.evaluation.validation_uri))
    return uris


def _fault(pointer: str, error: UriError) -> Fault:
    detail = f"{error.detail} {error.hint}" if error.hint else error.detail
    return Fault(pointer=pointer, detail=detail, code=error.code)


def _digest(spec: JobCreate) -> str:
    return hashlib.sha256(json.dumps(spec.stored(), sort_keys=True).encode()).hexdigest()
