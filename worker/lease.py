"""What an attempt holds of its job, and how it learns that it holds nothing any more."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from app.tables import JobRow


class LeaseLost(Exception):
    """Another attempt holds the job, or nobody does: whoever sees this must stop at once."""


@dataclass(frozen=True)
class Lease:
    job_id: str
    fence: int
    attempt: int
    spec: Mapping[str, Any]
    runtime: float
    """Seconds that earlier attempts have worked."""
    created_at: datetime
    inputs: Mapping[str, Any] | None
    """What the first attempt has read, where that is pinned."""
    checkpoint: Mapping[str, Any] | None
    """The newest one in the store."""
    logged: Mapping[str, Any] | None
    """How far the log of its trainers is shipped."""
    request_id: str | None
    traceparent: str | None
    asked_at: float = field(default_factory=time.monotonic)
    """By the clock of this machine, before the claim: the lease has not begun earlier."""


LEASE = (
    JobRow.id, JobRow.fence, JobRow.attempt, JobRow.spec, JobRow.runtime, JobRow.created_at,
    JobRow.inputs, JobRow.checkpoint, JobRow.logged, JobRow.request_id, JobRow.traceparent,
)  # fmt: skip
