"""The routes of jobs."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Request, Response
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from app.errors import (
    IdempotencyKeyReused,
    IllegalTransition,
    InvalidRequest,
    JobNotFound,
    MalformedBody,
    QuotaExceeded,
    TooLarge,
    Unauthenticated,
    UnsupportedMediaType,
)
from app.etags import names
from app.faults import Fault
from app.headers import told
from app.jobs.answers import Job, JobPage, MetricSeries
from app.jobs.following import LONGEST_WAIT_SECONDS, look, wait_for_change
from app.jobs.repository import JobFilter
from app.jobs.schemas import LABEL_NAME, JobCreate
from app.jobs.service import JobService
from app.jobs.states import Status
from app.periodic import Periodic
from app.problems import Responses, problems
from app.sessions import ReadSession, WriteSession, note_change
from app.storage import ArtifactStore, Outage

log = structlog.get_logger()
router = APIRouter(prefix="/jobs", tags=["jobs"])

RETRY_SECONDS = {False: "2", True: "5"}  # by whether the job is running

FAULTS = (
    "base_model_not_found", "base_model_not_allowed", "base_model_unusable",
    "revision_not_allowed", "dataset_not_found", "dataset_not_allowed", "uri_malformed",
    "uri_scheme_unsupported", "path_not_allowed", "bucket_not_allowed", "address_not_allowed",
    "port_not_allowed",
)  # fmt: skip
"""Codes of what a job that is asked for has wrong."""
LIST_FAULTS = ("cursor_malformed", "label_malformed")
SUBMITTED: Responses = {
    202: {"headers": told("Location", "Retry-After", maybe=("Idempotent-Replayed",))}
}
SEEN = told("ETag", "Cache-Control", maybe=("Retry-After",))

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Makes a repeated request safe: the same key and body give the same job.",
    ),
]

IfNoneMatch = Annotated[str | None, Header(description="The ETag of what the client has.")]


async def reading(request: Request, session: ReadSession) -> JobService:
    return JobService(session, request.state.settings)


async def writing(request: Request, session: WriteSession) -> JobService:
    return JobService(session, request.state.settings)


Reading = Annotated[JobService, Depends(reading)]
Writing = Annotated[JobService, Depends(writing)]


RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]")
BIGGEST = 2**31 - 1  # of the integers that both databases keep

PlainText = Annotated[str, Field(max_length=1024, pattern=r"^[^\x00]*$")]


def _written(moment: Any) -> Any:
    """Not a number: that would be read as seconds since 1970."""
    if isinstance(moment, str) and not RFC_3339.match(moment):
        raise ValueError("expected a moment of RFC 3339, such as 2026-11-24T08:00:00Z")
    return moment


def _to_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("this moment has no name in UTC") from None


class Page(BaseModel):
    """Query parameters; one that is not known is a mistake."""

    model_config = ConfigDict(extra="forbid")


class ListQuery(Page):
    status: list[Status] = Field([], description="May be repeated.")
    base_model: PlainText | None = None
    created_after: (
        Annotated[AwareDatetime, BeforeValidator(_written), AfterValidator(_to_utc)] | None
    ) = Field(None, description="RFC 3339, with its zone.")
    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, max_length=256, description="`next` of the page before.")

    @model_validator(mode="before")
    @classmethod
    def _without_labels(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`label.team=nlp` has a name of the user's; ``label_filters`` reads it."""
        return {name: value for name, value in values.items() if not name.startswith("label.")}


class JobQuery(Page):
    wait: float = Field(
        0,
        ge=0,
        le=LONGEST_WAIT_SECONDS,
        description="Answer when the job has changed, or after so many seconds.",
    )


class MetricQuery(Page):
    since_step: int = Field(0, ge=0, le=BIGGEST, description="The first step to show.")
    series: Literal["train", "held_out"] | None = None
    limit: int = Field(10_000, ge=2, le=100_000)


