"""Python client of a flatlora service, synchronous and asynchronous.

    from flatlora_client import FlatLora

    with FlatLora("https://flatlora.example.com", api_key="flk_…") as client:
        dataset = client.datasets.upload("rows.jsonl")
        job = client.jobs.create(base_model="Qwen/Qwen3-0.6B", dataset_uri=dataset.uri)
        job.wait().download("adapter")

``client.jobs``, ``datasets``, ``adapters``, ``models``, ``workers``, ``keys``, ``audit``,
``deliveries`` and ``webhooks`` hold what can be done with each. errors.py draws the errors.
"""

from flatlora_client.answers import (
    Adapter,
    AdapterFile,
    AdapterFiles,
    Attempt,
    AuditEvent,
    BaseModel,
    Checkpoint,
    Dataset,
    Delivery,
    Event,
    Failure,
    JobData,
    Key,
    LogLine,
    Metric,
    ModelLimits,
    Models,
    Page,
    Quota,
    QuotaUse,
    Readiness,
    Slot,
    UploadState,
    Version,
    WebhookSecret,
    WebhookTested,
    Worker,
)
from flatlora_client.asynchronous import AsyncFlatLora, AsyncJob
from flatlora_client.configuration import Profile, is_loopback
from flatlora_client.errors import (
    APIError,
    ConfigurationError,
    Conflict,
    ConnectionFailed,
    FlatLoraError,
    Forbidden,
    HashMismatch,
    InvalidRequest,
    JobCancelled,
    JobFailed,
    NotFound,
    RateLimited,
    ServerError,
    Unauthenticated,
    UnexpectedAnswer,
    WaitTimeout,
)
from flatlora_client.fields import (
    DataFields,
    EvaluationFields,
    JobFields,
    JobFilters,
    LoraFields,
    ResourceFields,
    TrainingFields,
)
from flatlora_client.operations.waiting import WaitOptions
from flatlora_client.reading import Answer
from flatlora_client.sync import FlatLora, Job
from flatlora_client.version import __version__

__all__ = [
    "APIError",
    "Adapter",
    "AdapterFile",
    "AdapterFiles",
    "Answer",
    "AsyncFlatLora",
    "AsyncJob",
    "Attempt",
    "AuditEvent",
    "BaseModel",
    "Checkpoint",
    "ConfigurationError",
    "Conflict",
    "ConnectionFailed",
    "DataFields",
    "Dataset",
    "Delivery",
    "EvaluationFields",
    "Event",
    "Failure",
    "FlatLora",
    "FlatLoraError",
    "Forbidden",
    "HashMismatch",
    "InvalidRequest",
    "Job",
    "JobCancelled",
    "JobData",
    "JobFailed",
    "JobFields",
    "JobFilters",
    "Key",
    "LogLine",
    "LoraFields",
    "Metric",
    "ModelLimits",
    "Models",
    "NotFound",
    "Page",
    "Profile",
    "Quota",
    "QuotaUse",
    "RateLimited",
    "Readiness",
    "ResourceFields",
    "ServerError",
    "Slot",
    "TrainingFields",
    "Unauthenticated",
    "UnexpectedAnswer",
    "UploadState",
    "Version",
    "WaitOptions",
    "WaitTimeout",
    "WebhookSecret",
    "WebhookTested",
    "Worker",
    "__version__",
    "is_loopback",
]
