"""Which failures are worth another try, and when."""

import random
from dataclasses import dataclass

import httpx2

from flatlora_client.steps import Request

BUSY = {429, 502, 503, 504}
NOT_TAKEN = {429}
"""Statuses that say that nothing was done."""
NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True)
class Retries:
    """How often, and for how long after its first failure, a request is sent again."""

    most: float = 5
    seconds: float = 120
    first_pause: float = 0.5
    longest_pause: float = 8
    is_patient: bool = False
    """Whether an ill service is waited for like a busy one, and asked once more at the very end."""

    def concern(self, request: Request, response: httpx2.Response) -> bool:
        """Whether this answer may be another one later."""
        status = response.status_code
        if not request.is_repeatable:
            return status in NOT_TAKEN
        return status in BUSY or (self.is_patient and status >= 500)

    def forgive(self, request: Request, error: httpx2.RequestError) -> bool:
        """Whether sending it again may help, and can do no harm."""
        if not isinstance(error, httpx2.TransportError | httpx2.DecodingError):
            return False
        if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
            return False
        return request.is_repeatable or isinstance(error, NEVER_SENT)

    def pause(self, failures: int, asked_for: float | None) -> float:
        """Doubled each time, with chance in it, so that many clients do not come back at once.

        A service that asks for a longer pause gets it.
        """
        longest = min(self.longest_pause, self.first_pause * 2.0 ** min(failures - 1, 30))
        return max(asked_for or 0, random.uniform(longest / 2, longest))  # noqa: S311 - no secret
