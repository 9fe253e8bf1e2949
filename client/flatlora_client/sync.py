"""The client that waits: ``FlatLora``."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx2

from flatlora_client.answers import JobData, Quota, Readiness, Version
from flatlora_client.api import Api
from flatlora_client.client import Settings, of_job, show_as
from flatlora_client.http import chunks
from flatlora_client.operations import downloads, following, jobs, service, uploads, waiting
from flatlora_client.steps import (
    Close,
    Do,
    Emit,
    Flow,
    Items,
    Next,
    Open,
    Request,
    Send,
    Sleep,
    Step,
    Stream,
    Turns,
)

P = ParamSpec("P")
T = TypeVar("T")


class FlatLora:
    """A flatlora service.

    What is not given comes from ``FLATLORA_URL`` and ``FLATLORA_API_KEY``, else from the service
    that runs on the data folder here (``FLATLORA_DATA_DIR``).

        with FlatLora() as client:
            job = client.jobs.create(base_model="…", dataset_uri="…")
            job = job.wait(progress=lambda job: print(job.phase, job.step))
            job.download("adapter")

    It may be used by several threads at once.

    Args:
        url: where the service is.
        api_key: what is sent as ``Authorization: Bearer``.
        timeout: seconds that an answer may take.
        max_retries: how often a request is sent again that was not answered, or with 429, 502,
            503 or 504.
        retry_seconds: how long after its first failure.
        data_dir: the service's folder, if it is not the one that the environment names.
        http_client: one of your own, with your proxies or certificates; you close it.

    Raises:
        ConfigurationError: the URL is none.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60,
        max_retries: int = 5,
        retry_seconds: float = 120,
        data_dir: Path | None = None,
        http_client: httpx2.Client | None = None,
    ) -> None:
        settings = Settings.load(url, api_key, data_dir, timeout, max_retries, retry_seconds)
        self.url = settings.wire.url
        self._wire = settings.wire
        self._api = settings.api
        self._is_ours = http_client is None
        self._http = http_client or httpx2.Client(trust_env=settings.trusts_environment)
        self.jobs = Jobs(self)
        self.datasets = Datasets(self)
        self.adapters = Adapters(self)
        self.models = Models(self)
        self.workers = Workers(self)
        self.keys = Keys(self)
        self.audit = Audit(self)
        self.deliveries = Deliveries(self)
        self.webhooks = Webhooks(self)

    def quota(self) -> Quota:
        """What this project may use, and what it has used."""
        return self._run(service.quota(self._api))

    def version(self) -> Version:
        """Which service answers, and what it can do."""
        return self._run(service.version(self._api))

    def ready(self) -> Readiness:
        """Whether the service can serve now; a ``ServerError`` says why not."""
        return self._run(service.ready(self._api))

    def close(self) -> None:
        """Close the connections."""
        if self._is_ours:
            self._http.close()

    def __enter__(self) -> "FlatLora":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _run(self, flow: Flow[T]) -> T:
        """Perform an operation's steps; its answer."""
        turns = Turns(flow)
        try:
            while step := turns.next():
                self._take(turns, step)
        finally:
            _close(turns)
        answer: T = turns.answer
        return answer

    def _iterate(self, items: Items[T]) -> Iterator[T]:
        """Perform an operation's steps; what it emits."""
        turns = Turns(items.flow)
        try:
            while step := turns.next():
                if isinstance(step, Emit):
                    yield step.item
                else:
                    self._take(turns, step)
        finally:
            _close(turns)

    def _take(self, turns: Turns, step: Step) -> None:
        try:
            turns.give(self._perform(step))
        except Exception as error:  # each operation knows which it can mend
            turns.fail(error)

    def _perform(self, step: Step) -> Any:
        match step:
            case Send(request):
                return self._send(request, stream=False)
            case Open(request, kind):
                response = self._send(request, stream=True)
                if not response.is_success:
                    response.read()
                events = kind == "events"
                source = httpx2.EventSource(response) if events else response.iter_raw()
                return Stream(response, iter(source))
            case Next(stream):
                return next(stream.items, None)
            case Close(stream):
                stream.response.close()
            case Sleep(seconds):
                time.sleep(seconds)
            case Do(function):
                return function()
        return None

    def _send(self, request: Request, *, stream: bool) -> httpx2.Response:
        arguments = self._wire.arguments(request)
        if isinstance(request.content, Path):
            arguments["content"] = chunks(request.content)
        built = self._http.build_request(**arguments)
        redirects = request.follows_redirects
        return self._http.send(built, stream=stream, follow_redirects=redirects)


def _close(turns: Turns) -> None:
    turns.close()
    for stream in turns.streams:
        stream.response.close()


