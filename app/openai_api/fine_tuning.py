"""``/v1/fine_tuning/jobs``: the jobs of this service, as OpenAI's clients ask for them."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Request, Response
from pydantic import Field, model_validator

from app.access.dependencies import Asking
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
from app.faults import Fault
from app.headers import told
from app.jobs.endpoints import FAULTS, LIST_FAULTS, IdempotencyKey, Reading, Writing, wake_workers
from app.jobs.schemas import LABEL_NAME
from app.openai_api.creation import native
from app.openai_api.errors import bad_cursor, refusals
from app.openai_api.ids import number_of
from app.openai_api.paging import PageQuery
from app.openai_api.presenting import present_checkpoint, present_event, present_job
from app.openai_api.repository import OpenAIRepository
from app.openai_api.retries import Creation
from app.openai_api.schemas import (
    FineTuningCheckpointPage,
    FineTuningEventPage,
    FineTuningJob,
    FineTuningJobCreate,
    FineTuningJobPage,
)
from app.openai_api.shape import PREFIX
from app.sessions import ReadSession, WriteSession, note_change

router = APIRouter(prefix=f"{PREFIX}/fine_tuning/jobs", tags=["openai"])

METADATA = re.compile(r"metadata\[(.*)\]")
RetryCount = Annotated[
    int,
    Header(
        alias="x-stainless-retry-count",
        ge=0,
        le=1000,
        description="How many tries came before this one: OpenAI's clients say so. A retry is "
        "answered with the job of the try before.",
    ),
]


class ListQuery(PageQuery):
    metadata: Annotated[str, Field(pattern="^null$")] | None = Field(
        None, description="`null`: those without metadata. `metadata[team]=nlp`: those with it."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_filters(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``metadata[team]=nlp`` has a name of the user's; ``metadata_filters`` reads it."""
        return {name: value for name, value in values.items() if not METADATA.fullmatch(name)}


async def metadata_filters(request: Request) -> dict[str, str]:
    labels = {}
    for name, value in request.query_params.items():
        if not (found := METADATA.fullmatch(name)):
            continue
        if not re.fullmatch(LABEL_NAME, found[1]) or "\0" in value:
            detail = f"{found[1]!r} is no name of metadata, or {value!r} no value of it."
            fault = Fault(pointer=name, detail=detail, code="label_malformed")
            raise InvalidRequest(detail, faults=[fault])
        labels[found[1]] = value
    return labels


@router.post(
    "",
    responses=refusals(
        MalformedBody,
        Unauthenticated,
        TooLarge,
        UnsupportedMediaType,
        InvalidRequest,
        IdempotencyKeyReused,
        QuotaExceeded,
        faults=(*FAULTS, "unsupported_value", "given_twice"),
    )
    | {200: {"headers": told(maybe=("Idempotent-Replayed",))}},
    summary="Create a fine-tuning job",
)
async def create_fine_tuning_job(
    body: FineTuningJobCreate,
    session: WriteSession,
    jobs: Writing,
    request: Request,
    response: Response,
    background: BackgroundTasks,
    asking: Asking,
    idempotency_key: IdempotencyKey = None,
    retry: RetryCount = 0,
) -> FineTuningJob:
    """Our own settings stand among the hyperparameters, or under `flatlora` as in `POST /jobs`."""
    spec, params = native(body)
    request_id = request.state.request_id
    try:
        if idempotency_key:
            job, was_there = await jobs.submit(spec, idempotency_key, request_id=request_id)
        else:
            creation = Creation(session, jobs, actor=asking.actor)
            job, was_there = await creation.submit(spec, retry=retry, request_id=request_id)
    except InvalidRequest as error:
        raise params.translate(error) from None
    note_change(request, None if was_there else job.id)
    if was_there:
        response.headers["Idempotent-Replayed"] = "true"
    wake_workers(request, background)
    return present_job(await jobs.row(job.id))


@router.get(
    "",
    responses=refusals(Unauthenticated, InvalidRequest, faults=LIST_FAULTS),
    summary="List fine-tuning jobs, newest first",
)
async def list_fine_tuning_jobs(
    session: ReadSession,
    jobs: Reading,
    query: Annotated[ListQuery, Query()],
    labels: Annotated[dict[str, str], Depends(metadata_filters)],
) -> FineTuningJobPage:
    """All jobs of the project, whichever way they came. Filter with `metadata[<name>]=<value>`."""
    after = None
    if query.after:
        try:
            after = await jobs.row(query.after)
        except JobNotFound:
            raise bad_cursor(query.after, "a job") from None
    rows = await OpenAIRepository(session).jobs(
        limit=query.limit + 1, after=after, labels=None if query.metadata else labels
    )
    return FineTuningJobPage(
        data=[present_job(row) for row in rows[: query.limit]], has_more=len(rows) > query.limit
    )


