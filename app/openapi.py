"""The OpenAPI document: what FastAPI gathers, and the shape of every error."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from app.faults import Fault
from app.problems import Problem


def describe(app: FastAPI) -> None:
    """Let the document hold the schemas that ``problems()`` refers to."""
    gathered = app.openapi

    def with_problems() -> dict[str, Any]:
        document = gathered()
        document["components"]["schemas"].update(_schemas())
        return document

    app.openapi = with_problems  # type: ignore[method-assign] # FastAPI's documented way


def _schemas() -> dict[str, Any]:
    _, found = models_json_schema(
        [(Problem, "serialization"), (Fault, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = found["$defs"]
    return schemas