class Resource:
    """Something that the service has."""

    def __init__(self, client: FlatLora) -> None:
        self._client = client


def call(
    operation: Callable[Concatenate[Api, P], Flow[T]],
) -> Callable[Concatenate[Resource, P], T]:
    """The operation as a method."""

    @wraps(operation)
    def method(self: Resource, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._client._run(operation(self._client._api, *args, **kwargs))

    show_as(method, operation)
    return method


def iterate(
    operation: Callable[Concatenate[Api, P], Items[T]],
) -> Callable[Concatenate[Resource, P], Iterator[T]]:
    """The operation as a method that is iterated over."""

    @wraps(operation)
    def method(self: Resource, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._client._iterate(operation(self._client._api, *args, **kwargs))

    show_as(method, operation)
    return method


def job_call(
    operation: Callable[Concatenate[Api, P], Flow[JobData]],
) -> Callable[Concatenate["Jobs", P], "Job"]:
    """The operation as a method that gives a job."""

    @wraps(operation)
    def method(self: "Jobs", /, *args: P.args, **kwargs: P.kwargs) -> "Job":
        found = self._client._run(operation(self._client._api, *args, **kwargs))
        return Job(**vars(found), jobs=self)

    show_as(method, operation)
    return method


def job_iterate(
    operation: Callable[Concatenate[Api, P], Items[JobData]],
) -> Callable[Concatenate["Jobs", P], Iterator["Job"]]:
    """The operation as a method that iterates over jobs."""

    @wraps(operation)
    def method(self: "Jobs", /, *args: P.args, **kwargs: P.kwargs) -> Iterator["Job"]:
        found = self._client._iterate(operation(self._client._api, *args, **kwargs))
        return (Job(**vars(job), jobs=self) for job in found)

    show_as(method, operation)
    return method


class Jobs(Resource):
    """Submit jobs, follow them, fetch what they made."""

    create = job_call(jobs.create)
    get = job_call(jobs.get)
    list = job_iterate(jobs.items)
    page = call(jobs.page)
    wait = job_call(waiting.wait)
    cancel = job_call(jobs.cancel)
    pause = job_call(jobs.pause)
    resume = job_call(jobs.resume)
    retry = job_call(jobs.retry)
    delete = call(jobs.delete)
    events = iterate(following.events)
    metrics = iterate(jobs.metrics)
    logs = iterate(jobs.logs)
    checkpoints = call(jobs.checkpoints)
    download = call(downloads.download)
    download_tar = call(downloads.download_tar)


@dataclass(frozen=True, kw_only=True, repr=False)
class Job(JobData):
    """A job, as it was when the service answered; its methods ask again."""

    jobs: Jobs = field(repr=False, compare=False)

    refresh = of_job(Jobs.get)
    wait = of_job(Jobs.wait)
    cancel = of_job(Jobs.cancel)
    pause = of_job(Jobs.pause)
    resume = of_job(Jobs.resume)
    retry = of_job(Jobs.retry)
    delete = of_job(Jobs.delete)
    events = of_job(Jobs.events)
    metrics = of_job(Jobs.metrics)
    logs = of_job(Jobs.logs)
    checkpoints = of_job(Jobs.checkpoints)
    download = of_job(Jobs.download)
    download_tar = of_job(Jobs.download_tar)


class Datasets(Resource):
    """Files of rows."""

    upload = call(uploads.upload)
    get = call(service.dataset)
    list = iterate(service.datasets)
    page = call(service.dataset_page)
    delete = call(service.delete_dataset)
    upload_state = call(uploads.upload_state)
    forget_upload = call(uploads.forget_upload)


class Adapters(Resource):
    """What finished jobs have made."""

    get = call(service.adapter)
    list = iterate(service.adapters)
    page = call(service.adapter_page)
    download = call(downloads.download)
    download_tar = call(downloads.download_tar)


class Models(Resource):
    """What jobs may be trained on."""

    list = call(service.models)


class Workers(Resource):
    """Who trains."""

    list = call(service.workers)


class Keys(Resource):
    """API keys, for admins."""

    list = call(service.keys)
    create = call(service.create_key)
    revoke = call(service.revoke_key)


class Audit(Resource):
    """Who changed what, for admins."""

    list = iterate(service.audit)
    page = call(service.audit_page)


class Deliveries(Resource):
    """Messages to webhooks."""

    list = call(service.deliveries)
    retry = call(service.retry_delivery)


class Webhooks(Resource):
    """How webhooks are signed, and whether they arrive."""

    test = call(service.test_webhook)
    secret = call(service.webhook_secret)
    rotate_secret = call(service.rotate_webhook_secret)
