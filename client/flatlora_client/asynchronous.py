"""The client that lets others work while it waits: ``AsyncFlatLora``."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx2

from flatlora_client.answers import JobData, Quota, Readiness, Version
from flatlora_client.api import Api
from flatlora_client.client import Settings, of_job, show_as
from flatlora_client.http import chunks_async
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


class AsyncFlatLora:
    """A flatlora service, for asyncio. All is as with ``FlatLora``, and awaited.

        async with AsyncFlatLora() as client:
            job = await client.jobs.create(base_model="…", dataset_uri="…")
            job = await job.wait()
            await job.download("adapter")
            async for event in job.events():
                print(event.message)

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
        http_client: httpx2.AsyncClient | None = None,
    ) -> None:
        settings = Settings.load(url, api_key, data_dir, timeout, max_retries, retry_seconds)
        self.url = settings.wire.url
        self._wire = settings.wire
        self._api = settings.api
        self._is_ours = http_client is None
        self._http = http_client or httpx2.AsyncClient(trust_env=settings.trusts_environment)
        self.jobs = AsyncJobs(self)
        self.datasets = AsyncDatasets(self)
        self.adapters = AsyncAdapters(self)
        self.models = AsyncModels(self)
        self.workers = AsyncWorkers(self)
        self.keys = AsyncKeys(self)
        self.audit = AsyncAudit(self)
        self.deliveries = AsyncDeliveries(self)
        self.webhooks = AsyncWebhooks(self)

    async def quota(self) -> Quota:
        """What this project may use, and what it has used."""
        return await self._run(service.quota(self._api))

    async def version(self) -> Version:
        """Which service answers, and what it can do."""
        return await self._run(service.version(self._api))

    async def ready(self) -> Readiness:
        """Whether the service can serve now; a ``ServerError`` says why not."""
        return await self._run(service.ready(self._api))

    async def close(self) -> None:
        """Close the connections."""
        if self._is_ours:
            await self._http.aclose()

    async def __aenter__(self) -> "AsyncFlatLora":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    async def _run(self, flow: Flow[T]) -> T:
        """Perform an operation's steps; its answer."""
        turns = Turns(flow)
        try:
            while step := turns.next():
                await self._take(turns, step)
        finally:
            await _close(turns)
        answer: T = turns.answer
        return answer

    async def _iterate(self, items: Items[T]) -> AsyncIterator[T]:
        """Perform an operation's steps; what it emits."""
        turns = Turns(items.flow)
        try:
            while step := turns.next():
                if isinstance(step, Emit):
                    yield step.item
                else:
                    await self._take(turns, step)
        finally:
            await _close(turns)

    async def _take(self, turns: Turns, step: Step) -> None:
        try:
            turns.give(await self._perform(step))
        except Exception as error:  # each operation knows which it can mend
            turns.fail(error)

    async def _perform(self, step: Step) -> Any:
        match step:
            case Send(request):
                return await self._send(request, stream=False)
            case Open(request, kind):
                response = await self._send(request, stream=True)
                if not response.is_success:
                    await response.aread()
                events = kind == "events"
                source = httpx2.EventSource(response) if events else response.aiter_raw()
                return Stream(response, aiter(source))
            case Next(stream):
                return await anext(stream.items, None)
            case Close(stream):
                await stream.response.aclose()
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Do(function):
                return await asyncio.to_thread(function)
        return None

    async def _send(self, request: Request, *, stream: bool) -> httpx2.Response:
        arguments = self._wire.arguments(request)
        if isinstance(request.content, Path):
            arguments["content"] = chunks_async(request.content)
        built = self._http.build_request(**arguments)
        redirects = request.follows_redirects
        return await self._http.send(built, stream=stream, follow_redirects=redirects)


async def _close(turns: Turns) -> None:
    turns.close()
    for stream in turns.streams:
        await stream.response.aclose()


class AsyncResource:
    """Something that the service has."""

    def __init__(self, client: AsyncFlatLora) -> None:
        self._client = client


