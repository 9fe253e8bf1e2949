"""The contract: what the document promises, and that it does not change unseen."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contracts.openapi import SNAPSHOT, document

Json = dict[str, Any]


@pytest.fixture(scope="module")
def openapi() -> Json:
    return document()


def operations(openapi: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in openapi["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_it_is_the_one_that_is_kept(openapi: Json) -> None:
    assert openapi == json.loads(SNAPSHOT.read_text()), (
        "The HTTP contract has changed. If that is meant: "
        "python -m tests.contracts.openapi --write, and review the difference."
    )


def test_it_is_openapi_3_1_with_these_routes(openapi: Json) -> None:
    assert openapi["openapi"].startswith("3.1")
    assert {f"{method.upper()} {path}" for path, method, _ in operations(openapi)} == {
        "POST /jobs",
        "GET /jobs",
        "GET /jobs/{job_id}",
        "DELETE /jobs/{job_id}",
        "POST /jobs/{job_id}/cancel",
        "POST /jobs/{job_id}/pause",
        "POST /jobs/{job_id}/resume",
        "POST /jobs/{job_id}/retry",
        "GET /jobs/{job_id}/events",
        "GET /jobs/{job_id}/metrics",
        "GET /jobs/{job_id}/logs",
        "GET /jobs/{job_id}/checkpoints",
        "GET /jobs/{job_id}/adapter",
        "GET /jobs/{job_id}/adapter/{file}",
        "POST /datasets",
        "GET /datasets",
        "GET /datasets/{dataset_id}",
        "GET /jobs/{job_id}/deliveries",
        "POST /deliveries/{delivery_id}/retry",
        "GET /webhooks/secret",
        "POST /webhooks/secret",
        "POST /webhooks/test",
        "DELETE /datasets/{dataset_id}",
        "PUT /datasets/uploads/{sha256}",
        "GET /datasets/uploads/{sha256}",
        "PATCH /datasets/uploads/{sha256}",
        "DELETE /datasets/uploads/{sha256}",
        "GET /adapters",
        "GET /adapters/{job_id}",
        "GET /models",
        "GET /workers",
        "POST /keys",
        "GET /keys",
        "DELETE /keys/{key_id}",
        "GET /audit",
        "POST /v1/files",
        "GET /v1/files",
        "GET /v1/files/{file_id}",
        "DELETE /v1/files/{file_id}",
        "GET /v1/files/{file_id}/content",
        "POST /v1/fine_tuning/jobs",
        "GET /v1/fine_tuning/jobs",
        "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}",
        "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel",
        "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/pause",
        "POST /v1/fine_tuning/jobs/{fine_tuning_job_id}/resume",
        "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/events",
        "GET /v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "DELETE /v1/models/{model}",
        "GET /quota",
        "GET /healthz",
        "GET /readyz",
        "GET /version",
    }


def test_every_reference_leads_somewhere(openapi: Json) -> None:
    for reference in references(openapi):
        node: Any = openapi
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_names_of_operations_are_unique(openapi: Json) -> None:
    names = [operation["operationId"] for _, _, operation in operations(openapi)]
    assert len(names) == len(set(names))


def test_every_route_says_what_it_does_and_how_it_fails(openapi: Json) -> None:
    for path, method, operation in operations(openapi):
        assert operation["summary"]
        if path in {"/healthz", "/version"}:
            continue
        failures = {
            code: response
            for code, response in operation["responses"].items()
            if re.fullmatch("[45]..|default", code)
        }
        assert "default" in failures, (method, path)
        for response in failures.values():
            (media_type,) = response["content"]
            schema = response["content"][media_type]["schema"]["$ref"].rpartition("/")[2]
            is_openai = operation["tags"] == ["openai"]
            assert (media_type, schema) == (
                ("application/json", "ErrorAnswer")
                if is_openai
                else ("application/problem+json", "Problem")
            )
            assert is_openai is path.startswith("/v1/")


def test_every_route_but_the_service_pages_asks_for_a_key(openapi: Json) -> None:
    for path, _, operation in operations(openapi):
        is_open = path in {"/healthz", "/readyz", "/version"}
        assert ("security" in operation) is not is_open
        assert ("401" in operation["responses"]) is not is_open


def test_the_example_of_openais_job_is_one(openapi: Json) -> None:
    from app.openai_api.creation import native
    from app.openai_api.schemas import FineTuningJobCreate

    for example in openapi["components"]["schemas"]["FineTuningJobCreate"]["examples"]:
        native(FineTuningJobCreate.model_validate(example))


def test_the_example_of_a_job_is_one(openapi: Json) -> None:
    from app.jobs.schemas import JobCreate

    for example in openapi["components"]["schemas"]["JobCreate"]["examples"]:
        JobCreate.model_validate(example)


def test_every_media_type_of_an_adapters_files_is_told(openapi: Json) -> None:
    from app.adapters.endpoints import MEDIA_TYPES

    answers = openapi["paths"]["/jobs/{job_id}/adapter/{file}"]["get"]["responses"]
    for status in ("200", "206"):
        assert answers[status]["content"].keys() >= {*MEDIA_TYPES.values()}