@router.get(
    "/{fine_tuning_job_id}",
    responses=refusals(Unauthenticated, JobNotFound),
    summary="Show a fine-tuning job",
)
async def get_fine_tuning_job(fine_tuning_job_id: str, jobs: Reading) -> FineTuningJob:
    return present_job(await jobs.row(fine_tuning_job_id))


@router.post(
    "/{fine_tuning_job_id}/cancel",
    responses=refusals(Unauthenticated, JobNotFound, IllegalTransition),
    summary="Cancel a fine-tuning job",
)
async def cancel_fine_tuning_job(fine_tuning_job_id: str, jobs: Writing) -> FineTuningJob:
    """Repeatable. A running job stays `running` until its trainer has stopped."""
    job = await jobs.cancel(fine_tuning_job_id)
    return present_job(await jobs.row(job.id))


@router.post(
    "/{fine_tuning_job_id}/pause",
    responses=refusals(Unauthenticated, JobNotFound, IllegalTransition),
    summary="Pause a fine-tuning job",
)
async def pause_fine_tuning_job(fine_tuning_job_id: str, jobs: Writing) -> FineTuningJob:
    """Repeatable. A running job is `pausing` until its trainer has written a checkpoint."""
    job = await jobs.pause(fine_tuning_job_id)
    return present_job(await jobs.row(job.id))


@router.post(
    "/{fine_tuning_job_id}/resume",
    responses=refusals(Unauthenticated, JobNotFound, IllegalTransition, QuotaExceeded),
    summary="Let a paused fine-tuning job go on",
)
async def resume_fine_tuning_job(
    fine_tuning_job_id: str, jobs: Writing, request: Request, background: BackgroundTasks
) -> FineTuningJob:
    """Repeatable. It goes on from its last checkpoint."""
    job = await jobs.resume(fine_tuning_job_id)
    wake_workers(request, background)
    return present_job(await jobs.row(job.id))


@router.get(
    "/{fine_tuning_job_id}/events",
    responses=refusals(Unauthenticated, JobNotFound, InvalidRequest, faults=("cursor_malformed",)),
    summary="What happened to a fine-tuning job, newest first",
)
async def list_fine_tuning_events(
    fine_tuning_job_id: str,
    session: ReadSession,
    jobs: Reading,
    query: Annotated[PageQuery, Query()],
) -> FineTuningEventPage:
    job = await jobs.row(fine_tuning_job_id)
    before = number_of(query.after, "ftevent", job.id) if query.after else None
    if query.after and before is None:
        raise bad_cursor(query.after, "an event of this job")
    rows = await OpenAIRepository(session).events(job.id, limit=query.limit + 1, before=before)
    return FineTuningEventPage(
        data=[present_event(row) for row in rows[: query.limit]], has_more=len(rows) > query.limit
    )


@router.get(
    "/{fine_tuning_job_id}/checkpoints",
    responses=refusals(Unauthenticated, JobNotFound, InvalidRequest, faults=("cursor_malformed",)),
    summary="A fine-tuning job's checkpoints, the latest first",
)
async def list_fine_tuning_checkpoints(
    fine_tuning_job_id: str,
    session: ReadSession,
    jobs: Reading,
    query: Annotated[PageQuery, Query()],
) -> FineTuningCheckpointPage:
    """Every one that was written. They are for resuming: the adapter alone is downloaded."""
    job = await jobs.row(fine_tuning_job_id)
    before = number_of(query.after, "ftckpt", job.id) if query.after else None
    if query.after and before is None:
        raise bad_cursor(query.after, "a checkpoint of this job")
    found = OpenAIRepository(session)
    rows = [
        row
        for row in await found.checkpoints(job.id)
        if before is None or row.data["step"] < before
    ]
    shown = rows[: query.limit]
    metrics = await found.metrics(job.id, [row.data["step"] for row in shown])
    checkpoints = [
        present_checkpoint(
            row,
            metrics.get(("train", row.data["step"]), {}),
            metrics.get(("held_out", row.data["step"]), {}),
        )
        for row in shown
    ]
    return FineTuningCheckpointPage(
        data=checkpoints,
        first_id=checkpoints[0].id if checkpoints else None,
        last_id=checkpoints[-1].id if checkpoints else None,
        has_more=len(rows) > len(shown),
    )
