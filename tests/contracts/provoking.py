"""How each error is provoked: an entry for every code and status, over HTTP."""

import hashlib
from collections.abc import Callable
from typing import Any

import httpx2
from sqlalchemy.orm import Session

from app.db import now
from app.tables import WebhookSecretRow
from tests.app.service import Json, Service

ROWS = b'{"prompt": "1", "completion": "2"}\n'
HASH = hashlib.sha256(ROWS).hexdigest()
UPLOAD = f"/datasets/uploads/{HASH}"
NOBODY = "0" * 32
V1 = "/v1/fine_tuning/jobs"

Answer = httpx2.Response
Provoke = Callable[[Service], Answer]


class Entries:
    """How each code is provoked, by code and status."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], tuple[Provoke, Json]] = {}

    def add(self, code: str, status: int, **settings: object) -> Callable[[Provoke], Provoke]:
        """``settings``: of the service, where it needs other ones."""

        def keep(provoke: Provoke) -> Provoke:
            assert (code, status) not in self.found
            self.found[code, status] = provoke, settings
            return provoke

        return keep

    def of_a_job(self, code: str, **fields: object) -> None:
        """A job that is refused for what one of its fields says."""
        self.add(code, 422)(lambda service: service.post(service.body | fields))


entries = Entries()
again = Entries()
"""Of these some once more, by OpenAI's paths."""


def asking(method: str, path: str) -> Provoke:
    return lambda service: service.http.request(method, path)


# Who is asking


@entries.add("unauthenticated", 401)
def without_a_key(service: Service) -> Answer:
    return service.http.get("/jobs", headers={"Authorization": ""})


@entries.add("invalid_api_key", 401)
def with_a_key_of_nobody(service: Service) -> Answer:
    return service.http.get("/v1/files", headers={"Authorization": "Bearer sk-other"})


@entries.add("forbidden", 403)
def as_a_viewer_who_submits(service: Service) -> Answer:
    made = service.http.post("/keys", json={"name": "a viewer", "role": "viewer"}).json()
    return service.post(service.body, Authorization=f"Bearer {made['key']}")


@entries.add("cross_site", 403)
def from_another_web_page(service: Service) -> Answer:
    return service.post(service.body, Sec_Fetch_Site="cross-site")


@entries.add("host_not_allowed", 421)
def by_another_name(service: Service) -> Answer:
    return service.http.get("/jobs", headers={"Host": "evil.example"})


@entries.add("rate_limited", 429, failed_keys_per_minute=1)
def another_wrong_key(service: Service) -> Answer:
    wrong = {"Authorization": "Bearer flk_wrong"}
    service.http.get("/jobs", headers=wrong)
    return service.http.get("/jobs", headers=wrong)


@entries.add("quota_exceeded", 429, max_queued_jobs=1)
def one_job_too_many(service: Service) -> Answer:
    service.submit()
    return service.post(service.body)


# What is not here

for code, method, path in [
    ("not_found", "GET", "/nothing"),
    ("job_not_found", "GET", f"/jobs/job_{NOBODY}"),
    ("dataset_not_found", "GET", f"/datasets/ds_{NOBODY}"),
    ("upload_not_found", "GET", f"/datasets/uploads/{NOBODY * 2}"),
    ("adapter_not_found", "GET", f"/adapters/job_{NOBODY}"),
    ("key_not_found", "DELETE", "/keys/000000000000"),
    ("delivery_not_found", "POST", f"/deliveries/msg_{NOBODY}/retry"),
    ("file_not_found", "GET", f"/v1/files/file-{NOBODY}"),
    ("model_not_found", "GET", "/v1/models/none"),
]:
    entries.add(code, 404)(asking(method, path))


@entries.add("file_not_in_adapter", 404)
def a_file_that_the_adapter_lacks(service: Service) -> Answer:
    return service.http.get(f"/jobs/{service.finished()['id']}/adapter/nothing")


# What cannot be done now


@entries.add("illegal_transition", 409)
def cancel_what_is_over(service: Service) -> Answer:
    return service.http.post(f"/jobs/{service.finished()['id']}/cancel")


