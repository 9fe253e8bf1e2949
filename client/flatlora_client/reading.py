"""From the JSON of an answer to its dataclass."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from datetime import datetime
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from flatlora_client.errors import UnexpectedAnswer

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the service said. ``raw`` is all of it, also what this client has no name for."""

    raw: Json

    def __getitem__(self, name: str) -> Any:
        """A field by its name on the wire: ``job["of_a_newer_service"]``."""
        return self.raw[name]

    def __repr__(self) -> str:
        """With the fields that have a name here; what is unknown may be long."""
        shown = ", ".join(
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name != "raw" and field.repr
        )
        return f"{type(self).__name__}({shown})"


A = TypeVar("A", bound=Answer)


def read(kind: type[A], found: object) -> A:
    """An answer of this kind.

    Raises:
        UnexpectedAnswer: it is no JSON object, or lacks a field that every service gives.
    """
    if not isinstance(found, Mapping):
        said = type(found).__name__
        raise UnexpectedAnswer(f"found {said}, expected a JSON object: {kind.__name__}")
    given: Json = {"raw": dict(found)}
    plain: type = kind  # mypy takes a type[A] for unhashable
    for field, hint in _fields(plain):
        if field.name in found:
            given[field.name] = _value(hint, found[field.name])
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UnexpectedAnswer(f"{kind.__name__} has no {field.name!r} in the service's answer")
    return kind(**given)


@cache
def _fields(kind: type) -> list[tuple["Field[Any]", Any]]:
    hints = get_type_hints(kind)
    return [(field, hints[field.name]) for field in fields(kind) if field.name != "raw"]


def _value(hint: Any, found: Any) -> Any:
    """What is not of the expected type is kept as it is: a newer service may say more."""
    origin = get_origin(hint)
    if origin in {Union, types.UnionType}:
        some = [part for part in get_args(hint) if part is not type(None)]
        return _value(some[0], found) if found is not None and len(some) == 1 else found
    if origin is tuple and isinstance(found, list):
        return tuple(_value(get_args(hint)[0], item) for item in found)
    if hint is datetime and isinstance(found, str):
        return _moment(found)
    if isinstance(hint, type) and issubclass(hint, Answer) and isinstance(found, Mapping):
        return read(hint, found)
    return found


def _moment(found: str) -> datetime:
    try:
        return datetime.fromisoformat(found)
    except ValueError:
        raise UnexpectedAnswer(f"found {found!r}, expected an RFC 3339 time") from None
