"""The life of a job as one pure table.

queued → running → succeeded
   │        ├──→ failed
   │        ├──→ cancelling → cancelled
   │        ├──→ pausing → paused
   │        └──→ queued          (worker lost, or drained)
   ├──→ cancelled
   └──→ paused → queued          (resumed)
"""

from enum import StrEnum


class Status(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    PAUSING = "pausing"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]

    @property
    def is_held(self) -> bool:
        """A worker holds the job under a lease."""
        return self in {Status.RUNNING, Status.CANCELLING, Status.PAUSING}


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.PAUSED, Status.CANCELLED, Status.FAILED}),
    Status.RUNNING: frozenset(
        {Status.SUCCEEDED, Status.FAILED, Status.CANCELLING, Status.PAUSING, Status.QUEUED}
    ),
    # A wish can come too late: the job may finish before the trainer reads it.
    Status.CANCELLING: frozenset({Status.CANCELLED, Status.SUCCEEDED, Status.FAILED}),
    Status.PAUSING: frozenset({Status.PAUSED, Status.SUCCEEDED, Status.FAILED, Status.CANCELLING}),
    Status.PAUSED: frozenset({Status.QUEUED, Status.CANCELLED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}


def may_move(origin: Status, target: Status) -> bool:
    return target in TRANSITIONS[origin]


TERMINAL = [status for status in Status if status.is_terminal]
HELD = [status for status in Status if status.is_held]


class Phase(StrEnum):
    """Where a running job is."""

    FETCHING = "fetching"
    VALIDATING = "validating"
    LOADING = "loading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"


class Reason(StrEnum):
    """Why a job failed. The sentence and the hint beside it say what happened this time."""

    DATASET_INVALID = "dataset_invalid"
    DATASET_UNAVAILABLE = "dataset_unavailable"
    BASE_MODEL_UNAVAILABLE = "base_model_unavailable"
    CONFIG_INVALID = "config_invalid"
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    DISK_FULL = "disk_full"
    WORKER_LOST = "worker_lost"
    MAX_RUNTIME = "max_runtime"
    MAX_QUEUE_TIME = "max_queue_time"
    LOSS_DIVERGED = "loss_diverged"
    PUBLISH_FAILED = "publish_failed"
    INTERNAL = "internal"

    @property
    def is_users_to_fix(self) -> bool:
        """True where the same job would fail again and only its author can change that."""
        return self in {
            Reason.DATASET_INVALID,
            Reason.DATASET_UNAVAILABLE,
            Reason.BASE_MODEL_UNAVAILABLE,
            Reason.CONFIG_INVALID,
            Reason.GPU_OUT_OF_MEMORY,
            Reason.MAX_RUNTIME,
            Reason.LOSS_DIVERGED,
        }
