"""The routes of jobs."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from app.db import ReadSession, WriteSession
from app.errors import (
    Fault,
    IdempotencyKeyReused,
    IllegalTransition,
    InvalidRequest,
    JobNotFound,
    TooLarge,
    problems,
)
from app.jobs.repository import JobFilter
from app.jobs.schemas import EventPage, Job, JobCreate, JobPage, MetricSeries
from app.jobs.service import JobService
from app.jobs.states import Status

router = APIRouter(prefix="/jobs", tags=["jobs"])

RETRY_SECONDS = {False: "2", True: "5"}  # by whether the job is running

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Makes a repeated request safe: the same key and body give the same job.",
    ),
]


def reading(request: Request, session: ReadSession) -> JobService:
    return JobService(session, request.state.settings)


def writing(request: Request, session: WriteSession) -> JobService:
    return JobService(session, request.state.settings)


Reading = Annotated[JobService, Depends(reading)]
Writing = Annotated[JobService, Depends(writing)]


class ListQuery(BaseModel):
    model_config = ConfigDict(extra="allow")

    status: list[Status] = Field([], description="May be repeated.")
    base_model: str | None = None
    created_after: AwareDatetime | None = None
    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, max_length=256, description="`next` of the page before.")


@router.post(
    "",
    status_code=202,
    responses=problems(InvalidRequest, IdempotencyKeyReused, TooLarge),
    summary="Submit a job",
)
async def create_job(
    body: JobCreate, jobs: Writing, response: Response, idempotency_key: IdempotencyKey = None
) -> Job:
    job, is_replay = await jobs.submit(body, idempotency_key)
    response.headers["Location"] = f"/jobs/{job.id}"
    response.headers["Retry-After"] = RETRY_SECONDS[False]
    if is_replay:
        response.headers["Idempotent-Replayed"] = "true"
    return job


@router.get("", responses=problems(InvalidRequest), summary="List jobs, newest first")
async def list_jobs(jobs: Reading, query: Annotated[ListQuery, Query()]) -> JobPage:
    """Filter by a label with `label.<name>=<value>`."""
    return await jobs.list(
        JobFilter(query.status, query.base_model, label_filters(query), query.created_after),
        limit=query.limit,
        after=query.after,
    )


def label_filters(query: ListQuery) -> dict[str, str]:
    """``label.team=nlp`` filters by a label; any other parameter is a mistake."""
    labels = {}
    for name, value in (query.model_extra or {}).items():
        prefix, _, label = name.partition(".")
        if prefix != "label" or not label:
            raise InvalidRequest(
                f"There is no parameter {name!r}.",
                f"Known are {', '.join(ListQuery.model_fields)} and label.<name>.",
                faults=[Fault(pointer=name, detail="unknown parameter", code="extra_forbidden")],
            )
        labels[label] = str(value)
    return labels


@router.get("/{job_id}", responses=problems(JobNotFound), summary="Show a job")
async def get_job(job_id: str, jobs: Reading, response: Response) -> Job:
    job = await jobs.get(job_id)
    if not job.status.is_terminal:
        response.headers["Retry-After"] = RETRY_SECONDS[job.status is Status.RUNNING]
    return job


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    responses=problems(JobNotFound, IllegalTransition),
    summary="Cancel a job",
)
async def cancel_job(job_id: str, jobs: Writing) -> Job:
    """Repeatable. A running job is `cancelling` until its trainer has stopped."""
    return await jobs.cancel(job_id)


@router.get("/{job_id}/events", responses=problems(JobNotFound), summary="What happened to a job")
async def list_events(
    job_id: str,
    jobs: Reading,
    after: Annotated[int, Query(ge=0, description="Number of the last event seen.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> EventPage:
    return await jobs.events(job_id, after=after, limit=limit)


@router.get("/{job_id}/metrics", responses=problems(JobNotFound), summary="A job's curves")
async def list_metrics(
    job_id: str,
    jobs: Reading,
    since_step: Annotated[int, Query(ge=0)] = 0,
    series: Literal["train", "held_out"] | None = None,
) -> MetricSeries:
    """`train`: loss, learning_rate, sigma, grad_norm and more. `held_out`: loss and accuracy."""
    return await jobs.metrics(job_id, since_step=since_step, series=series)
