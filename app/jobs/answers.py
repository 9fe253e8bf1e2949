"""What the service tells of a job."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from app.jobs.event_types import EVENT_TYPES
from app.jobs.figures import Figures, Lenient, Progress, Result
from app.jobs.report import PreflightReport
from app.jobs.schemas import JobCreate
from app.jobs.states import Phase, Reason, Status

EVENTS: list[JsonValue] = [
    {
        "seq": 8,
        "at": "2026-11-24T08:00:00Z",
        "type": "job.evaluated",
        "message": "Held-out loss after step 40: 1.2041",
        "data": {"step": 40, "loss": 1.2041, "accuracy": 0.68},
    },
    {
        "seq": 9,
        "at": "2026-11-24T08:00:05Z",
        "type": "job.succeeded",
        "message": "The adapter is ready.",
        "data": {},
    },
]


class Failure(BaseModel):
    reason: Reason
    message: str
    hint: str | None
    yours_to_fix: bool = Field(description="False where the same job may succeed when run again.")


class AdapterFile(BaseModel):
    name: str
    size: int
    sha256: str


class Adapter(BaseModel):
    files: list[AdapterFile]
    size: int


class JobSummary(BaseModel):
    """A job as a list shows it: all but the report, which holds a whole row of the data."""

    id: str
    name: str | None
    labels: dict[str, str]
    status: Status
    phase: Phase | None
    queue_position: int | None = Field(
        description="Jobs of the same project that will start before this one; counted to 1000."
    )
    step: int
    total_steps: int | None
    progress: Lenient[Progress | None]
    attempt: int
    retried_from: str | None = Field(description="The job that this one does again.")
    failure: Failure | None
    spec: JobCreate = Field(description="The job as asked for, every default written out.")
    result: Lenient[Result | None] = Field(description="Held-out loss before and after, and more.")
    adapter: Adapter | None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class Job(JobSummary):
    report: Lenient[PreflightReport | None] = Field(
        description="What the trainer has found in the data, and what it is going to need."
    )


class JobPage(BaseModel):
    items: list[JobSummary]
    next: str | None = Field(description="Cursor of the next page: pass it as `after`.")


class Event(BaseModel):
    seq: int
    at: datetime
    type: str = Field(
        description="One of these, or one of a later version.",
        json_schema_extra={"x-extensible-enum": [*EVENT_TYPES]},
    )
    message: str = Field(description="For a person.")
    data: dict[str, Any] = Field(description="For a program; which names, goes by the type.")


class EventPage(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"items": EVENTS, "next": 9}]})

    items: list[Event]
    next: int = Field(
        description="Pass it as `after` for what comes next, also where nothing has come yet."
    )


class LogLine(BaseModel):
    seq: int
    at: datetime = Field(description="When the worker has read it.")
    text: str


class LogPage(BaseModel):
    items: list[LogLine]
    next: int = Field(
        description="Pass it as `after` for what comes next, also where nothing has come yet."
    )


class Checkpoint(BaseModel):
    step: int
    loss: float | None = Field(description="Of that training step.")
    held_out_loss: float | None = Field(description="Where the step was evaluated too.")
    size: int | None
    verified: bool | None = Field(
        description="Its files were read back and are what was written; false: it is not used."
    )
    kept: bool = Field(description="It is still there for the job to go on from.")
    created_at: datetime


class CheckpointPage(BaseModel):
    items: list[Checkpoint]
    next: int | None = Field(description="Where more follows: pass it as `after`.")


class Metric(BaseModel):
    step: int
    series: Literal["train", "held_out"]
    data: Lenient[Figures]


class MetricSeries(BaseModel):
    items: list[Metric]
    next: int | None = Field(description="Where more follows: pass it as `since_step`.")
