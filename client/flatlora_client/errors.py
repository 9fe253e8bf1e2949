"""Everything that this package raises on purpose.

    FlatLoraError
    ├── APIError             the service refused: status, code, detail, hint, errors, request_id
    │   ├── Unauthenticated  401
    │   ├── Forbidden        403
    │   ├── NotFound         404
    │   ├── Conflict         409, with job_status where that is in the way
    │   ├── InvalidRequest   400, 413, 415, 422
    │   ├── RateLimited      429, with retry_after
    │   └── ServerError      500 and above
    ├── ConfigurationError   the URL is none
    ├── ConnectionFailed     no answer came, after all retries
    ├── HashMismatch         what was downloaded is not what the service has published
    ├── JobFailed            the job that was waited for failed: job, reason, message, hint
    │   └── JobCancelled     it was cancelled
    ├── UnexpectedAnswer     an answer that no flatlora service gives
    └── WaitTimeout          the job was not over in time: job, as it was last seen

Errors of files, such as ``FileNotFoundError`` and a full disk, are Python's own.
"""

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any

import httpx2

if TYPE_CHECKING:
    from flatlora_client.answers import JobData


class FlatLoraError(Exception):
    """Base of every error of this package."""


class APIError(FlatLoraError):
    """The service answered with a problem (RFC 9457)."""

    def __init__(
        self, status: int, problem: Mapping[str, Any], *, retry_after: float | None = None
    ) -> None:
        self.status = status
        self.problem = dict(problem)
        """The whole of it; empty if the answer was none, as from a proxy."""
        self.detail = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        self.code: str | None = problem.get("code")
        """Stable, for programs: docs/errors.md of the service explains each."""
        self.hint: str | None = problem.get("hint")
        self.errors: list[dict[str, Any]] = list(problem.get("errors") or [])
        """What is wrong in which field: ``pointer``, ``detail``, ``code``."""
        self.request_id: str | None = problem.get("request_id")
        self.retry_after = retry_after
        """Seconds that the service asks to be left alone for."""
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        places = [f"{error.get('pointer')}: {error.get('detail')}" for error in self.errors]
        said = [self.detail, *places, f"Hint: {self.hint}" if self.hint else ""]
        return "\n".join(line for line in said if line)


class Unauthenticated(APIError):
    """No key was sent, or not one that is known here."""


class Forbidden(APIError):
    """The key's role does not allow it."""


class NotFound(APIError):
    """There is no such thing, or it belongs to another project."""


class Conflict(APIError):
    """It cannot be done as things stand."""

    @property
    def job_status(self) -> str | None:
        """The job's status, where that is in the way."""
        found: str | None = self.problem.get("job_status")
        return found


class InvalidRequest(APIError):
    """The request is not as the service expects it; ``errors`` says where."""


class RateLimited(APIError):
    """Too many requests, or a quota is used up."""


class ServerError(APIError):
    """The service, or a proxy before it, is ill."""


class ConfigurationError(FlatLoraError):
    """What the client was given, or found in its environment, cannot be used."""


class ConnectionFailed(FlatLoraError):
    """The service was not reached, or went away while it answered."""

    def __init__(self, url: str, trouble: str) -> None:
        self.url = url
        self.trouble = trouble
        super().__init__(f"no answer from {url}: {trouble}")


class UnexpectedAnswer(FlatLoraError):
    """What answered is no flatlora service, or one that this client is too old for."""


class HashMismatch(FlatLoraError):
    """The bytes that came are not those that the service has published."""

    def __init__(self, name: str, *, expected: str, found: str) -> None:
        self.name = name
        self.expected = expected
        self.found = found
        super().__init__(
            f"{name}: found sha256 {found}, expected {expected}. It was removed: download it again."
        )


class JobFailed(FlatLoraError):
    """The job is over, and has no adapter."""

    def __init__(self, job: "JobData") -> None:
        self.job = job
        failure = job.failure
        self.reason = failure.reason if failure else job.status
        self.message = failure.message if failure else f"The job is {job.status}."
        self.hint = failure.hint if failure else None
        hint = f" Hint: {self.hint}" if self.hint else ""
        super().__init__(f"{job.id}: {self.reason}: {self.message}{hint}")


class JobCancelled(JobFailed):
    """Somebody cancelled the job."""


class WaitTimeout(FlatLoraError, TimeoutError):
    """The job goes on; only the waiting is over."""

    def __init__(self, job: "JobData", seconds: float) -> None:
        self.job = job
        super().__init__(f"{job.id} is {job.status}, not over, after {seconds:g} s")


KINDS: dict[int, type[APIError]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: InvalidRequest,
    415: InvalidRequest,
    422: InvalidRequest,
    429: RateLimited,
}


def error_of(response: httpx2.Response) -> APIError:
    """The error that a refusal is raised as; its body has been read."""
    status = response.status_code
    kind = KINDS.get(status, ServerError if status >= 500 else APIError)
    problem = json_object(response) or {}
    return kind(status, problem, retry_after=retry_after(response.headers))


def json_object(response: httpx2.Response) -> dict[str, Any] | None:
    """The body, if it is a JSON object."""
    try:
        found = response.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, which the header says as such or as a date (RFC 9110, 10.2.3)."""
    said = headers.get("retry-after", "").strip()
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time())
    except ValueError:
        return None
