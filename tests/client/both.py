"""Both kinds of client as one, so that each test holds for both."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

from flatlora_client import AsyncFlatLora, AsyncJob, FlatLora
from flatlora_client.asynchronous import AsyncResource
from flatlora_client.retries import Retries


class Connect(Protocol):
    """A client of the service at a URL, which does not pause for long between retries."""

    def __call__(self, url: str, **options: Any) -> FlatLora: ...


class Blocking:
    """An ``AsyncFlatLora``, or what it gives, as its synchronous twin."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target = target
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return self._settled(getattr(self._target, name))

    def __getitem__(self, name: str) -> Any:
        return self._target[name]

    def _settled(self, value: Any) -> Any:
        if isinstance(value, AsyncResource | AsyncJob):
            return Blocking(value, self._loop)
        if isinstance(value, Coroutine):
            return self._settled(self._loop.run_until_complete(value))
        if isinstance(value, AsyncIterator):
            return self._iterated(value)
        return self._called(value) if callable(value) else value

    def _called(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [arg._target if isinstance(arg, Blocking) else arg for arg in args]
            return self._settled(function(*given, **kwargs))

        return call

    def _iterated(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        try:
            while True:
                try:
                    item = self._loop.run_until_complete(anext(items))
                except StopAsyncIteration:
                    return
                yield self._settled(item)
        finally:
            self._loop.run_until_complete(cast(Any, items).aclose())


QUICK = Retries(first_pause=0.01, longest_pause=0.05)


@contextmanager
def connecting(kind: str) -> Iterator[Connect]:
    if kind == "async":
        with asyncio.Runner() as runner:
            made: list[AsyncFlatLora] = []

            def connect_async(url: str, **options: Any) -> FlatLora:
                made.append(_quick(AsyncFlatLora(url, **options)))
                return cast(FlatLora, Blocking(made[-1], runner.get_loop()))

            yield connect_async
            for client in made:
                runner.run(client.close())
    else:
        opened: list[FlatLora] = []

        def connect(url: str, **options: Any) -> FlatLora:
            opened.append(_quick(FlatLora(url, **options)))
            return opened[-1]

        yield connect
        for each in opened:
            each.close()


def _quick(client: Any) -> Any:
    kept = client._api.retries
    quick = replace(QUICK, most=kept.most, seconds=kept.seconds)
    client._api = replace(client._api, retries=quick)
    return client
