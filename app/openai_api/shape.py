"""The shape of an error under ``/v1``: OpenAI's. Used in app/problems.py.

Imports nothing of this service: app/problems.py imports this.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, Field
from starlette.types import Scope

PREFIX = "/v1"

STATUS = {422: 400}
"""OpenAI has no other status for a request that is understood and wrong."""
CODES = {"unauthenticated": "invalid_api_key"}
"""The one code that programs written for OpenAI look at; the others are ours."""


class ErrorDetail(BaseModel):
    message: str = Field(description="What was found, what was expected, and what to do.")
    type: str = Field(description="`invalid_request_error`, `rate_limit_error` or `server_error`.")
    param: str | None = Field(description="The parameter at fault, such as `training_file`.")
    code: str | None = Field(description="Stable, for programs: the `code` of the native API.")


class ErrorAnswer(BaseModel):
    """An error as OpenAI's clients expect it."""

    error: ErrorDetail


class _Fault(Protocol):
    pointer: str
    detail: str


class _Error(Protocol):
    detail: str
    hint: str | None
    code: str

    @property
    def faults(self) -> Sequence[_Fault]: ...


def is_openai(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == PREFIX or path.startswith(PREFIX + "/")


def status_for(status: int) -> int:
    return STATUS.get(status, status)


def code_for(code: str) -> str:
    return CODES.get(code, code)


def headers_for(status: int, code: str) -> Mapping[str, str]:
    """OpenAI's clients send again what is answered with 409 or 429.

    A conflict would be answered as before. A quota is no matter of seconds; and what is sent again
    after a refusal must not be taken for a retry of an earlier, equal request (decision 0015).
    """
    is_final = status == 409 or code == "quota_exceeded"
    return {"x-should-retry": "false"} if is_final else {}


def openai_error(error: _Error, status: int) -> dict[str, Any]:
    faults = list(error.faults)
    if faults and error.code == "invalid_request":  # its detail says no more than how many
        told = [_named(fault) for fault in faults]
    else:
        told = [error.detail, error.hint or ""]
    return {
        "error": {
            "message": " ".join(told).strip(),
            "type": _type(status),
            "param": param_of(faults[0].pointer) or None if faults else None,
            "code": code_for(error.code),
        }
    }


def param_of(pointer: str) -> str:
    """``/method/supervised/hyperparameters`` as OpenAI writes it; a plain name stays itself."""
    if not pointer.startswith("/"):
        return pointer
    parts = pointer[1:].split("/")
    return ".".join(part.replace("~1", "/").replace("~0", "~") for part in parts)


def _named(fault: _Fault) -> str:
    param = param_of(fault.pointer)
    return f"{param}: {fault.detail}" if param else fault.detail


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
