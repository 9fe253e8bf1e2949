"""What is wrong with the shape of a request, in words: what was found, what was expected."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, Field


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    pointer: str = Field(
        description="JSON pointer into the body, or the name of a parameter or header."
    )
    detail: str
    code: str


def is_wrong_media_type(details: Sequence[Any]) -> bool:
    """FastAPI hands on a body that is not declared to be JSON as bytes."""
    return any(
        tuple(detail["loc"]) == ("body",) and isinstance(detail.get("input"), bytes)
        for detail in details
    )


@lru_cache
def field_pointers(group: type[BaseModel], above: str = "") -> Mapping[str, str]:
    """Where each field of a body stands, by its name; the outer one of two with the same name."""
    found: dict[str, str] = {}
    for name, field in group.model_fields.items():
        found[name] = f"{above}/{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found = {**field_pointers(field.annotation, f"{above}/{name}"), **found}
    return found


def explain(
    details: Sequence[Any], body: Any, parameters: Sequence[str], fields: Mapping[str, str]
) -> list[Fault]:
    """Every one of pydantic's findings.

    Args:
        details: The findings.
        body: The request's body, as far as it could be read.
        parameters: Query parameters that the route knows.
        fields: Fields of the body that it knows (``field_pointers``): one of them may be meant.
    """
    return [_explain(detail, body, parameters, fields) for detail in details]


def _explain(
    error: Mapping[str, Any], body: Any, parameters: Sequence[str], fields: Mapping[str, str]
) -> Fault:
    where, *path = error["loc"]
    kind, name = error["type"], str(error["loc"][-1])
    if where == "body":
        pointer = _pointer(path, body, is_missing=kind == "missing")
    else:
        pointer = str(path[0]) if path else str(where)
    match kind:
        case "extra_forbidden" if where == "body":
            detail = f"There is no field {name!r}.{_field_like(name, fields)}"
        case "extra_forbidden":
            detail = f"There is no parameter {name!r}. Known are {', '.join(parameters)}."
        case "missing":
            detail = "This field is required." if path else "A body is required."
        case "model_attributes_type" if not path:
            detail = f"The body should be one JSON object; found {_shown(error['input'])}."
        case _:
            detail = _sentence(error)
    return Fault(pointer=pointer, detail=detail, code=kind)


def _sentence(error: Mapping[str, Any]) -> str:
    expected = str(error["msg"]).removeprefix("Value error, ").removesuffix(".")
    found = error.get("input")
    if error["type"] == "value_error" and isinstance(found, dict):
        return f"{expected}."  # about a group of fields: each of them is in the request
    return f"{expected}; found {_shown(found)}."


def _pointer(path: Sequence[str | int], body: Any, *, is_missing: bool) -> str:
    """RFC 6901, without the parts that name an alternative of a union and not a place."""
    kept: list[str | int] = []
    for depth, part in enumerate(path, 1):
        try:
            body = body[part]
        except (KeyError, IndexError, TypeError):
            if not (is_missing and depth == len(path)):
                continue
        kept.append(part)
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in kept)


def _field_like(name: str, fields: Mapping[str, str]) -> str:
    """A field of that name elsewhere, or one that is spelt almost so."""
    near = get_close_matches(name, fields, n=1)
    return f" Did you mean {fields[near[0]]}?" if near else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
