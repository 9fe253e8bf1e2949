"""Sending requests until they are answered, and reading what was answered."""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2

from flatlora_client.answers import Page
from flatlora_client.errors import (
    APIError,
    ConnectionFailed,
    FlatLoraError,
    UnexpectedAnswer,
    error_of,
    json_object,
)
from flatlora_client.reading import Answer, Json, read
from flatlora_client.retries import Retries
from flatlora_client.steps import Emit, Flow, Items, Next, Open, Request, Send, Sleep, Stream

A = TypeVar("A", bound=Answer)

Trouble = Callable[[FlatLoraError], None]


@dataclass(frozen=True)
class Api:
    """The service, for operations."""

    url: str
    retries: Retries

    def send(
        self,
        request: Request,
        *,
        retries: Retries | None = None,
        on_failure: Trouble | None = None,
    ) -> Flow[httpx2.Response]:
        """The response to a request that was not refused.

        Args:
            request: what to send.
            retries: how often, if not as often as usual.
            on_failure: is told of each failure after which the request is sent again.
        """
        response: httpx2.Response = yield from self._until_answered(
            Send(request), retries or self.retries, on_failure
        )
        return response

    def open(self, request: Request) -> Flow[Stream]:
        """The stream of bytes that a request is answered with."""
        stream: Stream = yield from self._until_answered(Open(request, "bytes"), self.retries)
        return stream

    def open_events(self, request: Request) -> Flow[Stream]:
        """The stream of server-sent events that a request is answered with."""
        stream: Stream = yield from self._until_answered(Open(request, "events"), self.retries)
        return stream

    def _until_answered(
        self, step: Send | Open, retries: Retries, on_failure: Trouble | None = None
    ) -> Flow[Any]:
        failures, deadline = 0, float("inf")
        while True:
            answered, failure, may_repeat = yield from self._try(step, retries)
            if failure is None:
                return answered
            failures += 1
            now = time.monotonic()
            deadline = min(deadline, now + retries.seconds)
            left = deadline - now
            asked_for = failure.retry_after if isinstance(failure, APIError) else None
            pause = retries.pause(failures, asked_for)
            if retries.is_patient and left > 0:
                pause = min(pause, left)
            if not may_repeat or failures > retries.most or pause > left:
                raise failure
            if on_failure:
                on_failure(failure)
            yield Sleep(pause)

    def _try(
        self, step: Send | Open, retries: Retries
    ) -> Flow[tuple[Any, FlatLoraError | None, bool]]:
        """What one attempt gave, or its failure, and whether that may be another one later."""
        try:
            answered = yield step
        except httpx2.RequestError as error:
            trouble = str(error) or type(error).__name__
            return None, self.unreached(trouble), retries.forgive(step.request, error)
        response = answered.response if isinstance(answered, Stream) else answered
        if response.is_success or response.status_code == 304:
            return answered, None, False
        return None, error_of(response), retries.concern(step.request, response)

    def unreached(self, trouble: str) -> ConnectionFailed:
        """The error for a service that does not answer."""
        return ConnectionFailed(self.url, trouble)

    def json(self, request: Request) -> Flow[Json]:
        """The JSON object that a request is answered with."""
        return self.object(self.url, (yield from self.send(request)))

    @staticmethod
    def object(url: str, response: httpx2.Response) -> Json:
        """The JSON object in a response."""
        found = json_object(response)
        if found is None:
            line = f"HTTP {response.status_code} {response.reason_phrase}"
            raise UnexpectedAnswer(
                f"no answer from {url}: {line} without JSON, which is no answer of flatlora"
            )
        return found

    def get(self, kind: type[A], path: str, **params: Any) -> Flow[A]:
        """One thing of the service's."""
        return read(kind, (yield from self.json(Request("GET", path, given(params)))))

    def items(self, kind: type[A], path: str) -> Flow[tuple[A, ...]]:
        """The whole of a list that is not long, from all of its pages."""
        found: list[A] = []
        after = None
        while True:
            page = yield from self.page(kind, path, {"after": after})
            found += page.items
            if page.next is None or page.next == after:
                return tuple(found)
            after = page.next

    def page(self, kind: type[A], path: str, params: Mapping[str, Any]) -> Flow[Page[A]]:
        """A part of a list that has pages."""
        found = yield from self.json(Request("GET", path, given(params)))
        return Page(read_items(kind, found), found.get("next"), found)

    def pages(
        self, kind: type[A], path: str, params: Mapping[str, Any], *, cursor: str = "after"
    ) -> Items[A]:
        """All of a list that has pages, fetched as it is iterated over."""
        return Items(self._pages(kind, path, params, cursor))

    def _pages(
        self, kind: type[A], path: str, params: Mapping[str, Any], cursor: str
    ) -> Flow[None]:
        place = None
        while True:
            page = yield from self.page(kind, path, {**params, cursor: place})
            for item in page.items:
                yield Emit(item)
            if page.next is None or page.next == place:
                return
            place = page.next

    def post(
        self,
        path: str,
        body: Any = None,
        *,
        idempotency_key: str | None = None,
        is_repeatable: bool = True,
    ) -> Flow[Json]:
        """Have something made or done; sent again, it is the same wish."""
        headers = {"Idempotency-Key": idempotency_key or new_key()}
        request = Request("POST", path, json=body, headers=headers, is_repeatable=is_repeatable)
        return (yield from self.json(request))

    def delete(self, path: str) -> Flow[None]:
        """Remove something. One that a lost answer has removed is removed."""
        lost: list[FlatLoraError] = []
        try:
            yield from self.send(Request("DELETE", path), on_failure=lost.append)
        except APIError as error:
            if error.status != 404 or not lost:
                raise


def new_key() -> str:
    """For one call and its retries."""
    return uuid.uuid4().hex


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters that say something."""
    return {name: value for name, value in params.items() if value is not None}


def read_items(kind: type[A], found: Json) -> tuple[A, ...]:
    """The items of a page."""
    items = found.get("items")
    if not isinstance(items, list):
        raise UnexpectedAnswer(f"found no list of items, expected {kind.__name__}s")
    return tuple(read(kind, item) for item in items)


def next_item(stream: Stream) -> Flow[Any]:
    """The next of a stream; None after the last."""
    return (yield Next(stream))


def path_of(*parts: str) -> str:
    """Each part is one, whatever letters it has."""
    return "/" + "/".join(quote(part, safe="") for part in parts)
