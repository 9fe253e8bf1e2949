"""Waiting for the end of a job."""

import time
from collections.abc import Callable
from typing import TypedDict, Unpack

from flatlora_client.answers import JobData
from flatlora_client.api import Api, path_of
from flatlora_client.errors import FlatLoraError, JobCancelled, JobFailed, WaitTimeout
from flatlora_client.reading import read
from flatlora_client.retries import Retries
from flatlora_client.steps import Flow, Request, Sleep

HOLD_SECONDS = 30
"""How long the service is asked to keep a question for which it has no news."""
ANSWER_SECONDS = 10
LONGEST_POLL_SECONDS = 5


class WaitOptions(TypedDict, total=False):
    """How to wait."""

    timeout: float | None
    """Seconds after which ``WaitTimeout`` is raised; the job goes on."""
    progress: Callable[[JobData], object] | None
    """Is given the job each time that it has changed, and first as it is."""
    raise_on_failure: bool
    """Whether a failed or cancelled job is raised as ``JobFailed``; it is, by default."""
    poll_seconds: float
    """The shortest time between two questions: 0.5."""
    patience: float
    """Seconds that a service may be away or ill without ending the waiting: 300."""
    on_outage: Callable[[FlatLoraError], object] | None
    """Is told when such an outage begins."""


def wait(api: Api, /, job: str | JobData, **options: Unpack[WaitOptions]) -> Flow[JobData]:
    """Follow a job to its end, and return it.

    Raises:
        JobFailed: it failed; ``JobCancelled``, a ``JobFailed`` too: it was cancelled.
        WaitTimeout: it was not over in time.
        ConnectionFailed, ServerError: the service was away for longer than ``patience``.
    """
    job_id = job if isinstance(job, str) else job.id
    seen = yield from _Watch(api, job_id, options).until_over()
    if options.get("raise_on_failure", True):
        if seen.status == "failed":
            raise JobFailed(seen)
        if seen.status == "cancelled":
            raise JobCancelled(seen)
    return seen


class _Watch:
    def __init__(self, api: Api, job_id: str, options: WaitOptions) -> None:
        self._api = api
        self._job_id = job_id
        self._progress = options.get("progress")
        self._on_outage = options.get("on_outage")
        self._poll_seconds = options.get("poll_seconds", 0.5)
        self._patience = options.get("patience", 300)
        timeout = options.get("timeout")
        self._timeout = float("inf") if timeout is None else timeout
        self._began_at = time.monotonic()
        self._etag: str | None = None
        self._is_ill = False

    def until_over(self) -> Flow[JobData]:
        """The first answer comes at once; then the service keeps the question until there is news.

        One that knows no ``?wait=`` answers at once each time, and is asked less often while there
        is none.
        """
        job, pause = (yield from self._ask(hold=0)), self._poll_seconds
        assert job is not None  # nothing was known before
        self._tell(job)
        while not job.is_over:
            if self._left() <= 0:
                raise WaitTimeout(job, self._timeout)
            asked_at = time.monotonic()
            news = yield from self._ask(hold=min(HOLD_SECONDS, self._left()))
            if news:
                job, pause = news, self._poll_seconds
                self._tell(job)
            if not job.is_over:
                rest = pause - (time.monotonic() - asked_at)
                yield Sleep(max(0, min(rest, self._left())))
                pause = min(LONGEST_POLL_SECONDS, 1.5 * pause)
        return job

    def _left(self) -> float:
        return self._timeout - (time.monotonic() - self._began_at)

    def _tell(self, job: JobData) -> None:
        if self._progress:
            self._progress(job)

    def _ask(self, hold: float) -> Flow[JobData | None]:
        """The job; None if it has not changed."""
        request = Request(
            "GET",
            path_of("jobs", self._job_id),
            params={"wait": int(hold)} if hold >= 1 else {},
            headers={"If-None-Match": self._etag} if self._etag else {},
            answer_seconds=hold + ANSWER_SECONDS,
        )
        response = yield from self._api.send(
            request, retries=self._retries(), on_failure=self._note_outage
        )
        self._is_ill = False
        if response.status_code == 304:
            return None
        self._etag = response.headers.get("etag")
        return read(JobData, self._api.object(self._api.url, response))

    def _retries(self) -> Retries:
        return Retries(
            most=float("inf"),
            seconds=max(0, min(self._patience, self._left())),
            longest_pause=5,
            is_patient=True,
        )

    def _note_outage(self, failure: FlatLoraError) -> None:
        if self._on_outage and not self._is_ill:
            self._on_outage(failure)
        self._is_ill = True
