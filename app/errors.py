"""Errors on purpose, and the one place that turns any error into a problem (RFC 9457).

    ServiceError                     status, code, detail, hint, faults
    ├── MalformedBody                400  malformed_body
    ├── Unauthenticated              401  unauthenticated
    ├── CrossSite                    403  cross_site
    ├── Forbidden                    403  forbidden
    ├── NotFound                     404  not_found
    │   ├── JobNotFound                   job_not_found
    │   ├── DatasetNotFound               dataset_not_found
    │   ├── KeyNotFound                   key_not_found
    │   ├── DeliveryNotFound              delivery_not_found
    │   ├── UploadNotFound                upload_not_found
    │   ├── AdapterNotFound               adapter_not_found
    │   └── FileNotInAdapter              file_not_in_adapter
    ├── MethodNotAllowed             405  method_not_allowed
    ├── Conflict                     409
    │   ├── IllegalTransition             illegal_transition
    │   ├── DatasetInUse                  dataset_in_use
    │   ├── OffsetMismatch                offset_mismatch
    │   ├── UploadMismatch                upload_mismatch
    │   ├── AdapterNotReady               adapter_not_ready
    │   └── WebhookSecretUnreadable       webhook_secret_unreadable
    ├── TooLarge                     413  too_large
    ├── UnsupportedMediaType         415  unsupported_media_type
    ├── RangeNotSatisfiable          416  range_not_satisfiable
    ├── HostNotAllowed               421  host_not_allowed
    ├── InvalidRequest               422  invalid_request, or the code of its only fault
    │   ├── HashMismatch                  hash_mismatch
    │   └── IdempotencyKeyReused          idempotency_key_reused
    ├── TooManyRequests              429
    │   ├── RateLimited                   rate_limited
    │   └── QuotaExceeded                 quota_exceeded
    └── NotReady                     503  not_ready
        ├── DatabaseUnavailable           database_unavailable
        ├── IssuerUnavailable             issuer_unavailable
        └── StoreUnavailable              store_unavailable

What a request's shape has wrong is told by app/faults.py.
"""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil
from typing import Any, ClassVar

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import Scope

from app.faults import Fault, explain, field_pointers, is_wrong_media_type
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


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable, for programs.")
    hint: str | None = Field(None, description="What to change.")
    errors: list[Fault] = Field([], description="Everything that is wrong, where it is known.")
    instance: str
    request_id: str = Field(description="Also in the header X-Request-ID and in the log.")


class ServiceError(Exception):
    """Base of every error that this service raises on purpose."""

    status: ClassVar[int] = 500
    code: str = "internal"

    def __init__(
        self,
        detail: str,
        hint: str | None = None,
        *,
        faults: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.faults = list(faults)
        self.headers = dict(headers or {})


class MalformedBody(ServiceError):
    status = 400
    code = "malformed_body"


class Unauthenticated(ServiceError):
    status = 401
    code = "unauthenticated"

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(detail, hint, headers={"WWW-Authenticate": "Bearer"})


class CrossSite(ServiceError):
    status = 403
    code = "cross_site"


class Forbidden(ServiceError):
    status = 403
    code = "forbidden"


class NotFound(ServiceError):
    status = 404
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


class KeyNotFound(NotFound):
    code = "key_not_found"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no key {key_id!r}.", "List the keys with GET /keys.")


class DeliveryNotFound(NotFound):
    code = "delivery_not_found"

    def __init__(self, delivery_id: str) -> None:
        super().__init__(
            f"There is no delivery {delivery_id!r}.",
            "List a job's deliveries with GET /jobs/{id}/deliveries.",
        )


class UploadNotFound(NotFound):
    code = "upload_not_found"

    def __init__(self, sha256: str) -> None:
        super().__init__(
            f"No upload of {sha256} has begun here, or it was forgotten after a day.",
            f"Begin it with PUT /datasets/uploads/{sha256}.",
        )


class AdapterNotFound(NotFound):
    code = "adapter_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"There is no adapter of a job {job_id!r}.",
            "List the adapters with GET /adapters; a job has one when it has succeeded.",
        )


class FileNotInAdapter(NotFound):
    code = "file_not_in_adapter"


class MethodNotAllowed(ServiceError):
    status = 405
    code = "method_not_allowed"


class Conflict(ServiceError):
    status = 409
    code = "conflict"


