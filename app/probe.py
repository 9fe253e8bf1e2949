"""A question to something that may be away: one at a time, answered in bounded time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")

FRESH_SECONDS = 2  # for so long one answer serves all who ask
PATIENCE_SECONDS = 2


class Probe(Generic[Answer]):
    def __init__(self, ask: Callable[[], Awaitable[Answer]]) -> None:
        self._ask = ask
        self._task: asyncio.Future[Answer] | None = None
        self._answer: Answer | None = None
        self._answered_at = float("-inf")

    async def answer(self) -> Answer | None:
        """None if it has not come in time."""
        if time.monotonic() - self._answered_at < FRESH_SECONDS:
            return self._answer
        task = self._task
        if task is None or task.done():
            task = self._task = asyncio.ensure_future(self._ask())
        # What is late goes on, as a driver that is interrupted may leave a connection in pieces;
        # nobody else is sent after it meanwhile.
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_SECONDS)
        self._answer = task.result() if done else None
        self._answered_at = time.monotonic()
        return self._answer
