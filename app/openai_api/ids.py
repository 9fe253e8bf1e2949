"""Ids as OpenAI's clients expect them, and back. Jobs and adapters keep their own: ``job_…``."""

import re

DATASET = re.compile(r"file-([0-9a-f]{32})")
RESULTS = re.compile(r"file-results-([0-9a-f]{32})")
NUMBERED = re.compile(r"(ftevent|ftckpt)-([0-9a-f]{32})-([0-9]{1,9})")


def file_id(uri: str) -> str:
    """Of the dataset that a job reads; where that is no upload, the URI itself."""
    return re.sub(r"^(?:dataset:)?ds_([0-9a-f]{32})$", r"file-\1", uri)


def dataset_id(file: str) -> str | None:
    """Of a file that was uploaded."""
    found = DATASET.fullmatch(file)
    return f"ds_{found[1]}" if found else None


def dataset_uri(file: str) -> str:
    """What a job names a training file by."""
    dataset = dataset_id(file)
    return f"dataset:{dataset}" if dataset else file


def results_id(job_id: str) -> str:
    return f"file-results-{job_id.removeprefix('job_')}"


def job_of_results(file: str) -> str | None:
    """The job whose results a file holds."""
    found = RESULTS.fullmatch(file)
    return f"job_{found[1]}" if found else None


def event_id(job_id: str, seq: int) -> str:
    return f"ftevent-{job_id.removeprefix('job_')}-{seq}"


def checkpoint_id(job_id: str, step: int) -> str:
    return f"ftckpt-{job_id.removeprefix('job_')}-{step}"


def number_of(given: str, kind: str, job_id: str) -> int | None:
    """The event's number or the checkpoint's step, if the id is one of this job."""
    found = NUMBERED.fullmatch(given)
    if found and (found[1], f"job_{found[2]}") == (kind, job_id):
        return int(found[3])
    return None
