"""Whether the broker answers. Jobs are accepted without it too, so this only ever informs."""

from typing import Literal

import structlog

from app.probe import Probe

log = structlog.get_logger()

BrokerState = Literal["ok", "unreachable"]


class BrokerHealth:
    """As one app sees it; asked for at most two seconds, and not more often than that."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._probe = Probe(self._ping)
        self._state: BrokerState = "ok"

    async def state(self) -> BrokerState | None:
        """None where there is no broker: embedded."""
        if not self._url:
            return None
        state: BrokerState = "ok" if await self._probe.answer() else "unreachable"
        if state != self._state:
            log.warning("the broker's state has changed", found=state)
        self._state = state
        return state

    async def _ping(self) -> bool:
        from redis.asyncio import Redis  # here: an embedded service has none
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        try:
            async with Redis.from_url(self._url, retry=Retry(NoBackoff(), 0)) as redis:
                await redis.ping()
        except (RedisError, OSError, ValueError) as error:
            log.debug("the broker does not answer", error=str(error))
            return False
        return True
