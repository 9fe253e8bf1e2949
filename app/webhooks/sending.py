"""One attempt: signed, sent to an address that is allowed, and what came of it."""

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from standardwebhooks import Webhook

from app.net.client import Answer, AsyncPublicClient
from app.net.errors import AddressNotAllowed, NetError, PortNotAllowed, SchemeNotAllowed, TimedOut
from app.webhooks.secrets import signed

TIMEOUT_SECONDS = 15
EXCERPT_BYTES = 2048
GONE = 410
ASKS_TO_WAIT = {429, 503}

Kind = Literal["delivered", "refused", "gone", "timed_out", "unreachable", "not_allowed", "error"]
"""``refused``: a status other than 2xx. ``error``: ours."""
NOT_ALLOWED = (AddressNotAllowed, PortNotAllowed, SchemeNotAllowed)


@dataclass(frozen=True)
class Outcome:
    """What the log keeps of an attempt, and what is made of it.

    Attributes:
        retry_after: Seconds that the receiver has asked for.
    """

    kind: Kind
    at: datetime
    seconds: float
    status: int | None = None
    error: str | None = None
    excerpt: str | None = None
    retry_after: float = 0

    @property
    def is_delivered(self) -> bool:
        return self.kind == "delivered"

    @property
    def is_final(self) -> bool:
        """The receiver wants no more of it."""
        return self.kind == "gone"

    def as_logged(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(timespec="milliseconds"),
            "seconds": round(self.seconds, 3),
            "status": self.status,
            "error": self.error,
            "excerpt": self.excerpt,
        }


def make_client(rules: Any, look_ups: Executor | None = None) -> AsyncPublicClient:
    return AsyncPublicClient(
        rules, seconds=TIMEOUT_SECONDS, max_bytes=EXCERPT_BYTES, look_ups=look_ups
    )


async def attempt(
    client: AsyncPublicClient, signers: Sequence[Webhook], url: str, message_id: str, body: str
) -> Outcome:
    """Send it once. Whatever the receiver does is an outcome, not an error."""
    at, started = datetime.now(UTC), time.monotonic()
    headers = {"Content-Type": "application/json", **signed(signers, message_id, body, at)}
    try:
        answer = await client.post(url, body.encode(), headers)
    except NetError as error:
        told = f"{error.detail} {error.hint}" if error.hint else error.detail
        return Outcome(_kind_of(error), at, time.monotonic() - started, error=told)
    return Outcome(
        _kind(answer.status),
        at,
        time.monotonic() - started,
        status=answer.status,
        error="It redirects, and no redirect is followed." if _redirects(answer.status) else None,
        excerpt=_text(answer.body),
        retry_after=_retry_after(answer),
    )


def _kind_of(error: NetError) -> Kind:
    if isinstance(error, NOT_ALLOWED):
        return "not_allowed"
    return "timed_out" if isinstance(error, TimedOut) else "unreachable"


def _kind(status: int) -> Kind:
    if 200 <= status < 300:
        return "delivered"
    return "gone" if status == GONE else "refused"


def _redirects(status: int) -> bool:
    return 300 <= status < 400


def _text(body: bytes) -> str | None:
    """As text that a database keeps: Postgres has no NUL."""
    return body.decode(errors="replace").replace("\0", "�") or None


def _retry_after(answer: Answer) -> float:
    """Only as seconds: dates are hardly ever sent, and clocks differ."""
    given = answer.headers.get("retry-after", "")
    is_number = given.isascii() and given.isdecimal() and len(given) < 10
    return float(given) if answer.status in ASKS_TO_WAIT and is_number else 0
