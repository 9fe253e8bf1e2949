"""Why a job can fail, each with a sentence for its author.

JobError                    reason, message, hint
├── DatasetInvalid          rows that cannot be used, with their line numbers
├── DatasetUnavailable      the file cannot be had
├── BaseModelUnavailable    the model cannot be loaded
├── ConfigInvalid           settings that do not fit this base model or these rows
├── OutOfGpuMemory          the device's memory does not suffice
├── LossDiverged            NaN or infinite losses in a row
└── PublishFailed           the finished adapter did not pass its check
Stopped                     not a failure: cancelled, or drained to a checkpoint
"""

from typing import ClassVar, Literal


class JobError(Exception):
    """A failure that is explained to the job's author.

    Args:
        message: What was found and what was expected.
        hint: What to change.
    """

    reason: ClassVar[str] = "internal"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class DatasetInvalid(JobError):
    """Rows of the dataset cannot be used."""

    reason = "dataset_invalid"


class DatasetUnavailable(JobError):
    """The dataset cannot be had."""

    reason = "dataset_unavailable"


class BaseModelUnavailable(JobError):
    """The base model cannot be loaded."""

    reason = "base_model_unavailable"


class ConfigInvalid(JobError):
    """Settings that do not fit this base model or these rows."""

    reason = "config_invalid"


class OutOfGpuMemory(JobError):
    """The device's memory does not suffice."""

    reason = "gpu_out_of_memory"


class LossDiverged(JobError):
    """NaN or infinite losses in a row."""

    reason = "loss_diverged"


class PublishFailed(JobError):
    """The finished adapter did not pass its check."""

    reason = "publish_failed"


class Stopped(Exception):
    """The run ended at a step boundary because it was asked to.

    Args:
        wish: ``"cancel"`` leaves no checkpoint; ``"drain"`` has written one.
    """

    def __init__(self, wish: Literal["cancel", "drain"]) -> None:
        super().__init__(wish)
        self.wish = wish