def call(
    operation: Callable[Concatenate[Api, P], Flow[T]],
) -> Callable[Concatenate[AsyncResource, P], Coroutine[Any, Any, T]]:
    """The operation as a method."""

    @wraps(operation)
    async def method(self: AsyncResource, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._client._run(operation(self._client._api, *args, **kwargs))

    show_as(method, operation)
    return method


def iterate(
    operation: Callable[Concatenate[Api, P], Items[T]],
) -> Callable[Concatenate[AsyncResource, P], AsyncIterator[T]]:
    """The operation as a method that is iterated over."""

    @wraps(operation)
    def method(self: AsyncResource, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return self._client._iterate(operation(self._client._api, *args, **kwargs))

    show_as(method, operation)
    return method


def job_call(
    operation: Callable[Concatenate[Api, P], Flow[JobData]],
) -> Callable[Concatenate["AsyncJobs", P], Coroutine[Any, Any, "AsyncJob"]]:
    """The operation as a method that gives a job."""

    @wraps(operation)
    async def method(self: "AsyncJobs", /, *args: P.args, **kwargs: P.kwargs) -> "AsyncJob":
        found = await self._client._run(operation(self._client._api, *args, **kwargs))
        return AsyncJob(**vars(found), jobs=self)

    show_as(method, operation)
    return method


def job_iterate(
    operation: Callable[Concatenate[Api, P], Items[JobData]],
) -> Callable[Concatenate["AsyncJobs", P], AsyncIterator["AsyncJob"]]:
    """The operation as a method that iterates over jobs."""

    @wraps(operation)
    def method(
        self: "AsyncJobs", /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncIterator["AsyncJob"]:
        found = self._client._iterate(operation(self._client._api, *args, **kwargs))
        return (AsyncJob(**vars(job), jobs=self) async for job in found)

    show_as(method, operation)
    return method


class AsyncJobs(AsyncResource):
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
class AsyncJob(JobData):
    """A job, as it was when the service answered; its methods ask again."""

    jobs: AsyncJobs = field(repr=False, compare=False)

    refresh = of_job(AsyncJobs.get)
    wait = of_job(AsyncJobs.wait)
    cancel = of_job(AsyncJobs.cancel)
    pause = of_job(AsyncJobs.pause)
    resume = of_job(AsyncJobs.resume)
    retry = of_job(AsyncJobs.retry)
    delete = of_job(AsyncJobs.delete)
    events = of_job(AsyncJobs.events)
    metrics = of_job(AsyncJobs.metrics)
    logs = of_job(AsyncJobs.logs)
    checkpoints = of_job(AsyncJobs.checkpoints)
    download = of_job(AsyncJobs.download)
    download_tar = of_job(AsyncJobs.download_tar)


class AsyncDatasets(AsyncResource):
    """Files of rows."""

    upload = call(uploads.upload)
    get = call(service.dataset)
    list = iterate(service.datasets)
    page = call(service.dataset_page)
    delete = call(service.delete_dataset)
    upload_state = call(uploads.upload_state)
    forget_upload = call(uploads.forget_upload)


class AsyncAdapters(AsyncResource):
    """What finished jobs have made."""

    get = call(service.adapter)
    list = iterate(service.adapters)
    page = call(service.adapter_page)
    download = call(downloads.download)
    download_tar = call(downloads.download_tar)


class AsyncModels(AsyncResource):
    """What jobs may be trained on."""

    list = call(service.models)


class AsyncWorkers(AsyncResource):
    """Who trains."""

    list = call(service.workers)


class AsyncKeys(AsyncResource):
    """API keys, for admins."""

    list = call(service.keys)
    create = call(service.create_key)
    revoke = call(service.revoke_key)


class AsyncAudit(AsyncResource):
    """Who changed what, for admins."""

    list = iterate(service.audit)
    page = call(service.audit_page)


class AsyncDeliveries(AsyncResource):
    """Messages to webhooks."""

    list = call(service.deliveries)
    retry = call(service.retry_delivery)


class AsyncWebhooks(AsyncResource):
    """How webhooks are signed, and whether they arrive."""

    test = call(service.test_webhook)
    secret = call(service.webhook_secret)
    rotate_secret = call(service.rotate_webhook_secret)
