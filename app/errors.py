"""Errors on purpose, and the one place that turns any error into a problem (RFC 9457).

ServiceError                     status, code, detail, hint, faults
├── Unauthenticated              401  unauthenticated
├── NotFound                     404  not_found
│   ├── JobNotFound                   job_not_found
│   ├── DatasetNotFound               dataset_not_found
│   └── FileNotInAdapter              file_not_in_adapter
├── Conflict                     409
│   ├── IllegalTransition             illegal_transition
│   └── AdapterNotReady               adapter_not_ready
├── TooLarge                     413  too_large
├── RangeNotSatisfiable          416  range_not_satisfiable
├── InvalidRequest               422  invalid_request
│   └── IdempotencyKeyReused          idempotency_key_reused
└── NotReady                     503  not_ready
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from http import HTTPStatus
from typing import Any, ClassVar

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    pointer: str = Field(description="JSON pointer into the body, or the name of a parameter.")
    detail: str
    code: str


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable, for programs.")
    hint: str | None = Field(None, description="What to change.")
    errors: list[Fault] = []
    instance: str
    request_id: str


class ServiceError(Exception):
    """Base of every error that this service raises on purpose."""

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    code: ClassVar[str] = "internal"
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, detail: str, hint: str | None = None, *, faults: Sequence[Fault] = ()
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.faults = list(faults)


class Unauthenticated(ServiceError):
    status = HTTPStatus.UNAUTHORIZED
    code = "unauthenticated"
    headers = {"WWW-Authenticate": "Bearer"}


class NotFound(ServiceError):
    status = HTTPStatus.NOT_FOUND
    code = "not_found"


class JobNotFound(NotFound):
    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id!r}.", "List the jobs with GET /jobs.")


class DatasetNotFound(NotFound):
    code = "dataset_not_found"

    def __init__(self, dataset_id: str) -> None:
        super().__init__(
            f"There is no dataset {dataset_id!r}.", "List the datasets with GET /datasets."
        )


class FileNotInAdapter(NotFound):
    code = "file_not_in_adapter"


class Conflict(ServiceError):
    status = HTTPStatus.CONFLICT
    code = "conflict"


class IllegalTransition(Conflict):
    code = "illegal_transition"


class AdapterNotReady(Conflict):
    code = "adapter_not_ready"


class TooLarge(ServiceError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    code = "too_large"


class RangeNotSatisfiable(ServiceError):
    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
    code = "range_not_satisfiable"


class InvalidRequest(ServiceError):
    """A request whose shape is right and whose content is not."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    code = "invalid_request"


class IdempotencyKeyReused(InvalidRequest):
    code = "idempotency_key_reused"


class NotReady(ServiceError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    code = "not_ready"
    headers = {"Retry-After": "5"}


def problems(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The ``responses=`` of a route: which of these errors it gives, for the OpenAPI document."""
    found: dict[int | str, list[str]] = {}
    listed: list[type[ServiceError]] = [Unauthenticated, *errors]
    for error in listed:
        found.setdefault(int(error.status), []).append(error.code)
    return {
        status: {
            "description": f"{HTTPStatus(int(status)).phrase}: {', '.join(codes)}",
            "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
        }
        for status, codes in found.items()
    }


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unknown_error)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return respond(
        request,
        error.status,
        error.code,
        error.detail,
        hint=error.hint,
        faults=error.faults,
        headers=error.headers,
    )


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details = error.errors()
    if any(detail["type"] == "json_invalid" for detail in details):
        reason = details[0].get("ctx", {}).get("error", "")
        return respond(
            request,
            HTTPStatus.BAD_REQUEST,
            "malformed_json",
            f"The body is not JSON: {reason}.",
            hint="Send one JSON object with Content-Type: application/json.",
        )
    faults = [explain_fault(detail) for detail in details]
    count = "One field is" if len(faults) == 1 else f"{len(faults)} fields are"
    return respond(
        request,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "invalid_request",
        f"{count} not as expected.",
        hint="Correct what errors[] lists; /docs shows every field.",
        faults=faults,
    )


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail, hint = str(error.detail), None
    match status:
        case HTTPStatus.NOT_FOUND:
            detail, hint = f"There is no {request.url.path!r} here.", "The routes are at /docs."
        case HTTPStatus.METHOD_NOT_ALLOWED:
            detail = f"{request.url.path!r} does not answer to {request.method}."
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            detail, hint = "The body is too large.", "Upload rows with POST /datasets."
    code = status.phrase.lower().replace(" ", "_").replace("request_entity_", "")
    return respond(request, status, code, detail, hint=hint, headers=error.headers or {})


async def _unknown_error(request: Request, error: Exception) -> JSONResponse:
    """Logged in full, told in general: an error that we do not know may hold anything."""
    log.error("unhandled error", path=request.url.path, exc_info=error)
    return respond(
        request,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal",
        "The service met an error of its own.",
        hint="Its log has the details under this request_id.",
    )


def respond(
    request: Request,
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    hint: str | None = None,
    faults: Sequence[Fault] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    problem = Problem(
        title=status.phrase,
        status=status,
        detail=detail,
        code=code,
        hint=hint,
        errors=list(faults),
        instance=request.url.path,
        request_id=getattr(request.state, "request_id", ""),
    )
    return JSONResponse(
        problem.model_dump(mode="json"), status, headers=dict(headers or {}), media_type=MEDIA_TYPE
    )


def explain_fault(error: Mapping[str, Any]) -> Fault:
    """One of pydantic's findings, with what was found beside what was expected."""
    place, *path = error["loc"]
    pointer = "".join(f"/{part}" for part in path) if place == "body" else str(error["loc"][-1])
    detail = str(error["msg"]).removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            detail = f"There is no field {path[-1] if path else place!r}." + _closest(error)
        case "missing":
            detail = "This field is required."
        case _ if not isinstance(error.get("input"), dict | list):
            detail = f"{detail}; found {_shown(error.get('input'))}."
    return Fault(pointer=pointer, detail=detail, code=error["type"])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _closest(error: Mapping[str, Any]) -> str:
    from app.jobs.schemas import FIELD_NAMES  # the schemas know nothing of errors

    near = get_close_matches(str(error["loc"][-1]), FIELD_NAMES, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
