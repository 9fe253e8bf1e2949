"""How many requests a minute a key and a project may send.

Each process counts for itself, at once and in memory; where there are several, they tell each other
through the broker (app/access/exchange.py). No request waits for that.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Protocol

from limits import RateLimitItem, RateLimitItemPerMinute, WindowStats
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter

from app.access.principal import Principal
from app.errors import RateLimited
from app.quotas.limits import Limits
from app.settings import Settings

WINDOW_SECONDS = 60
NETWORK_BITS = 64  # of an IPv6 address: the rest is its owner's to choose


@dataclass(frozen=True)
class Count:
    """One that a request is counted in.

    Attributes:
        name: As the headers say it: ``key`` or ``project``.
        whose: The key or the project.
        item: How many, of the library.
    """

    name: str
    whose: str
    item: RateLimitItem


class Elsewhere(Protocol):
    """What other processes count."""

    def add(self, count: Count, number: int) -> None: ...

    def known(self, count: Count) -> WindowStats | None: ...


class Rates:
    def __init__(self, settings: Settings, elsewhere: Elsewhere | None = None) -> None:
        self._of_a_key = settings.key_requests_per_minute
        self._elsewhere = elsewhere
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take(self, principal: Principal, limits: Limits) -> dict[str, str]:
        """Count a request; the headers for its answer.

        Raises:
            RateLimited: With those headers, if it is one too many.
        """
        if principal.is_operator:
            return {}
        counts = list(self._counts(principal, limits))
        told: list[tuple[Count, WindowStats]] = []
        for count in counts:
            is_taken, left = self._take(count)
            told.append((count, left))
            if not is_taken:
                raise _refusal(count, left, headers(told))
        return headers(told)

    def _counts(self, principal: Principal, limits: Limits) -> Iterator[Count]:
        if self._of_a_key:
            whose = principal.key_id or principal.actor
            yield Count("key", whose, per_minute(self._of_a_key))
        if limits.requests_per_minute is not None:
            yield Count("project", principal.project, per_minute(limits.requests_per_minute))

    def _take(self, count: Count) -> tuple[bool, WindowStats]:
        elsewhere = self._elsewhere.known(count) if self._elsewhere else None
        is_taken = elsewhere is None or elsewhere.remaining > 0
        if is_taken:
            is_taken = self._limiter.hit(count.item, count.name, count.whose)
        if self._elsewhere:
            self._elsewhere.add(count, int(is_taken))
        here = self._limiter.get_window_stats(count.item, count.name, count.whose)
        fewest = here
        if elsewhere and elsewhere.remaining < here.remaining:
            fewest = elsewhere
        return is_taken, fewest


class Guesses:
    """Wrong keys from one address: after some of them no other one is looked at for a while."""

    def __init__(self, per_minute_: int) -> None:
        self._item = per_minute(per_minute_) if per_minute_ else None
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def check(self, address: str) -> None:
        """Raises ``RateLimited``."""
        if self._item and not self._limiter.test(self._item, network(address)):
            until = self._limiter.get_window_stats(self._item, network(address)).reset_time
            raise RateLimited(
                f"Too many wrong keys came from this address: {self._item.amount} a minute are "
                "looked at.",
                "Correct the key, and send the request later.",
                retry_after=until - time.time(),
            )

    def count(self, address: str) -> None:
        if self._item:
            self._limiter.hit(self._item, network(address))


@lru_cache(maxsize=1024)
def per_minute(amount: int) -> RateLimitItem:
    return RateLimitItemPerMinute(amount)


def network(address: str) -> str:
    """An address, or for IPv6 the network that its owner has."""
    try:
        found = ip_address(address)
    except ValueError:
        return address  # of a socket that is no network's
    if isinstance(found, IPv6Address) and found.ipv4_mapped is None:
        return str(int(found) >> (128 - NETWORK_BITS))
    return str(found)


def headers(told: list[tuple[Count, WindowStats]]) -> dict[str, str]:
    """``RateLimit`` and ``RateLimit-Policy``, as draft-ietf-httpapi-ratelimit-headers has them."""
    if not told:
        return {}
    policies = (f'"{count.name}";q={count.item.amount};w={WINDOW_SECONDS}' for count, _ in told)
    left = (
        f'"{count.name}";r={max(0, left.remaining)};t={_seconds_until(left.reset_time)}'
        for count, left in told
    )
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(left)}


def _refusal(count: Count, left: WindowStats, told: dict[str, str]) -> RateLimited:
    refusal = RateLimited(
        f"The {count.name} has sent its {count.item.amount} requests of this minute.",
        "Send the request again after Retry-After. To follow a job, wait for a change in place of "
        "asking often: /docs says how.",
        retry_after=left.reset_time - time.time(),
    )
    refusal.headers |= told
    return refusal


def _seconds_until(moment: float) -> int:
    return max(0, round(moment - time.time()))