@entries.add("adapter_not_ready", 409)
def the_adapter_of_a_job_that_waits(service: Service) -> Answer:
    return service.http.get(f"/jobs/{service.submit()['id']}/adapter")


@entries.add("dataset_in_use", 409)
def delete_the_dataset_of_a_job(service: Service) -> Answer:
    dataset = upload(service, b'{"prompt": "in", "completion": "use"}\n').json()
    service.submit(dataset_uri=dataset["uri"])
    return service.http.delete(f"/datasets/{dataset['id']}")


@entries.add("offset_mismatch", 409)
def a_part_too_far(service: Service) -> Answer:
    begin(service)
    headers = {"Upload-Offset": "7", "Content-Type": "application/octet-stream"}
    return service.http.patch(UPLOAD, content=b"x", headers=headers)


@entries.add("upload_mismatch", 409)
def another_size(service: Service) -> Answer:
    begin(service)
    return begin(service, size=len(ROWS) + 1)


@entries.add("webhook_secret_unreadable", 409)
def a_secret_that_another_key_has_sealed(service: Service) -> Answer:
    with Session(service.engine) as session, session.begin():
        sealed = WebhookSecretRow(secret="fernet:…", created_at=now())  # noqa: S106 - of no use
        session.add(sealed)
    try:
        return service.http.get("/webhooks/secret")
    finally:
        with Session(service.engine) as session, session.begin():
            session.delete(session.merge(sealed))


# How the request is written


@entries.add("malformed_body", 400)
def half_of_an_object(service: Service) -> Answer:
    return service.http.post(
        "/jobs", content='{"rank"', headers={"Content-Type": "application/json"}
    )


@entries.add("method_not_allowed", 405)
def a_method_that_the_route_lacks(service: Service) -> Answer:
    return service.http.put("/jobs")


@entries.add("too_large", 413)
def a_body_of_two_megabytes(service: Service) -> Answer:
    return service.post(service.body | {"name": "x" * 2_000_000})


@entries.add("unsupported_media_type", 415)
def a_text(service: Service) -> Answer:
    return service.http.post("/jobs", content="{}", headers={"Content-Type": "text/plain"})


@entries.add("range_not_satisfiable", 416)
def behind_the_end(service: Service) -> Answer:
    path = f"/jobs/{service.finished()['id']}/adapter/README.md"
    return service.http.get(path, headers={"Range": "bytes=1000-"})


@entries.add("idempotency_key_reused", 422)
def another_body_with_the_same_key(service: Service) -> Answer:
    service.post(service.body, Idempotency_Key="k")
    return service.post(service.body | {"rank": 3}, Idempotency_Key="k")


# What a field says

entries.of_a_job("invalid_request", rank=0)
entries.of_a_job("dataset_not_found", dataset_uri="file:none.jsonl")
entries.of_a_job("uri_malformed", dataset_uri="https://user:password@example.com/rows.jsonl")
entries.of_a_job("uri_scheme_unsupported", dataset_uri="ftp://example.com/rows.jsonl")
entries.of_a_job("path_not_allowed", dataset_uri="file:///etc/passwd")
entries.of_a_job("address_not_allowed", dataset_uri="https://169.254.169.254/rows.jsonl")
entries.of_a_job("port_not_allowed", webhook_url="https://example.com:22/hook")
entries.of_a_job("bucket_not_allowed", dataset_uri="s3://others/rows.jsonl")
entries.of_a_job("base_model_not_found", base_model="file:none")
entries.of_a_job("base_model_not_allowed", base_model="others/model")
entries.of_a_job("dataset_not_allowed", dataset_uri="hf://datasets/others/rows/train.jsonl")
entries.of_a_job("revision_not_allowed", base_model_revision="main")


@entries.add("base_model_unusable", 422)
def an_empty_folder(service: Service) -> Answer:
    (service.models / "empty").mkdir()
    return service.post(service.body | {"base_model": "file:empty"})


@entries.add("cursor_malformed", 422)
def a_page_after_nothing(service: Service) -> Answer:
    return service.http.get("/jobs", params={"after": "nonsense"})


