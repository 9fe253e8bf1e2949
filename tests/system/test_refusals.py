"""Requests that the service refuses, each with a clear sentence, and goes on."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.system.service import EXAMPLES, Json, Service

REFUSALS: dict[str, tuple[Callable[[Json], Any], str, list[str]]] = {
    "a base model that does not exist": (
        lambda body: body.update(base_model=f"file:{EXAMPLES}/no-such-model"),
        "/base_model",
        ["no-such-model"],
    ),
    "a dataset that does not exist": (
        lambda body: body.update(dataset_uri=f"file:{EXAMPLES}/data/no-such.jsonl"),
        "/dataset_uri",
        ["no-such.jsonl"],
    ),
    "an unknown field": (lambda body: body.update(sigmma=0.1), "/sigmma", ["sigmma"]),
    "rank 0": (lambda body: body.update(rank=0), "/rank", ["0", "1"]),
    "sigma -1": (lambda body: body.update(sigma=-1), "/sigma", ["-1", "0"]),
    "a file outside the roots": (
        lambda body: body.update(dataset_uri="file:/etc/passwd"),
        "/dataset_uri",
        ["/etc/passwd", "FLATLORA_DATASET_ROOTS"],
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSALS)
    def test_it_says_what_was_found_and_what_is_expected(
        self, shared_service: Service, body: Json, name: str
    ) -> None:
        spoil, pointer, words = REFUSALS[name]
        spoil(body)
        with shared_service.http as http:
            response = http.post("/jobs", json=body)
            assert http.get("/healthz").is_success
        problem = response.json()
        assert response.status_code == 422
        assert response.headers["content-type"] == "application/problem+json"
        assert pointer in [fault["pointer"] for fault in problem["errors"]]
        for word in words:
            assert word in response.text
