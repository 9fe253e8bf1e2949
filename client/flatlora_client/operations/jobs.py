"""Jobs: making, finding and steering them."""

from collections.abc import Mapping
from typing import Any, TypeAlias, Unpack

from flatlora_client.answers import Checkpoint, JobData, LogLine, Metric, Page
from flatlora_client.api import Api, path_of
from flatlora_client.fields import JobFields, JobFilters
from flatlora_client.operations.following import all_of, follow_pages
from flatlora_client.reading import read
from flatlora_client.steps import Emit, Flow, Items

JobRef: TypeAlias = str | JobData
"""A job, or its id."""


def id_of(job: JobRef) -> str:
    """The id of a job."""
    return job if isinstance(job, str) else job.id


def create(api: Api, /, **fields: Unpack[JobFields]) -> Flow[JobData]:
    """Submit a job. However often the request has to be sent again, it is one job."""
    body: dict[str, Any] = {**fields}
    key = body.pop("idempotency_key", None)
    body |= body.pop("extra_fields", None) or {}
    return read(JobData, (yield from api.post("/jobs", body, idempotency_key=key)))


def get(api: Api, /, job: JobRef) -> Flow[JobData]:
    """Show a job."""
    return (yield from api.get(JobData, path_of("jobs", id_of(job))))


def items(
    api: Api, /, *, limit: int | None = None, **filters: Unpack[JobFilters]
) -> Items[JobData]:
    """Iterate over jobs, newest first; ``limit`` is how many are fetched at a time."""
    return api.pages(JobData, "/jobs", {**_filters(filters), "limit": limit})


def page(
    api: Api,
    /,
    *,
    limit: int | None = None,
    after: str | None = None,
    **filters: Unpack[JobFilters],
) -> Flow[Page[JobData]]:
    """One page of jobs, newest first."""
    params = {**_filters(filters), "limit": limit, "after": after}
    return (yield from api.page(JobData, "/jobs", params))


def _filters(filters: JobFilters) -> dict[str, Any]:
    found: dict[str, Any] = {**filters}
    labels: Mapping[str, str] = found.pop("labels", None) or {}
    return found | {f"label.{name}": value for name, value in labels.items()}


def cancel(api: Api, /, job: JobRef) -> Flow[JobData]:
    """Ask for a job to be stopped; repeatable."""
    return (yield from _act(api, job, "cancel"))


def pause(api: Api, /, job: JobRef) -> Flow[JobData]:
    """Ask for a job to write a checkpoint and wait; repeatable."""
    return (yield from _act(api, job, "pause"))


def resume(api: Api, /, job: JobRef) -> Flow[JobData]:
    """Let a paused job go on from its checkpoint; repeatable."""
    return (yield from _act(api, job, "resume"))


def retry(api: Api, /, job: JobRef, *, idempotency_key: str | None = None) -> Flow[JobData]:
    """Submit a job that is over once more; the answer is the new job."""
    return (yield from _act(api, job, "retry", idempotency_key))


def _act(api: Api, job: JobRef, action: str, key: str | None = None) -> Flow[JobData]:
    path = path_of("jobs", id_of(job), action)
    return read(JobData, (yield from api.post(path, idempotency_key=key)))


def delete(api: Api, /, job: JobRef) -> Flow[None]:
    """Remove a job that is over, and what it has made."""
    yield from api.delete(path_of("jobs", id_of(job)))


def checkpoints(api: Api, /, job: JobRef) -> Flow[tuple[Checkpoint, ...]]:
    """The states from which a job can go on."""
    return (yield from api.items(Checkpoint, path_of("jobs", id_of(job), "checkpoints")))


def metrics(
    api: Api, /, job: JobRef, *, since_step: int = 0, series: str | None = None
) -> Items[Metric]:
    """Iterate over a job's curves: the series train and held_out, or one of them."""
    return Items(_metrics(api, id_of(job), since_step, series))


def _metrics(api: Api, job_id: str, since_step: int, series: str | None) -> Flow[None]:
    path, since = path_of("jobs", job_id, "metrics"), since_step
    while True:
        page = yield from api.page(Metric, path, {"since_step": since, "series": series})
        for item in page.items:
            yield Emit(item)
        if page.next is None:
            return
        since = int(page.next)


def logs(
    api: Api, /, job: JobRef, *, after: int = 0, follow: bool = False, poll_seconds: float = 1
) -> Items[LogLine]:
    """Iterate over the trainer's log; with ``follow`` until the job is over."""
    path = path_of("jobs", id_of(job), "logs")
    if follow:
        return Items(follow_pages(api, LogLine, id_of(job), path, after, poll_seconds))
    return Items(all_of(api, LogLine, path, after))