@entries.add("label_malformed", 422)
def a_label_without_a_name(service: Service) -> Answer:
    return service.http.get("/jobs", params={"label.": "x"})


@entries.add("dataset_empty", 422)
def no_bytes(service: Service) -> Answer:
    return upload(service, b"")


@entries.add("file_missing", 422)
def a_form_without_a_file(service: Service) -> Answer:
    return service.http.post("/datasets", files={"other": ("rows.jsonl", ROWS)})


@entries.add("filename_missing", 422)
def bytes_without_a_name(service: Service) -> Answer:
    headers = {"Content-Type": "application/octet-stream"}
    return service.http.post("/datasets", content=ROWS, headers=headers)


@entries.add("digest_malformed", 422)
def a_digest_of_no_bytes(service: Service) -> Answer:
    return upload(service, ROWS, Repr_Digest="sha-256=:AAAA:")


@entries.add("hash_mismatch", 422)
def another_hash(service: Service) -> Answer:
    return service.http.post(
        f"/datasets?filename=a.jsonl&sha256={NOBODY * 2}",
        content=ROWS,
        headers={"Content-Type": "application/jsonl"},
    )


# The service itself


@entries.add("internal", 500)
def a_row_of_another_version(service: Service) -> Answer:
    job_id = service.submit()["id"]
    service.set(job_id, spec={"of": "another version"})
    try:
        return service.http.get(f"/jobs/{job_id}")
    finally:
        service.set(job_id, spec=service.submit()["spec"])


@entries.add("not_ready", 503, database_url="sqlite://{folder}/empty.db")
def ask_a_service_without_tables(service: Service) -> Answer:
    return service.http.get("/readyz")


# Under /v1 alone


@entries.add("unsupported_value", 400)
def another_method(service: Service) -> Answer:
    return fine_tune(service, method={"type": "dpo"})


@entries.add("given_twice", 400)
def two_ranks(service: Service) -> Answer:
    return fine_tune(service, hyperparameters={"rank": 4}, flatlora={"rank": 8})


@entries.add("results_of_job", 409)
def delete_results(service: Service) -> Answer:
    job_id = service.finished()["id"]
    (results,) = service.http.get(f"{V1}/{job_id}").json()["result_files"]
    return service.http.delete(f"/v1/files/{results}")


@entries.add("base_model_stays", 409)
def delete_a_base_model(service: Service) -> Answer:
    return service.http.delete("/v1/models/file:tiny")


@again.add("quota_exceeded", 429, max_queued_jobs=1)
def one_fine_tuning_job_too_many(service: Service) -> Answer:
    fine_tune(service)
    return fine_tune(service)


@again.add("dataset_in_use", 409)
def delete_the_file_of_a_job(service: Service) -> Answer:
    dataset = upload(service, b'{"prompt": "also in", "completion": "use"}\n').json()
    service.submit(dataset_uri=dataset["uri"])
    return service.http.delete(f"/v1/files/file-{dataset['id'].removeprefix('ds_')}")


@again.add("forbidden", 403)
def naming_another_project(service: Service) -> Answer:
    return service.http.get("/v1/models", headers={"Flatlora-Project": "another"})


@again.add("base_model_not_found", 400)
def a_model_that_is_not_here(service: Service) -> Answer:
    return fine_tune(service, model="file:none")


@again.add("malformed_body", 400)
def half_of_a_fine_tuning_job(service: Service) -> Answer:
    return service.http.post(V1, content='{"model"', headers={"Content-Type": "application/json"})


def upload(service: Service, rows: bytes, **headers: str) -> Answer:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    given["Content-Type"] = "application/jsonl"
    return service.http.post("/datasets?filename=rows.jsonl", content=rows, headers=given)


def begin(service: Service, size: int = len(ROWS)) -> Answer:
    return service.http.put(UPLOAD, params={"filename": "rows.jsonl", "size": size})


def fine_tune(service: Service, **fields: Any) -> Answer:
    body = {"model": "file:tiny", "training_file": "file:train.jsonl", **fields}
    return service.http.post(V1, json=body)
