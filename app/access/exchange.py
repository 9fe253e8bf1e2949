"""What several API processes count together, in the broker's Redis.

Requests are counted in memory and told to Redis a few times a second, with what it answers kept for
the next ones. So a Redis that is slow or away delays no request and refuses none; for as long each
process goes by its own counts, and in any case two may let a quarter of a second's more through.
"""

import asyncio
import time
from collections import Counter
from contextlib import suppress

import structlog
from limits import WindowStats
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from app.access.rates import WINDOW_SECONDS, Count

log = structlog.get_logger()

EVERY_SECONDS = 0.25
AWAY_SECONDS = 5
PATIENCE_SECONDS = 2
OUTAGES = (RedisError, OSError, TimeoutError)


class Exchange:
    def __init__(self, broker_url: str) -> None:
        storage = RedisStorage(
            f"async+{broker_url}",
            implementation="redispy",
            key_prefix="flatlora:rates",
            socket_timeout=PATIENCE_SECONDS,
            socket_connect_timeout=PATIENCE_SECONDS,
        )
        self._close = storage.bridge.get_connection().aclose  # type: ignore[attr-defined] # redis'
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._untold: Counter[Count] = Counter()
        self._known: dict[Count, WindowStats] = {}
        self._is_away = False

    def add(self, count: Count, number: int) -> None:
        """Also none: then it is only asked what is left by now."""
        self._untold[count] += number

    def known(self, count: Count) -> WindowStats | None:
        """What was left when it was last asked, less what has been taken here since."""
        found = self._known.get(count)
        if found is None:
            return None
        return WindowStats(found.reset_time, found.remaining - self._untold[count])

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                await asyncio.sleep(AWAY_SECONDS if self._is_away else EVERY_SECONDS)
                await self.tell()
        finally:
            with suppress(*OUTAGES):
                await self._close()

    async def tell(self) -> None:
        """Tell what was counted here, and hear what is left."""
        self._forget()
        untold, self._untold = self._untold, Counter()
        try:
            for count, number in untold.items():
                async with asyncio.timeout(PATIENCE_SECONDS):
                    self._known[count] = await self._told(count, number)
        except OUTAGES as error:
            self._note(is_away=True, error=str(error))
            self._known.clear()
        else:
            self._note(is_away=False)

    async def _told(self, count: Count, number: int) -> WindowStats:
        names = (count.name, count.whose)
        number = min(number, count.item.amount)
        if number and not await self._limiter.hit(count.item, *names, cost=number):
            # There is not room for all of them: what room there is, they have taken.
            left = await self._limiter.get_window_stats(count.item, *names)
            if left.remaining > 0:
                await self._limiter.hit(count.item, *names, cost=left.remaining)
        return await self._limiter.get_window_stats(count.item, *names)

    def _forget(self) -> None:
        """What nobody has asked for lately: by now there may be room."""
        past = time.time() - WINDOW_SECONDS
        for count in [count for count, left in self._known.items() if left.reset_time < past]:
            del self._known[count]

    def _note(self, *, is_away: bool, error: str | None = None) -> None:
        if is_away is not self._is_away:
            log.warning("the broker's part in rate limits has changed", away=is_away, error=error)
        self._is_away = is_away
