"""No client of the last release is broken unseen; and each rule of that comparison."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.compatibility import Json, breaking_changes
from tests.contracts.openapi import document

RELEASED = Path(__file__).parent / "openapi-released.json"
"""The document of the last release. The commit that releases replaces it: a copy of openapi.json,
with ``MEANT`` emptied."""

MEANT = {
    # It tells which contract it is, and clients compare it: text leaves room for "1.1".
    "GET /version: the answer 200/api may be string now.",
}
"""Changes that break and are meant, each with its reason; CHANGELOG.md tells them too."""


def test_no_client_of_the_last_release_is_broken() -> None:
    found = set(breaking_changes(json.loads(RELEASED.read_text()), document()))
    assert found - MEANT == set(), (
        "These changes break clients. Keep what was there beside what is new; if the break is "
        "meant, write it into MEANT with its reason, and into CHANGELOG.md."
    )
    assert MEANT - found == set(), "these are no changes any more"


PROBLEM: Json = {
    "description": "it failed",
    "content": {"application/problem+json": {"schema": {"$ref": "#/schemas/Problem"}}},
}
BASE: Json = {
    "paths": {
        "/jobs/{job_id}": {
            "post": {
                "parameters": [
                    {"name": "job_id", "in": "path", "required": True, "schema": {}},
                    {"name": "limit", "in": "query", "schema": {"type": "integer", "maximum": 9}},
                    {"name": "kind", "in": "query", "schema": {"enum": ["a", "b"]}},
                ],
                "requestBody": {
                    "content": {"application/json": {"schema": {"$ref": "#/schemas/Body"}}}
                },
                "responses": {
                    "200": {
                        "content": {"application/json": {"schema": {"$ref": "#/schemas/Answer"}}}
                    },
                    "202": {
                        "description": "later",
                        "headers": {"Location": {"required": True, "schema": {"type": "string"}}},
                    },
                    "404": {**PROBLEM, "x-codes": ["job_not_found"]},
                    "409": {
                        **PROBLEM,
                        "headers": {"Upload-Offset": {"schema": {"type": "integer"}}},
                    },
                    "default": PROBLEM,
                },
            }
        }
    },
    "schemas": {
        "Body": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "mode": {"type": "string", "enum": ["slow", "fast"]},
                "tags": {"type": "array", "items": {"type": "string"}},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
        "Problem": {
            "type": "object",
            "required": ["code"],
            "properties": {"code": {"type": "string"}, "hint": {"type": ["string", "null"]}},
        },
        "Answer": {
            "type": "object",
            "required": ["id", "state"],
            "properties": {
                "id": {"type": "string"},
                "state": {"enum": ["open", "over"]},
                "loss": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                "within": {"anyOf": [{"$ref": "#/schemas/Answer"}, {"type": "null"}]},
            },
        },
    },
}


def operation(document: Json) -> Json:
    found: Json = document["paths"]["/jobs/{job_id}"]["post"]
    return found


def asked(document: Json) -> Json:
    found: Json = document["schemas"]["Body"]["properties"]
    return found


def answered(document: Json) -> Json:
    found: Json = document["schemas"]["Answer"]["properties"]
    return found


def parameter(document: Json, index: int) -> Json:
    found: Json = operation(document)["parameters"][index]
    return found


def problem_of(properties: Json) -> Json:
    schema = {"type": "object", "required": ["code"], "properties": properties}
    return {"application/problem+json": {"schema": schema}}


def answers(document: Json) -> Json:
    found: Json = operation(document)["responses"]
    return found


Change = Callable[[Json], Any]
BREAKING: dict[str, Change] = {
    "POST /jobs/{job_id} is gone.": lambda new: new["paths"].clear(),
    "it is not answered with 202 any more.": lambda new: operation(new)["responses"].pop("202"),
    "the answer 200 is not application/json any more.": lambda new: operation(new)["responses"][
        "200"
    ].update(content={"text/plain": {}}),
    "the answer 200/id is gone.": lambda new: answered(new).pop("id"),
    "the answer 200/loss is gone.": lambda new: answered(new).pop("loss"),
    "the answer 200/id may be missing now.": lambda new: new["schemas"]["Answer"].update(
        required=["state"]
    ),
    "the answer 200/id may be integer now.": lambda new: answered(new).update(
        id={"type": ["string", "integer"]}
    ),
    "the answer 200/id may be null now.": lambda new: answered(new).update(
        id={"anyOf": [{"type": "string"}, {"type": "null"}]}
    ),
    "the answer 200/state may be anything now.": lambda new: answered(new).update(state={}),
    "the answer 202, header location is gone.": lambda new: answers(new)["202"].pop("headers"),
    "the answer 202, header location may be missing now.": lambda new: answers(new)["202"][
        "headers"
    ]["Location"].update(required=False),
    "the answer 409, header upload-offset may be string now.": lambda new: answers(new)["409"][
        "headers"
    ]["Upload-Offset"].update(schema={"type": "string"}),
    "the answer 404 is not application/problem+json any more.": lambda new: answers(new)[
        "404"
    ].update(content={"text/plain": {}}),
    "the answer 404/code may be integer now.": lambda new: answers(new)["404"].update(
        content=problem_of({"code": {"type": "integer"}, "hint": {"type": "null"}})
    ),
    "the answer 404/hint is gone.": lambda new: answers(new)["404"].update(
        content=problem_of({"code": {"type": "string"}})
    ),
    "the answer 418/hint is gone.": lambda new: answers(new).update(
        {"418": {"content": problem_of({"code": {"type": "string"}})}}
    ),
    "No error has the code job_not_found any more.": lambda new: answers(new)["404"].update(
        {"x-codes": ["no_such_job"]}
    ),
    "the parameter limit is gone.": lambda new: operation(new)["parameters"].pop(1),
    "the parameter limit is required now.": lambda new: parameter(new, 1).update(required=True),
    "the parameter page is required now.": lambda new: operation(new)["parameters"].append(
        {"name": "page", "in": "query", "required": True, "schema": {}}
    ),
    "the parameter limit: maximum is 5 now, and was 9.": lambda new: parameter(new, 1)[
        "schema"
    ].update(maximum=5),
    "the parameter kind may not be 'b' any more.": lambda new: parameter(new, 2).update(
        schema={"const": "a"}
    ),
    "a body is required now.": lambda new: operation(new)["requestBody"].update(required=True),
    "the body is not application/json any more.": lambda new: operation(new).pop("requestBody"),
    "the body/mode is required now.": lambda new: new["schemas"]["Body"].update(
        required=["name", "mode"]
    ),
    "the body/tags is not taken any more.": lambda new: asked(new).pop("tags"),
    "the body/mode may not be 'fast' any more.": lambda new: asked(new)["mode"].update(
        enum=["slow", "medium"]
    ),
    "the body/size may not be null any more.": lambda new: asked(new).update(
        size={"type": "number"}
    ),
    "the body/size may not be number any more.": lambda new: asked(new).update(
        size={"type": ["integer", "null"]}
    ),
    "the body/tags/* may not be string any more.": lambda new: asked(new)["tags"].update(
        items={"type": "integer"}
    ),
    "the body/labels/* may not be string any more.": lambda new: asked(new)["labels"].update(
        additionalProperties={"type": "boolean"}
    ),
    "the body/labels takes no other fields any more.": lambda new: asked(new)["labels"].update(
        additionalProperties=False
    ),
    "the body/name: minLength is 3 now, and was 1.": lambda new: asked(new)["name"].update(
        minLength=3
    ),
    "the body/name has to match ^a now.": lambda new: asked(new)["name"].update(pattern="^a"),
    "the body/name may be only one of ['x'] now.": lambda new: asked(new)["name"].update(
        enum=["x"]
    ),
}


@pytest.mark.parametrize("sentence", BREAKING)
def test_what_breaks_is_told(sentence: str) -> None:
    new = deepcopy(BASE)
    BREAKING[sentence](new)
    found = [told.removeprefix("POST /jobs/{job_id}: ") for told in breaking_changes(BASE, new)]
    assert found == [sentence]


PASSING: dict[str, Change] = {
    "nothing": lambda _: None,
    "a route more": lambda new: new["paths"].update({"/new": {"get": {"responses": {}}}}),
    "a method more": lambda new: new["paths"]["/jobs/{job_id}"].update(get={"responses": {}}),
    "a part of a path has another name": lambda new: new["paths"].update(
        {"/jobs/{id}": new["paths"].pop("/jobs/{job_id}")}
    ),
    "a parameter more": lambda new: operation(new)["parameters"].append(
        {"name": "page", "in": "query", "schema": {"type": "integer"}}
    ),
    "a field of the body more": lambda new: asked(new).update(more={"type": "integer"}),
    "a field that need not be given any more": lambda new: new["schemas"]["Body"].update(
        required=[]
    ),
    "a type more in the body": lambda new: asked(new).update(name={"type": ["string", "null"]}),
    "a number where an integer was": lambda new: parameter(new, 1).update(
        schema={"type": "number", "maximum": 9}
    ),
    "a value more in the body": lambda new: asked(new)["mode"]["enum"].append("medium"),
    "values in two alternatives": lambda new: asked(new).update(
        mode={"anyOf": [{"const": "slow"}, {"const": "fast"}]}
    ),
    "a field of the answer more": lambda new: answered(new).update(more={"type": "string"}),
    "a value more in the answer": lambda new: answered(new)["state"]["enum"].append("paused"),
    "a type fewer in the answer": lambda new: answered(new).update(loss={"type": "number"}),
    "a field that is always there now": lambda new: new["schemas"]["Answer"]["required"].append(
        "loss"
    ),
    "a 2xx more": lambda new: operation(new)["responses"].update({"201": {}}),
    "an error fewer": lambda new: answers(new).pop("409"),
    "an error more": lambda new: answers(new).update({"418": PROBLEM}),
    "a header more": lambda new: answers(new)["404"].update({"headers": {"Retry-After": {}}}),
    "a header that is always there now": lambda new: answers(new)["409"]["headers"][
        "Upload-Offset"
    ].update(required=True),
    "a code more": lambda new: answers(new)["404"]["x-codes"].append("file_not_found"),
    "a field of an error more": lambda new: new["schemas"]["Problem"]["properties"].update(
        job_status={"type": "string"}
    ),
}


@pytest.mark.parametrize("change", PASSING)
def test_what_adds_passes(change: str) -> None:
    new = deepcopy(BASE)
    PASSING[change](new)
    assert breaking_changes(BASE, new) == []
