"""Any error as an answer: a problem (RFC 9457), or under ``/v1`` what OpenAI's clients expect.

Here alone errors become answers. What a request's shape has wrong is told by app/faults.py.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from app.errors import (
    TOO_LARGE_HINT,
    InvalidRequest,
    MalformedBody,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    StoreUnavailable,
    TooLarge,
    UnsupportedMediaType,
)
from app.faults import Fault, explain, field_pointers, is_wrong_media_type
from app.jobs.states import Status
from app.objects import Outage
from app.openai_api.shape import headers_for, is_openai, openai_error, status_for

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"

# Not from http.HTTPStatus: its phrases differ between versions of Python.
TITLES = {
    400: "Bad request",
    401: "Unauthenticated",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    416: "Range not satisfiable",
    421: "Misdirected request",
    422: "Invalid request",
    429: "Too many requests",
    500: "Internal error",
    503: "Not ready",
}

EXAMPLE: dict[str, Any] = {
    "type": "about:blank",
    "title": "Conflict",
    "status": 409,
    "detail": "The job is succeeded and cannot be cancelled.",
    "code": "illegal_transition",
    "hint": "Only a job that is not over can be cancelled.",
    "errors": [],
    "instance": "/jobs/job_019ac0ffee00700080000000000000a1/cancel",
    "request_id": "6f0c1f0f5c8f4a3d9a52c8e0b1d7a6e4",
    "job_status": "succeeded",
}


class Problem(BaseModel):
    """An error (RFC 9457). A member that is not known here is to be ignored."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable, for programs.")
    hint: str | None = Field(None, description="What to change.")
    errors: list[Fault] = Field([], description="Everything that is wrong, where it is known.")
    instance: str
    request_id: str = Field(description="Also in the header X-Request-ID and in the log.")
    job_status: Status | None = Field(
        None, description="Only where a job's status is in the way: what it is."
    )


Responses = dict[int | str, dict[str, Any]]


def problems(*errors: type[ServiceError], faults: Sequence[str] = ()) -> Responses:
    """The ``responses=`` of a route: which of these errors it gives, for the OpenAPI document.

    What any route may give is added by app/openapi.py. ``faults``: codes that an
    ``InvalidRequest`` has from what is wrong.
    """
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    described: Responses = {
        status: {**failure(status, codes), "content": content}
        for status, codes in codes_of(errors, faults).items()
    }
    return {**described, "default": {"description": "Any other problem", "content": content}}


def codes_of(errors: Iterable[type[ServiceError]], faults: Sequence[str]) -> dict[int, list[str]]:
    """By their statuses."""
    found: dict[int, list[str]] = {}
    for error in errors:
        found.setdefault(error.status, []).append(error.code)
    if faults:
        found.setdefault(InvalidRequest.status, []).extend(faults)
    return dict(sorted(found.items()))


def failure(status: int, codes: Sequence[str]) -> dict[str, Any]:
    """What the document says of an error: its codes in words, and for programs."""
    return {"description": f"{TITLES[status]}: {', '.join(codes)}", "x-codes": list(codes)}


def install_error_handlers(app: FastAPI) -> None:
    """For all but the errors that nobody foresaw: those are caught outside, by RequestLog."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Outage, _outage)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return respond(request.scope, error)


async def _outage(request: Request, error: Exception) -> JSONResponse:
    log.warning("the store does not answer", error=str(error))
    return respond(request.scope, StoreUnavailable())


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return respond(request.scope, _named(request, error))


def _named(request: Request, error: RequestValidationError) -> ServiceError:
    details = error.errors()
    if details[0]["type"] == "json_invalid":
        reason, place = details[0]["ctx"]["error"], details[0]["loc"][-1]
        return MalformedBody(
            f"The body is not JSON: {reason} at character {place}.",
            "Send one JSON object with Content-Type: application/json.",
        )
    if is_wrong_media_type(details):
        given = request.headers.get("content-type", "none")
        return UnsupportedMediaType(
            f"The body's Content-Type is {given!r}; expected application/json.",
            "Send one JSON object with Content-Type: application/json.",
        )
    asks = any(detail["loc"][0] == "query" for detail in details)
    parameters = _parameters(request) if asks else []
    faults = explain(details, error.body, parameters, _body_fields(request))
    count = "One thing is" if len(faults) == 1 else f"{len(faults)} things are"
    invalid = InvalidRequest(
        f"{count} not as expected.",
        "Correct what errors[] lists; /docs shows every field.",
        faults=faults,
    )
    invalid.code = InvalidRequest.code  # pydantic's names for faults are no promise of ours
    return invalid


def _parameters(request: Request) -> list[str]:
    """The names of the query parameters that the route knows."""
    operation = _operations(request).get(request.method.lower(), {})
    found = operation.get("parameters", [])
    return [parameter["name"] for parameter in found if parameter["in"] == "query"]


def _body_fields(request: Request) -> Mapping[str, str]:
    """Where the fields of the body stand that the route expects."""
    field = getattr(request.scope.get("route"), "body_field", None)
    expected = field.field_info.annotation if field else None
    is_group = isinstance(expected, type) and issubclass(expected, BaseModel)
    return field_pointers(expected) if is_group else {}


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path
    named: ServiceError
    match error.status_code:
        case 404:
            named = NotFound(f"There is no {path!r} here.", "The routes are at /docs.")
        case 405:
            allowed = ", ".join(sorted(_methods(request)))
            named = MethodNotAllowed(
                f"{path!r} does not answer to {request.method}.", f"It answers to {allowed}."
            )
            named.headers["Allow"] = allowed
        case 413:
            named = TooLarge(str(error.detail), TOO_LARGE_HINT)
        case 400:
            named = MalformedBody(
                f"The body cannot be read: {error.detail.rstrip('.')}.",
                "/docs shows what is expected.",
            )
        case _:
            named = ServiceError(str(error.detail))
    for name, value in (error.headers or {}).items():
        named.headers.setdefault(name, value)
    return respond(request.scope, named, status=error.status_code)


def _methods(request: Request) -> set[str]:
    """All that this path answers to: FastAPI knows a route for each."""
    found: set[str] = set()
    for route in iter_route_contexts(request.app.routes):
        if route.methods and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods
    return found


def _operations(request: Request) -> dict[str, Any]:
    """What the OpenAPI document says of this route, by method."""
    path = getattr(request.scope.get("route"), "path_format", request.url.path)
    found: dict[str, Any] = request.app.openapi()["paths"].get(path, {})
    return found


class _AsciiResponse(JSONResponse):
    """An error quotes what it was given, and that may be text that UTF-8 cannot carry."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def respond(scope: Scope, error: ServiceError, *, status: int | None = None) -> JSONResponse:
    status = status or error.status
    if is_openai(scope):
        status = status_for(status)
        headers = {**error.headers, **headers_for(status, error.code)}
        return _AsciiResponse(openai_error(error, status), status, headers=headers)
    problem = {
        "type": "about:blank",
        "title": TITLES.get(status) or HTTPStatus(status).phrase,
        "status": status,
        "detail": error.detail,
        "code": error.code,
        "hint": error.hint,
        "errors": [fault.model_dump() for fault in error.faults],
        "instance": scope["path"],
        "request_id": scope.get("state", {}).get("request_id", ""),
        **error.members,
    }
    return _AsciiResponse(problem, status, headers=error.headers, media_type=MEDIA_TYPE)