@router.post(
    "",
    status_code=202,
    responses=problems(
        MalformedBody,
        Unauthenticated,
        TooLarge,
        UnsupportedMediaType,
        InvalidRequest,
        IdempotencyKeyReused,
        QuotaExceeded,
        faults=FAULTS,
    )
    | SUBMITTED,
    summary="Submit a job",
)
async def create_job(
    body: JobCreate,
    jobs: Writing,
    request: Request,
    response: Response,
    background: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    job, is_replay = await jobs.submit(body, idempotency_key, request_id=request.state.request_id)
    note_change(request, None if is_replay else job.id)
    response.headers.update(_of_new(job, request, is_replay=is_replay))
    wake_workers(request, background)
    return job


def _of_new(job: Job, request: Request, *, is_replay: bool) -> dict[str, str]:
    """Headers of an answer that names a new job, or the one that was made before."""
    location = f"{request.scope.get('root_path', '')}/jobs/{job.id}"
    replayed = {"Idempotent-Replayed": "true"} if is_replay else {}
    return {"Location": location, "Retry-After": RETRY_SECONDS[False], **replayed}


def wake_workers(request: Request, background: BackgroundTasks) -> None:
    """Let the workers hear of what has been queued, after the commit and the answer."""
    if wakes := request.state.wakes:
        background.add_task(_nudge, wakes)


async def _nudge(wakes: Periodic) -> None:
    """Not as a plain function: that would take a thread of its own."""
    wakes.nudge()


async def label_filters(request: Request) -> dict[str, str]:
    """``label.team=nlp``"""
    labels = {}
    for name, value in request.query_params.items():
        label = name.removeprefix("label.")
        if label == name:
            continue
        if not re.fullmatch(LABEL_NAME, label) or "\0" in value:
            detail = f"{label!r} is no name of a label, or {value!r} no value of one."
            fault = Fault(pointer=name, detail=detail, code="label_malformed")
            raise InvalidRequest(detail, faults=[fault])
        labels[label] = value
    return labels


@router.get(
    "",
    responses=problems(Unauthenticated, InvalidRequest, faults=LIST_FAULTS),
    summary="List jobs, newest first",
)
async def list_jobs(
    jobs: Reading,
    query: Annotated[ListQuery, Query()],
    labels: Annotated[dict[str, str], Depends(label_filters)],
) -> JobPage:
    """Filter by a label with `label.<name>=<value>`."""
    return await jobs.list(
        JobFilter(query.status, query.base_model, labels, query.created_after),
        limit=query.limit,
        after=query.after,
    )


@router.head("/{job_id}", include_in_schema=False)
@router.get(
    "/{job_id}",
    response_model=Job,
    responses={
        **problems(Unauthenticated, JobNotFound, InvalidRequest),
        200: {"headers": SEEN},
        304: {"description": "The client has it: If-None-Match names its ETag.", "headers": SEEN},
    },
    summary="Show a job",
)
async def get_job(
    job_id: str,
    request: Request,
    query: Annotated[JobQuery, Query()],
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Carries an `ETag`; sent back as `If-None-Match`, it is 304 until something has changed.

    With `wait` the answer comes when the job is no longer what that names (without it: what the
    job is now), or when the time is over. A job that is over is answered at once.
    """
    if query.wait:
        found = await wait_for_change(request, job_id, if_none_match, query.wait)
    else:
        found = await look(request, job_id)
    headers = {"ETag": found.etag, "Cache-Control": "private, no-cache"}
    if not found.job.status.is_terminal:
        headers["Retry-After"] = RETRY_SECONDS[found.job.status is Status.RUNNING]
    if names(if_none_match, found.etag):
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers=headers, media_type="application/json")


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    responses=problems(Unauthenticated, JobNotFound, IllegalTransition),
    summary="Cancel a job",
)
async def cancel_job(job_id: str, jobs: Writing) -> Job:
    """Repeatable. A running job is `cancelling` until its trainer has stopped."""
    return await jobs.cancel(job_id)


@router.post(
    "/{job_id}/pause",
    status_code=202,
    responses=problems(Unauthenticated, JobNotFound, IllegalTransition),
    summary="Pause a job",
)
async def pause_job(job_id: str, jobs: Writing) -> Job:
    """Repeatable. A running job is `pausing` until its trainer has written a checkpoint.

    While it is `paused` it holds no GPU, and its times in the queue and at work stand still.
    """
    return await jobs.pause(job_id)


@router.post(
    "/{job_id}/resume",
    status_code=202,
    responses=problems(Unauthenticated, JobNotFound, IllegalTransition, QuotaExceeded),
    summary="Let a paused job go on",
)
async def resume_job(
    job_id: str, jobs: Writing, request: Request, background: BackgroundTasks
) -> Job:
    """Repeatable. It waits in the queue again, and goes on from its last checkpoint."""
    job = await jobs.resume(job_id)
    wake_workers(request, background)
    return job


@router.post(
    "/{job_id}/retry",
    status_code=202,
    responses=problems(
        Unauthenticated,
        JobNotFound,
        IllegalTransition,
        InvalidRequest,
        IdempotencyKeyReused,
        QuotaExceeded,
        faults=FAULTS,
    )
    | SUBMITTED,
    summary="Do a job again",
)
async def retry_job(
    job_id: str,
    jobs: Writing,
    request: Request,
    response: Response,
    background: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """A new job with the same spec, from a job that is over. While it is not over itself, asking
    again gives it again, with `Idempotent-Replayed`.
    """
    job, is_replay = await jobs.retry(job_id, idempotency_key, request_id=request.state.request_id)
    note_change(request, None if is_replay else job.id)
    response.headers.update(_of_new(job, request, is_replay=is_replay))
    wake_workers(request, background)
    return job


@router.delete(
    "/{job_id}",
    status_code=204,
    responses=problems(Unauthenticated, JobNotFound, IllegalTransition),
    summary="Delete a job that is over",
)
async def delete_job(
    job_id: str, jobs: Writing, request: Request, background: BackgroundTasks
) -> None:
    """Its events, curves, logs and its adapter go with it, and its id is no longer known."""
    await jobs.delete(job_id)
    background.add_task(_forget_files, request.state.store, job_id)  # after the commit


def _forget_files(store: ArtifactStore, job_id: str) -> None:
    """The adapter's files themselves may belong to other jobs too: the cleaner looks for that."""
    try:
        store.forget_job(job_id)
    except Outage as error:
        log.warning("files of a deleted job stay for the cleaner", job_id=job_id, exc_info=error)


@router.get(
    "/{job_id}/metrics",
    responses=problems(Unauthenticated, JobNotFound, InvalidRequest),
    summary="A job's curves",
)
async def list_metrics(
    job_id: str, jobs: Reading, query: Annotated[MetricQuery, Query()]
) -> MetricSeries:
    """`train`: loss, learning_rate, sigma, grad_norm and more. `held_out`: loss and accuracy."""
    return await jobs.metrics(
        job_id, since_step=query.since_step, series=query.series, limit=query.limit
    )
