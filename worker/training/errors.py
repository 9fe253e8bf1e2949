"""Why a job can fail, each with a sentence for its author.

JobError                    reason, message, hint
├── DatasetInvalid          rows that cannot be used, with their line numbers
├── DatasetUnavailable      the file cannot be had
├── BaseModelUnavailable    the model cannot be loaded
├── ConfigInvalid           settings that do not fit this base model or these rows
├── OutOfGpuMemory          the device's memory does not suffice
├── DiskFull                nothing more can be written
├── LossDiverged            NaN or infinite losses in a row
└── PublishFailed           the finished adapter did not pass its check
Stopped                     not a failure: cancelled, or drained to a checkpoint
"""

import errno
import re
from typing import Literal

_FULL = {errno.ENOSPC, errno.EDQUOT}


class JobError(Exception):
    """A failure that is explained to the job's author.

    Args:
        message: What was found and what was expected.
        hint: What to change.
    """

    reason: str = "internal"

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


class DiskFull(JobError):
    """Nothing more can be written to the worker's disk."""

    reason = "disk_full"

    def __init__(self) -> None:
        super().__init__(
            "The worker's disk is full.",
            "Free some space below the data folder, then submit the job again.",
        )


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


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error.

    Libraries written in Rust (safetensors, the object store) name the system's error in their text
    only.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        found = re.search(r"\bos error (\d+)\b", str(error))
        if found and int(found[1]) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def as_told(error: Exception, *, unforeseen: JobError) -> JobError:
    """What the job's author is told of an error: never the text of one that we do not know.

    Args:
        error: What went wrong.
        unforeseen: What is told where nobody foresaw it.
    """
    if isinstance(error, JobError):
        return error
    return DiskFull() if is_disk_full(error) else unforeseen
