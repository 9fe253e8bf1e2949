"""The OpenAPI document: what FastAPI gathers, and what holds for many routes alike.

A route says with ``problems()`` what is wrong with it alone. What any route may answer is added
here, once.
"""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from app.errors import (
    CrossSite,
    DatabaseUnavailable,
    Forbidden,
    HostNotAllowed,
    IssuerUnavailable,
    MalformedBody,
    RateLimited,
    ServiceError,
    TooLarge,
    UnsupportedMediaType,
)
from app.faults import Fault
from app.headers import Json, sent, told
from app.openai_api.shape import PREFIX, code_for, status_for
from app.problems import MEDIA_TYPE, Problem, failure

ANY = (HostNotAllowed, ServiceError)
WITH_KEY = (Forbidden, RateLimited, DatabaseUnavailable, IssuerUnavailable)
"""Of routes that ask who is there. 403: a role, ``Flatlora-Project``, or a token of no project."""
WRITING = (CrossSite, TooLarge)
WITH_BODY = (MalformedBody, UnsupportedMediaType)
READ_HERE = {"application/json", "multipart/form-data"}
"""Bodies that are looked into while they are received."""

OF_ERRORS = {
    "401": "WWW-Authenticate", "416": "Content-Range", "429": "Retry-After", "503": "Retry-After",
}  # fmt: skip
EVERYWHERE = ("X-Request-ID",)
COUNTED = ("RateLimit", "RateLimit-Policy")
"""Of what is answered well, and of 429. Other errors may have them too."""


def describe(app: FastAPI) -> None:
    """Let the document hold what the routes do not say themselves."""
    gathered = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(gathered())
        return gathered()

    app.openapi = whole  # type: ignore[method-assign] # FastAPI's documented way


def _complete(document: Json) -> None:
    components = document["components"]
    components["schemas"].update(_schemas())
    components["headers"] = told(*EVERYWHERE, maybe=COUNTED)
    for path, item in document["paths"].items():
        for method, operation in item.items():
            _add_errors(operation, method, is_openai=path.startswith(f"{PREFIX}/"))
            _add_headers(operation)


def _schemas() -> Json:
    _, found = models_json_schema(
        [(Problem, "serialization"), (Fault, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    schemas: Json = found["$defs"]
    return schemas


def _add_errors(operation: Json, method: str, *, is_openai: bool) -> None:
    responses: Json = operation["responses"]
    for error in _errors(operation, method):
        status, code = error.status, error.code
        if is_openai:
            status, code = status_for(status), code_for(code)
        known = responses.get(str(status), {"content": _content(is_openai)})
        codes = known.get("x-codes", [])
        if code not in codes:
            responses[str(status)] = known | failure(status, [*codes, code])
    operation["responses"] = dict(sorted(responses.items()))


def _errors(operation: Json, method: str) -> Iterable[type[ServiceError]]:
    yield from ANY
    if "security" in operation:
        yield from WITH_KEY
    if method != "get":
        yield from WRITING
    if READ_HERE & operation.get("requestBody", {}).get("content", {}).keys():
        yield from WITH_BODY


def _content(is_openai: bool) -> Json:
    name, media_type = ("ErrorAnswer", "application/json") if is_openai else ("Problem", MEDIA_TYPE)
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _add_headers(operation: Json) -> None:
    asks = "security" in operation
    names = ["Flatlora-Project", "X-Request-ID"] if asks else ["X-Request-ID"]
    operation["parameters"] = [*operation.get("parameters", []), *sent(*names)]
    for status, response in operation["responses"].items():
        known = response.setdefault("headers", {})
        if status in OF_ERRORS:
            known.update(told(OF_ERRORS[status]))
        is_counted = asks and (status.startswith("2") or status == "429")
        for name in EVERYWHERE + (COUNTED if is_counted else ()):
            known[name] = {"$ref": f"#/components/headers/{name}"}
