"""What the document shows as an example, or says is the default, is what its schema allows."""

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from tests.contracts.openapi import document

Json = dict[str, Any]
DOCUMENT = document()
ROOT = "urn:flatlora"
REGISTRY: Registry[Any] = Registry().with_resource(ROOT, DRAFT202012.create_resource(DOCUMENT))
BODIES = ("JobCreate", "KeyCreate", "WebhookTest", "FineTuningJobCreate")


NAMED = ("/properties", "/responses", "/schemas", "/patternProperties")
"""Where a key is somebody's name, and no word of OpenAPI."""


def shown(node: Any, at: str = "#") -> Iterator[tuple[str, str, Any]]:
    """Each value that is shown: where, the place of its schema, and the value."""
    if isinstance(node, list):
        for index, part in enumerate(node):
            yield from shown(part, f"{at}/{index}")
    elif isinstance(node, dict):
        values = {} if at.endswith(NAMED) else dict(_values(node))
        schema = f"{at}/schema" if isinstance(node.get("schema"), dict) else at
        for name, value in values.items():
            yield f"{at}/{name}", schema, value
        for name in node.keys() - {path.partition("/")[0] for path in values}:
            yield from shown(node[name], f"{at}/{name.replace('~', '~0').replace('/', '~1')}")


def _values(node: Json) -> Iterator[tuple[str, Any]]:
    """A schema has a list of ``examples``, a parameter and a media type one with names."""
    for name in ("example", "default"):
        if name in node:
            yield name, node[name]
    match node.get("examples"):
        case list() as values:
            yield from ((f"examples/{index}", value) for index, value in enumerate(values))
        case dict() as named:
            yield from ((f"examples/{name}", one["value"]) for name, one in named.items())


SHOWN = sorted(shown(DOCUMENT), key=lambda found: found[0])


def wrong(schema: str, value: Any) -> list[str]:
    validator = Draft202012Validator({"$ref": f"{ROOT}{schema}"}, registry=REGISTRY)
    return [error.message for error in validator.iter_errors(value)]


@pytest.mark.parametrize(
    ("schema", "value"), [found[1:] for found in SHOWN], ids=[found[0] for found in SHOWN]
)
def test_what_is_shown_is_allowed(schema: str, value: Any) -> None:
    assert wrong(schema, value) == []


@pytest.mark.parametrize("body", BODIES)
def test_the_bodies_that_start_something_have_an_example(body: str) -> None:
    assert DOCUMENT["components"]["schemas"][body]["examples"]


@pytest.mark.parametrize("answer", ["EventPage", "Problem"])
def test_answers_that_programs_read_have_an_example(answer: str) -> None:
    assert DOCUMENT["components"]["schemas"][answer]["examples"]


def test_an_example_that_is_none_would_be_found() -> None:
    assert wrong("#/components/schemas/JobCreate", {"base_model": "org/name", "rank": 0})
