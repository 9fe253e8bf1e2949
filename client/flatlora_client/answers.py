"""What the service answers. A field that a service of another version lacks is None."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from flatlora_client.reading import Answer

T = TypeVar("T")

OVER = frozenset({"succeeded", "failed", "cancelled"})
"""The statuses that a job does not leave."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Failure(Answer):
    """Why a job failed."""

    reason: str
    message: str
    hint: str | None = None
    yours_to_fix: bool | None = None
    """False where the same job may succeed when run again."""


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterFile(Answer):
    """A file of an adapter."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterFiles(Answer):
    """What a finished job has made."""

    files: tuple[AdapterFile, ...]
    size: int


@dataclass(frozen=True, kw_only=True, repr=False)
class JobData(Answer):
    """A job, as it was when the service answered."""

    id: str
    status: str
    """queued, running, pausing, paused, cancelling; succeeded, failed, cancelled."""
    name: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    phase: str | None = None
    """Where a running job is: fetching, validating, loading, training, evaluating, publishing."""
    queue_position: int | None = None
    step: int = 0
    total_steps: int | None = None
    progress: dict[str, Any] | None = None
    """loss, learning_rate, sigma, grad_norm, tokens_per_second, eta_seconds."""
    attempt: int = 0
    failure: Failure | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    """As asked for, with every default written out."""
    result: dict[str, Any] | None = None
    adapter: AdapterFiles | None = None
    report: dict[str, Any] | None = None
    """What was found in the data; a list of jobs leaves it out."""
    retried_from: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.status in OVER


@dataclass(frozen=True, kw_only=True, repr=False)
class Event(Answer):
    """Something that happened to a job."""

    seq: int
    type: str
    """Such as job.running, job.checkpoint, job.succeeded."""
    message: str = ""
    at: datetime | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Whether none follows it."""
        return self.type.removeprefix("job.") in OVER


@dataclass(frozen=True, kw_only=True, repr=False)
class Metric(Answer):
    """One step of one series."""

    step: int
    series: str
    """train, or held_out."""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, repr=False)
class LogLine(Answer):
    """A line of the trainer's log."""

    seq: int
    text: str
    at: datetime | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Checkpoint(Answer):
    """A state from which a job goes on."""

    step: int
    loss: float | None = None
    held_out_loss: float | None = None
    size: int | None = None
    verified: bool | None = None
    """Whether its files were read back and are what was written."""
    kept: bool | None = None
    """Whether it is still there."""
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Dataset(Answer):
    """An uploaded file of rows."""

    id: str
    uri: str
    """What a job names it by."""
    filename: str
    size: int
    sha256: str
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class UploadState(Answer):
    """How far a resumable upload has come."""

    sha256: str
    size: int
    offset: int
    """Bytes that are there: where the next part begins."""
    dataset: Dataset | None = None
    """When it is complete."""
    filename: str | None = None
    part_size: int | None = None
    """Bytes that one part may have."""
    expires_at: datetime | None = None
    """It is forgotten then, unless something arrives before."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Adapter(Answer):
    """A finished adapter."""

    job_id: str
    base_model: str
    name: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    base_model_revision: str | None = None
    rank: int | None = None
    sigma: float | None = None
    metrics: dict[str, Any] | None = None
    size: int | None = None
    files: tuple[AdapterFile, ...] = ()
    url: str | None = None
    """Where all files are downloaded as one tar: a path below the service's URL."""
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelLimits(Answer):
    """What a job on a base model may ask for."""

    max_length: int | None = None
    """Tokens of a row; None where the model does not say."""
    max_rank: int | None = None
    max_sigma: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class BaseModel(Answer):
    """A folder below the service's model roots."""

    id: str
    """What a job names it by."""
    architecture: str | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    max_positions: int | None = None
    dtype: str | None = None
    has_chat_template: bool | None = None
    vocabulary: int | None = None
    limits: ModelLimits | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Models(Answer):
    """What jobs may be trained on."""

    items: tuple[BaseModel, ...]
    hub: tuple[str, ...] = ()
    """Hub ids that may be named; * stands for anything."""
    hub_limits: ModelLimits | None = None
    """Of each model that ``hub`` lets in."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Of every job: max_rank, max_sigma, max_dataset_bytes."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Slot(Answer):
    """A place of a worker where one job runs at a time."""

    name: str
    device: str | None = None
    job_id: str | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Worker(Answer):
    """A machine's worker, as it last spoke."""

    name: str
    host: str
    state: str
    """active, draining or lost."""
    slots: tuple[Slot, ...] = ()
    pid: int | None = None
    version: str | None = None
    started_at: datetime | None = None
    heartbeat_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Key(Answer):
    """An API key."""

    id: str
    key: str | None = field(default=None, repr=False)
    """The key itself: only in the answer that has made it."""
    name: str | None = None
    project: str | None = None
    role: str | None = None
    """viewer, submitter or admin."""
    created_at: datetime | None = None
    created_by: str | None = None
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class AuditEvent(Answer):
    """Who changed what."""

    id: int | str
    action: str
    actor: str | None = None
    object: str | None = None
    at: datetime | None = None
    request_id: str | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Attempt(Answer):
    """One attempt to deliver a webhook's message."""

    at: datetime | None = None
    seconds: float | None = None
    status: int | None = None
    """None where there was no answer."""
    error: str | None = None
    excerpt: str | None = None
    """The beginning of the answer."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Delivery(Answer):
    """A webhook's message, and how it fared."""

    id: str
    state: str | None = None
    """pending, delivered or failed."""
    job_id: str | None = None
    event: dict[str, Any] = field(default_factory=dict)
    """Its seq and type."""
    attempts: tuple[Attempt, ...] = ()
    next_attempt_at: datetime | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class WebhookTested(Attempt):
    """How a test message fared."""

    id: str | None = None
    """The receiver has it as ``webhook-id``."""
    delivered: bool | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class WebhookSecret(Answer):
    """What a project's webhook messages are signed with."""

    secret: str = field(repr=False)
    created_at: datetime | None = None
    previous_until: datetime | None = None
    """Until then the secret before it signs too."""


@dataclass(frozen=True, kw_only=True, repr=False)
class QuotaUse(Answer):
    """How much of something is used, and how much may be."""

    used: float
    allowed: float | None = None
    """None: any number."""
    window_days: int | None = None
    """Of what is counted over a time: over the last so many days."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Quota(Answer):
    """What a project may use, and what it has used."""

    project: str | None = None
    queued: QuotaUse | None = None
    """Jobs that wait."""
    running: QuotaUse | None = None
    """More than allowed wait; they are not refused."""
    gpu_minutes: QuotaUse | None = None
    stored_bytes: QuotaUse | None = None
    """Of datasets."""
    requests_per_minute: int | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class Readiness(Answer):
    """A service that can serve."""

    status: str
    broker: str | None = None
    """ok, or unreachable, with which jobs are accepted all the same; None: it has none."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Version(Answer):
    """Which service answers."""

    version: str
    api: str | None = None
    commit: str | None = None
    python: str | None = None
    features: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list."""

    items: tuple[T, ...]
    next: str | int | None
    """Where more follows: pass it as ``after``, or of audit events as ``before``."""
    raw: dict[str, Any] = field(repr=False)
