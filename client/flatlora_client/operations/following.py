"""Numbered items that come while a job runs: its events and its log."""

import json
import time
from typing import Any, TypeVar

import httpx2

from flatlora_client.answers import OVER, Event, JobData, LogLine
from flatlora_client.api import Api, next_item, path_of
from flatlora_client.errors import UnexpectedAnswer
from flatlora_client.reading import Json, read
from flatlora_client.steps import Close, Emit, Flow, Items, Request, Sleep, Stream

N = TypeVar("N", Event, LogLine)

SILENCE_SECONDS = 45
"""The service says something every 15 s."""
NO_CONTENT = 204
STEADY_SECONDS = 60
"""A stream that has held for so long was no failure."""


def sequence(api: Api, kind: type[N], path: str, after: int) -> Flow[int]:
    """Emit what is there already. Returns the number of the last."""
    while True:
        page = yield from api.page(kind, path, {"after": after})
        if not page.items:
            return after
        for item in page.items:
            yield Emit(item)
        after = page.items[-1].seq
        if page.next is None:
            return after


def all_of(api: Api, kind: type[N], path: str, after: int) -> Flow[None]:
    """Emit what is there already."""
    yield from sequence(api, kind, path, after)


def follow_pages(
    api: Api, kind: type[N], job_id: str, path: str, after: int, poll_seconds: float
) -> Flow[None]:
    """Emit what is there, and what comes, until the job is over."""
    while True:
        # Asked before the last look: nothing is written after a job is over.
        is_over = yield from _is_over(api, job_id)
        seen = yield from sequence(api, kind, path, after)
        if is_over:
            return
        after = seen
        yield Sleep(poll_seconds)


def _is_over(api: Api, job_id: str) -> Flow[bool]:
    job = yield from api.json(Request("GET", path_of("jobs", job_id)))
    return job.get("status") in OVER


def events(
    api: Api,
    /,
    job: str | JobData,
    *,
    after: int = 0,
    follow: bool = False,
    poll_seconds: float = 1,
) -> Items[Event]:
    """Iterate over what happened to a job; with ``follow`` also as it happens, to its end.

    They are streamed, and the stream is taken up again after the last that came when it breaks.
    A service that does not stream is asked every ``poll_seconds``.
    """
    job_id = job if isinstance(job, str) else job.id
    path = path_of("jobs", job_id, "events")
    if follow:
        return Items(_Feed(api, job_id, path, after, poll_seconds).follow())
    return Items(all_of(api, Event, path, after))


class _Feed:
    """The stream of a job's events, and the number of the last that came."""

    def __init__(self, api: Api, job_id: str, path: str, after: int, poll_seconds: float) -> None:
        self._api = api
        self._job_id = job_id
        self._path = path
        self._seen = after
        self._poll_seconds = poll_seconds
        self._pause: float | None = None  # what the service asks for between two streams
        self._is_complete = False

    def follow(self) -> Flow[None]:
        failures = 0
        while True:
            stream = yield from self._api.open_events(self._request())
            if stream.response.status_code == NO_CONTENT:  # the job is over, and all was told
                return
            if not _is_stream(stream):
                yield Close(stream)
                yield from self._by_pages()
                return
            seen, opened_at = self._seen, time.monotonic()
            trouble = yield from self._read(stream)
            if self._is_complete:
                return
            # One that ends in order, without news, may be that of a job which is over.
            if trouble is None and self._seen == seen and (yield from self._last_look()):
                return
            steady = time.monotonic() - opened_at > STEADY_SECONDS
            failures = 1 if steady or self._seen > seen else failures + 1
            if failures > self._api.retries.most:
                raise self._api.unreached(trouble or "the stream of events ends at once")
            yield Sleep(self._api.retries.pause(failures, self._pause))

    def _request(self) -> Request:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if self._seen:
            headers["Last-Event-ID"] = str(self._seen)
        return Request(
            "GET",
            self._path,
            params={"after": self._seen},
            headers=headers,
            answer_seconds=SILENCE_SECONDS,
        )

    def _read(self, stream: Stream) -> Flow[str | None]:
        """Emit what the stream has. Returns what ended it, if that was a failure."""
        try:
            while (sent := (yield from next_item(stream))) is not None:
                if sent.retry is not None:
                    self._pause = sent.retry / 1000
                if sent.data and sent.event != "progress":  # which is of the job, and no event
                    yield from self._take(read(Event, _parsed(sent.data)))
                if self._is_complete:
                    break
        except httpx2.TransportError as error:
            return str(error) or type(error).__name__
        yield Close(stream)
        return None

    def _take(self, event: Event) -> Flow[None]:
        if event.seq > self._seen:
            self._seen = event.seq
            self._is_complete = event.is_last
            yield Emit(event)

    def _last_look(self) -> Flow[bool]:
        is_over = yield from _is_over(self._api, self._job_id)
        if is_over:
            yield from sequence(self._api, Event, self._path, self._seen)
        return is_over

    def _by_pages(self) -> Flow[None]:
        yield from follow_pages(
            self._api, Event, self._job_id, self._path, self._seen, self._poll_seconds
        )


def _is_stream(stream: Stream) -> bool:
    return bool(stream.response.headers.get("content-type", "").startswith("text/event-stream"))


def _parsed(data: str) -> Json:
    try:
        found: Any = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UnexpectedAnswer(f"found {data[:80]!r}, expected an event as a JSON object")
    return found