class IllegalTransition(Conflict):
    code = "illegal_transition"


class DatasetInUse(Conflict):
    code = "dataset_in_use"


class OffsetMismatch(Conflict):
    """``expected`` is also in the header ``Upload-Offset``."""

    code = "offset_mismatch"

    def __init__(self, found: int, expected: int) -> None:
        super().__init__(
            f"The part begins at {found}, and {expected} bytes are here.",
            f"Go on with Upload-Offset: {expected}.",
            headers={"Upload-Offset": str(expected)},
        )


class UploadMismatch(Conflict):
    code = "upload_mismatch"


class AdapterNotReady(Conflict):
    code = "adapter_not_ready"


class WebhookSecretUnreadable(Conflict):
    code = "webhook_secret_unreadable"

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The project's webhook secret cannot be read: {reason}.",
            "Set the FLATLORA_SECRET_KEY that it was sealed with, or rotate the secret with "
            "POST /webhooks/secret.",
        )


class TooLarge(ServiceError):
    status = 413
    code = "too_large"


TOO_LARGE_HINT = (
    "Rows are uploaded with POST /datasets. FLATLORA_MAX_BODY_BYTES and "
    "FLATLORA_MAX_DATASET_BYTES set the limits."
)


def too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is too large: {limit} bytes are taken here.", TOO_LARGE_HINT)


class UnsupportedMediaType(ServiceError):
    status = 415
    code = "unsupported_media_type"


class RangeNotSatisfiable(ServiceError):
    status = 416
    code = "range_not_satisfiable"

    def __init__(self, detail: str, size: int) -> None:
        super().__init__(detail, headers={"Content-Range": f"bytes */{size}"})


class HostNotAllowed(ServiceError):
    status = 421
    code = "host_not_allowed"


class InvalidRequest(ServiceError):
    """A request whose shape is right and whose content is not."""

    status = 422
    code = "invalid_request"

    def __init__(self, detail: str, hint: str | None = None, *, faults: Sequence[Fault]) -> None:
        super().__init__(detail, hint, faults=faults)
        codes = {fault.code for fault in faults}
        if len(codes) == 1:
            self.code = codes.pop()


class HashMismatch(ServiceError):
    status = 422
    code = "hash_mismatch"


class IdempotencyKeyReused(ServiceError):
    status = 422
    code = "idempotency_key_reused"


class TooManyRequests(ServiceError):
    status = 429
    code = "too_many_requests"

    def __init__(self, detail: str, hint: str, *, retry_after: float) -> None:
        seconds = max(1, ceil(retry_after))
        super().__init__(detail, hint, headers={"Retry-After": str(seconds)})


class RateLimited(TooManyRequests):
    code = "rate_limited"


class QuotaExceeded(TooManyRequests):
    code = "quota_exceeded"


class NotReady(ServiceError):
    status = 503
    code = "not_ready"

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(detail, hint, headers={"Retry-After": "5"})


class DatabaseUnavailable(NotReady):
    code = "database_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The database does not answer.",
            "Send the request again; with the same Idempotency-Key it makes no second job.",
        )


class IssuerUnavailable(NotReady):
    code = "issuer_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The identity provider does not answer, and this token's key is not known yet.",
            "Send the request again. If that does not help, the service's log says what is wrong "
            "with FLATLORA_OIDC_ISSUER.",
        )


class StoreUnavailable(NotReady):
    code = "store_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "The artifact store does not answer.",
            "Send the request again. If that does not help, the service's log says what is wrong "
            "with FLATLORA_STORE_URL.",
        )


Responses = dict[int | str, dict[str, Any]]


def problems(*errors: type[ServiceError]) -> Responses:
    """The ``responses=`` of a route: which of these errors it gives, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    found: dict[int, list[str]] = {}
    for error in errors:
        found.setdefault(error.status, []).append(error.code)
    described: Responses = {
        status: {"description": f"{TITLES[status]}: {', '.join(codes)}", "content": content}
        for status, codes in sorted(found.items())
    }
    return {**described, "default": {"description": "Any other problem", "content": content}}


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
            allowed = ", ".join(sorted(_operations(request))).upper()
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
        headers = {**error.headers, **headers_for(status)}
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
    }
    return _AsciiResponse(problem, status, headers=error.headers, media_type=MEDIA_TYPE)
