"""The routes of what is written down of a job while it runs."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse
from pydantic import Field

from app.errors import InvalidRequest, JobNotFound, Unauthenticated
from app.etags import prefers
from app.headers import told
from app.jobs.answers import CheckpointPage, EventPage, LogPage
from app.jobs.endpoints import BIGGEST, Page, Reading
from app.jobs.following import EventStream
from app.jobs.records import JobRecords
from app.problems import problems
from app.sessions import ReadSession

router = APIRouter(prefix="/jobs", tags=["jobs"])

LastEventId = Annotated[
    int | None,
    Header(ge=0, le=BIGGEST, description="Of a stream: the number of the last event seen."),
]

STREAM_HEADERS = {"Cache-Control": "no-cache", "Vary": "Accept", "X-Accel-Buffering": "no"}


async def reading(session: ReadSession) -> JobRecords:
    return JobRecords(session)


Records = Annotated[JobRecords, Depends(reading)]


class EventQuery(Page):
    after: int = Field(0, ge=0, le=BIGGEST, description="Number of the last event seen.")
    limit: int = Field(100, ge=1, le=1000)


class CheckpointQuery(Page):
    after: int = Field(0, ge=0, le=BIGGEST, description="`next` of the page before.")
    limit: int = Field(100, ge=1, le=1000)


class LogQuery(Page):
    after: int = Field(0, ge=0, le=BIGGEST, description="Number of the last line seen.")
    limit: int = Field(1000, ge=1, le=10_000)


@router.get(
    "/{job_id}/events",
    response_model=EventPage,
    responses={
        **problems(Unauthenticated, JobNotFound, InvalidRequest),
        200: {
            "description": "A page of events; or all of them as they come, as `text/event-stream`",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "headers": told("Vary"),
        },
        204: {
            "description": "The job is over, and the client has heard all of its stream.",
            "headers": told("Vary", "Cache-Control"),
        },
    },
    summary="What happened to a job",
)
async def list_events(
    job_id: str,
    jobs: Reading,
    records: Records,
    request: Request,
    response: Response,
    query: Annotated[EventQuery, Query()],
    last_event_id: LastEventId = None,
) -> Any:
    """With `Accept: text/event-stream` the events come as they happen, each once and in order:
    `id` is the number, `event` the type, `data` the event as JSON. `progress` without an id tells
    of steps in between. The stream ends after the job's last event; a client that comes again is
    told all that it has missed, by `Last-Event-ID` or `after`.
    """
    response.headers["Vary"] = "Accept"
    if not prefers(request.headers.get("accept", ""), EventSourceResponse.media_type):
        return await jobs.events(job_id, after=query.after, limit=query.limit)
    after = query.after if last_event_id is None else last_event_id
    news = await records.news(job_id, after=after)
    if news.is_over and not news.events:
        return Response(status_code=204, headers=STREAM_HEADERS)  # browsers do not come again
    stream = EventStream(request, job_id, after, news)
    return EventSourceResponse(stream.frames(), headers=STREAM_HEADERS)


@router.get(
    "/{job_id}/logs",
    responses=problems(Unauthenticated, JobNotFound, InvalidRequest),
    summary="What a job's trainer has printed",
)
async def list_logs(job_id: str, records: Records, query: Annotated[LogQuery, Query()]) -> LogPage:
    """Line by line, without secrets, some seconds old; of a long log the newest lines."""
    return await records.logs(job_id, after=query.after, limit=query.limit)


@router.get(
    "/{job_id}/checkpoints",
    responses=problems(Unauthenticated, JobNotFound, InvalidRequest),
    summary="A job's checkpoints",
)
async def list_checkpoints(
    job_id: str, records: Records, query: Annotated[CheckpointQuery, Query()]
) -> CheckpointPage:
    """By their steps. A job that is paused or has lost its worker goes on from the newest that is
    kept; one that is over keeps none.
    """
    return await records.checkpoints(job_id, after=query.after, limit=query.limit)
