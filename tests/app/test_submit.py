"""``POST /jobs``: what is accepted, and every way of being refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.jobs.states import Status
from app.tables import AuditRow, EventRow, JobRow
from tests.app.service import Service, faults, make_model, ok


def count_jobs(service: Service) -> int:
    with Session(service.engine) as session:
        return session.scalar(select(func.count()).select_from(JobRow)) or 0


class TestAccepted:
    def test_the_answer_is_the_whole_job_and_says_where_to_look(self, any_service: Service) -> None:
        response = any_service.post(any_service.body | {"rank": 4, "labels": {"team": "nlp"}})
        job = ok(response, 202)
        assert response.headers["location"] == f"/jobs/{job['id']}"
        assert int(response.headers["retry-after"]) > 0
        assert "idempotent-replayed" not in response.headers
        assert (job["status"], job["queue_position"]) == ("queued", 0)
        assert any_service.get(f"/jobs/{job['id']}") == job

    def test_it_says_how_many_are_ahead_as_a_later_look_does(self, any_service: Service) -> None:
        """Those of its project that wait, with its priority or a lower one; as GET counts them."""
        ids = [any_service.submit(priority=priority)["id"] for priority in (5, 1, 5, 9, 5)]
        any_service.set(ids[0], status=Status.RUNNING)
        any_service.set(ids[4], project="another")
        told = any_service.submit(priority=5)
        assert told["queue_position"] == 2
        assert any_service.get(f"/jobs/{told['id']}") == told
        assert any_service.submit(priority=0)["queue_position"] == 0

    def test_it_leaves_its_first_event_and_one_line_in_the_log(self, any_service: Service) -> None:
        job = any_service.submit(resources={"max_queue_time": 60})
        (line,) = any_service.get("/audit")["items"]
        assert (line["action"], line["object"]) == ("create_job", job["id"])
        (event,) = any_service.get(f"/jobs/{job['id']}/events")["items"]
        assert (event["seq"], event["type"], event["data"]) == (1, "job.queued", {})
        assert event["message"] == "The job was accepted."

    def test_every_default_is_written_out(self, service: Service) -> None:
        spec = service.submit(rank=4, training={"batch_size": 4})["spec"]
        assert spec["lora"]["alpha"] == 8
        assert spec["training"]["epochs"] == 3
        assert spec["training"]["micro_batch_size"] is None
        assert spec["sigma"] == 0.05

    def test_the_same_job_can_be_submitted_from_its_record(self, service: Service) -> None:
        first = service.submit(training={"max_steps": 5}, labels={"a": "b"}, name="é")
        assert service.submit(**first["spec"])["spec"] == first["spec"]

    def test_ids_sort_by_time(self, service: Service) -> None:
        ids = [service.submit()["id"] for _ in range(5)]
        assert ids == sorted(ids)

    def test_a_hub_model_and_its_revision_are_taken_as_they_are(self, service: Service) -> None:
        job = service.submit(base_model="org/some-model_1.5", base_model_revision="v1.0/main")
        assert job["spec"]["base_model_revision"] == "v1.0/main"

    def test_an_upload_is_a_dataset(self, service: Service) -> None:
        upload = service.http.post("/datasets", params={"filename": "a.jsonl"}, content=b"{}",
                                   headers={"Content-Type": "application/x-ndjson"})  # fmt: skip
        job = service.submit(dataset_uri=upload.json()["uri"])
        assert job["spec"]["dataset_uri"].startswith("dataset:ds_")

    def test_a_number_may_be_whole_where_a_float_is_expected(self, service: Service) -> None:
        assert service.submit(sigma=0)["spec"]["sigma"] == 0


SHAPES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "rank 0": ({"rank": 0}, "/rank", ["greater than or equal to 1", "found 0"]),
    "rank too large": ({"rank": 2000}, "/rank", ["less than or equal to 1024", "2000"]),
    "rank as text": ({"rank": "16"}, "/rank", ["integer", '"16"']),
    "rank as bool": ({"rank": True}, "/rank", ["integer", "true"]),
    "rank as float": ({"rank": 1.5}, "/rank", ["integer", "1.5"]),
    "rank null": ({"rank": None}, "/rank", ["integer", "null"]),
    "sigma below 0": ({"sigma": -1}, "/sigma", ["greater than or equal to 0", "-1"]),
    "sigma above 1": ({"sigma": 1.5}, "/sigma", ["less than or equal to 1", "1.5"]),
    "both lengths": (
        {"training": {"epochs": 1, "max_steps": 2}},
        "/training",
        ["epochs or max_steps, not both"],
    ),
    "no rows per step": (
        {"training": {"batch_size": 0}}, "/training/batch_size", ["equal to 1", "0"],
    ),
    "steps past any counter": (
        {"training": {"max_steps": 10**30}}, "/training/max_steps", ["2147483647"],
    ),
    "unknown schedule": (
        {"training": {"schedule": "cosin"}}, "/training/schedule", ["'cosine'", '"cosin"'],
    ),
    "misspelt field": ({"sigmma": 0.1}, "/sigmma", ["no field 'sigmma'", "/sigma?"]),
    "misplaced field": ({"epochs": 3}, "/epochs", ["no field 'epochs'", "/training/epochs"]),
    "unknown field in a group": (
        {"lora": {"alhpa": 3}}, "/lora/alhpa", ["Did you mean /lora/alpha?"],
    ),
    "field like nothing": ({"xyzzy": 1}, "/xyzzy", ["no field 'xyzzy'."]),
    "group that is no object": ({"lora": 3}, "/lora", ["found 3"]),
    "layer that is no text": ({"lora": {"target_modules": [1]}}, "/lora/target_modules/0", ["1"]),
    "empty base model": ({"base_model": ""}, "/base_model", ["at least 1"]),
    "label that is no text": ({"labels": {"a": 1}}, "/labels/a", ["string", "found 1"]),
    "label with a bad name": ({"labels": {"a b/~": "x"}}, "/labels/a b~1~0", ["pattern"]),
    "too many labels": (
        {"labels": {str(number): "" for number in range(17)}}, "/labels", ["at most 16"],
    ),
    "NUL": ({"name": "a\0b"}, "/name", ["U+0000"]),
    "NUL in a list": ({"lora": {"target_modules": ["\0"]}}, "/lora", ["U+0000"]),
    "half a character": ({"name": "\ud800"}, "/name", ["unicode"]),
    "revision with spaces": ({"base_model_revision": "a b"}, "/base_model_revision", ["pattern"]),
    "revision that leads up": (
        {"base_model_revision": "a/../b"}, "/base_model_revision", ["without '..'", "a/../b"],
    ),
    "no layers": (
        {"lora": {"target_modules": []}}, "/lora/target_modules", ["one layer name at least"],
    ),
    "layer without a name": (
        {"lora": {"target_modules": [""]}}, "/lora/target_modules/0", ["at least 1 character"],
    ),
    "mapping of a column that no format knows": (
        {"data": {"mapping": {"question": "instruction"}}},
        "/data/mapping/question",
        ["'instruction'", "'completion'", 'found "question"'],
    ),
}  # fmt: skip


class TestRefusedShapes:
    @pytest.mark.parametrize("name", SHAPES)
    def test_it_says_what_was_found_and_what_is_expected(self, service: Service, name: str) -> None:
        values, pointer, words = SHAPES[name]
        problem = service.refused(service.body | values)
        assert problem["code"] == "invalid_request"
        found = next(text for place, text in faults(problem).items() if place.startswith(pointer))
        for word in words:
            assert word in found
        assert count_jobs(service) == 0

    def test_every_fault_is_listed(self, service: Service) -> None:
        problem = service.refused({"rank": 0, "sigma": -1, "training": {"epochs": "x"}, "a": 1})
        assert set(faults(problem)) == {
            "/base_model", "/dataset_uri", "/rank", "/sigma", "/training/epochs", "/a",
        }  # fmt: skip
        assert problem["detail"] == "6 things are not as expected."

    @pytest.mark.parametrize(
        ("body", "code", "words"),
        [
            (b"", 422, "A body is required."),
            (b"[]", 422, "one JSON object; found a list"),
            (b"null", 422, "one JSON object; found null"),
            (b"{", 400, "The body is not JSON"),
            (b'{"sigma": NaN, "base_model": "a/b", "dataset_uri": "file:a"}', 422, "finite"),
            (b'{"sigma": Infinity}', 422, "finite"),
            (b'{"rank": ' + b"9" * 5000 + b"}", 400, "cannot be read"),
            (b"[" * 100_000, 400, "cannot be read"),
            (b"\xff", 400, "cannot be read"),
            (b'{"\\ud800": 1}', 422, "unicode"),
        ],
    )
    def test_what_is_no_job_is_a_problem(
        self, service: Service, body: bytes, code: int, words: str
    ) -> None:
        response = service.http.post(
            "/jobs", content=body, headers={"Content-Type": "application/json"}
        )
        ok(response, code)
        assert words in response.text

    @pytest.mark.parametrize("given", ["text/plain", "application/x-www-form-urlencoded", None])
    def test_another_content_type_is_415(self, service: Service, given: str | None) -> None:
        headers = {"Content-Type": given} if given else {}
        problem = ok(service.http.post("/jobs", content=b"{}", headers=headers), 415)
        assert problem["code"] == "unsupported_media_type"
        assert "application/json" in problem["detail"]

    def test_a_body_that_is_too_large_is_413(self, service: Service) -> None:
        problem = ok(service.post(service.body | {"name": "x" * (1 << 20)}), 413)
        assert problem["code"] == "too_large"


class TestRefusedDatasets:
    def check(self, service: Service, uri: str, code: str, *words: str) -> None:
        problem = service.refused(service.body | {"dataset_uri": uri})
        assert problem["code"] == code
        assert [fault["code"] for fault in problem["errors"]] == [code]
        text = faults(problem)["/dataset_uri"]
        for word in words:
            assert word in text

    def test_a_missing_file(self, service: Service) -> None:
        self.check(service, "file:nowhere.jsonl", "dataset_not_found", "file:nowhere.jsonl")

    def test_a_folder(self, service: Service) -> None:
        (service.rows / "folder").mkdir()
        self.check(service, "file:folder", "dataset_not_found", "not a file")

    def test_a_name_that_is_too_long_for_any_disk(self, service: Service) -> None:
        self.check(service, f"file:{'a' * 3000}", "dataset_not_found")

    @pytest.mark.parametrize(
        "uri",
        [
            "file:/etc/passwd",
            "file:///etc/passwd",
            "file://localhost/etc/passwd",
            "file:../outside.jsonl",
            "file:..%2foutside.jsonl",
            "file:%2e%2e/outside.jsonl",
            "file:a/../../outside.jsonl",
            "file:link.jsonl",
            "file:folder-link/outside.jsonl",
        ],
    )
    def test_what_lies_outside_the_roots(self, service: Service, uri: str) -> None:
        outside = service.rows.parent / "outside.jsonl"
        outside.write_text("{}")
        (service.rows / "link.jsonl").symlink_to(outside)
        (service.rows / "folder-link").symlink_to(outside.parent)
        self.check(
            service, uri, "path_not_allowed", uri, str(service.rows), "FLATLORA_DATASET_ROOTS"
        )

    @pytest.mark.parametrize(
        "uri",
        [
            "file:", "file://", "file://host/rows.jsonl", "file:////etc/passwd", "file://[::1",
            "file:a%00b", "file:a%0ab", "file:a%zz", "file:a.jsonl?x=1", "file:a.jsonl#part",
        ],
    )  # fmt: skip
    def test_what_is_no_path(self, service: Service, uri: str) -> None:
        self.check(service, uri, "uri_malformed", "file:folder/rows.jsonl")

    @pytest.mark.parametrize(
        "uri", ["ftp://host/rows", "zip://a::https://b", "rows.jsonl", "FILE:a", "/etc/passwd"]
    )
    def test_another_scheme(self, service: Service, uri: str) -> None:
        self.check(service, uri, "uri_scheme_unsupported", "file:, dataset:", "POST /datasets")

    @pytest.mark.parametrize("name", ["", "ds_1", "ds_" + "0" * 32, "../x"])
    def test_an_upload_that_is_not_there(self, any_service: Service, name: str) -> None:
        self.check(any_service, f"dataset:{name}", "dataset_not_found", "POST /datasets")

    def test_the_validation_rows_are_checked_alike(self, service: Service) -> None:
        body = service.body | {"evaluation": {"validation_uri": "file:nowhere"}}
        assert set(faults(service.refused(body))) == {"/evaluation/validation_uri"}


class TestRefusedBaseModels:
    def check(self, service: Service, name: str, code: str, *words: str) -> None:
        problem = service.refused(service.body | {"base_model": name})
        assert problem["code"] == code
        for word in words:
            assert word in faults(problem)["/base_model"]

    def test_a_missing_folder(self, service: Service) -> None:
        self.check(service, "file:nowhere", "base_model_not_found", "file:nowhere", "GET /models")

    def test_a_folder_outside_the_roots(self, service: Service) -> None:
        self.check(service, "file:/etc", "path_not_allowed", "FLATLORA_MODEL_ROOTS")

    def test_a_folder_without_a_config(self, service: Service) -> None:
        (service.models / "empty").mkdir()
        self.check(service, "file:empty", "base_model_unusable", "config.json")

    def test_pickled_weights(self, service: Service) -> None:
        make_model(service.models / "pickled", "pytorch_model.bin")
        self.check(service, "file:pickled", "base_model_unusable", "pickles are never opened")

    def test_a_revision_of_a_folder(self, service: Service) -> None:
        problem = service.refused(service.body | {"base_model_revision": "main"})
        assert problem["code"] == "revision_not_allowed"
        assert "'main'. Leave it out" in faults(problem)["/base_model_revision"]

    @pytest.mark.parametrize(
        "name", ["tiny", "a/b/c", "../x/y", "org/na me", "org/..", "http://a/b"]
    )
    def test_what_is_no_hub_id(self, service: Service, name: str) -> None:
        self.check(service, name, "base_model_not_found", "org/name")

    def test_all_that_is_wrong_with_the_inputs_is_said_at_once(self, service: Service) -> None:
        problem = service.refused({"base_model": "file:no", "dataset_uri": "file:no"})
        assert set(faults(problem)) == {"/base_model", "/dataset_uri"}
        assert problem["code"] == "invalid_request"


class TestHubModels:
    @pytest.fixture
    def settings(self, tmp_path: Path, migrated_sqlite_url: str) -> Any:
        from tests.app.conftest import make_settings

        return make_settings(tmp_path, migrated_sqlite_url, hub_models="meta.org/*,org/one")

    def test_only_the_listed_may_be_named(self, service: Service) -> None:
        for name in ("meta.org/anything", "org/one"):
            service.submit(base_model=name)
        for name in ("org/two", "metaXorg/anything", "org/one1"):
            problem = service.refused(service.body | {"base_model": name})
            assert problem["code"] == "base_model_not_allowed"
            assert "FLATLORA_HUB_MODELS" in faults(problem)["/base_model"]


class TestIdempotencyKey:
    def test_the_same_request_gives_the_same_job(self, any_service: Service) -> None:
        first = ok(any_service.post(any_service.body, Idempotency_Key="k"), 202)
        replay = any_service.post(any_service.body, Idempotency_Key="k")
        assert ok(replay, 202)["id"] == first["id"]
        assert replay.headers["idempotent-replayed"] == "true"
        assert count_jobs(any_service) == 1

    def test_a_default_that_is_written_out_is_no_other_body(self, service: Service) -> None:
        first = ok(service.post(service.body, Idempotency_Key="k"), 202)
        body = dict(reversed(service.body.items())) | {"rank": 16}
        assert ok(service.post(body, Idempotency_Key="k"), 202)["id"] == first["id"]

    def test_another_body_is_refused(self, any_service: Service) -> None:
        any_service.post(any_service.body, Idempotency_Key="k")
        response = any_service.post(any_service.body | {"rank": 8}, Idempotency_Key="k")
        assert ok(response, 422)["code"] == "idempotency_key_reused"

    def test_a_refused_request_does_not_use_up_its_key(self, service: Service) -> None:
        ok(service.post(service.body | {"rank": 0}, Idempotency_Key="k"), 422)
        ok(service.post(service.body | {"dataset_uri": "file:no"}, Idempotency_Key="k"), 422)
        ok(service.post(service.body, Idempotency_Key="k"), 202)

    def test_a_replay_does_not_look_at_the_inputs_again(self, service: Service) -> None:
        first = ok(service.post(service.body, Idempotency_Key="k"), 202)
        (service.rows / "train.jsonl").unlink()
        assert ok(service.post(service.body, Idempotency_Key="k"), 202)["id"] == first["id"]

    @pytest.mark.parametrize("key", ["", "a b", "x" * 256, "\x7f"])
    def test_a_malformed_key_is_refused(self, service: Service, key: str) -> None:
        problem = ok(service.post(service.body, Idempotency_Key=key), 422)
        assert "idempotency-key" in [name.lower() for name in faults(problem)]

    def test_a_hundred_at_once_make_one_job(self, any_service: Service) -> None:
        def post(_: int) -> str:
            return str(ok(any_service.post(any_service.body, Idempotency_Key="k"), 202)["id"])

        with ThreadPoolExecutor(100) as pool:
            ids = set(pool.map(post, range(100)))
        assert len(ids) == 1
        assert count_jobs(any_service) == 1
        with Session(any_service.engine) as session:
            for table in (EventRow, AuditRow):
                assert session.scalar(select(func.count()).select_from(table)) == 1


class TestTokens:
    """A step that is measured in tokens has no number of rows."""

    def test_it_is_accepted_shown_and_can_be_submitted_again(self, service: Service) -> None:
        job = service.submit(training={"batch_tokens": 2000})
        assert job["spec"]["training"]["batch_size"] is None
        assert service.get(f"/jobs/{job['id']}")["spec"] == job["spec"]
        assert service.submit(**job["spec"])["spec"] == job["spec"]
        assert service.get("/jobs")["items"][0]["spec"] == job["spec"]

    def test_both_are_refused(self, service: Service) -> None:
        body = service.body | {"training": {"batch_tokens": 2000, "batch_size": 8}}
        assert "not both" in service.post(body).text
