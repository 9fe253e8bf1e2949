"""OpenAI's client uploads, lists, reads and deletes files, finds models, and hears of a job."""

import csv
import hashlib
import io
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from openai import (
    APIStatusError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    OpenAI,
    RateLimitError,
)
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app.errors import ServiceError
from app.ids import new_id
from app.jobs.events import event
from app.settings import Settings
from app.tables import MetricRow
from tests.app.openai_client import ROWS, client_of, row, upload
from tests.app.service import Service


@pytest.fixture
def openai(service: Service) -> OpenAI:
    return client_of(service)


def tell(service: Service, job_id: str, type_: str, **data: Any) -> None:
    with Session(service.engine) as session, session.begin():
        session.execute(event(job_id, type_, f"{type_}.", **data))


def measure(service: Service, job_id: str, series: str, step: int, **data: float) -> None:
    with Session(service.engine) as session, session.begin():
        session.add(MetricRow(job_id=job_id, series=series, step=step, data=data))


class TestFiles:
    def test_an_upload_is_a_dataset_and_comes_back_as_it_was(
        self, openai: OpenAI, service: Service
    ) -> None:
        file = upload(openai)
        dataset = service.get("/datasets")["items"][0]
        assert file.id == dataset["id"].replace("ds_", "file-")
        assert dataset["sha256"] == hashlib.sha256(ROWS).hexdigest()
        assert (file.filename, file.bytes, file.purpose) == ("rows.jsonl", len(ROWS), "fine-tune")
        assert (file.status, file.object) == ("processed", "file")
        assert openai.files.retrieve(file.id) == file
        assert openai.files.wait_for_processing(file.id) == file
        assert openai.files.content(file.id).read() == ROWS

    def test_bytes_without_a_name_are_taken_as_openai_takes_them(self, openai: OpenAI) -> None:
        assert openai.files.create(file=ROWS, purpose="fine-tune").filename == "upload.jsonl"

    def test_the_same_file_again_is_the_same(self, openai: OpenAI) -> None:
        assert upload(openai) == upload(openai)

    def test_the_iterator_turns_the_pages_both_ways(self, any_service: Service) -> None:
        openai = client_of(any_service)
        made = [upload(openai, f"{number}.jsonl").id for number in range(5)]
        assert [file.id for file in openai.files.list(limit=2)] == made[::-1]
        assert [file.id for file in openai.files.list(limit=2, order="asc")] == made
        assert [file.id for file in openai.files.list(purpose="fine-tune")] == made[::-1]
        assert list(openai.files.list(purpose="fine-tune-results")) == []

    def test_what_is_not_here_is_refused(self, openai: OpenAI, service: Service) -> None:
        with pytest.raises(BadRequestError) as refused:
            openai.files.create(file=ROWS, purpose="batch")
        assert refused.value.param == "purpose"
        expiry: Any = {"anchor": "created_at", "seconds": 3600}
        with pytest.raises(BadRequestError) as refused:
            openai.files.create(file=ROWS, purpose="fine-tune", expires_after=expiry)
        assert str(refused.value.param).startswith("expires_after")
        with pytest.raises(BadRequestError, match="The dataset is empty"):
            openai.files.create(file=("a.jsonl", b""), purpose="fine-tune")
        for query in ({"after": "file-x"}, {"limit": 0}, {"order": "up"}, {"purpose": "batch"}):
            with pytest.raises(BadRequestError) as refused:
                openai.files.list(extra_query=query)
            assert refused.value.param == next(iter(query))
        form = {"purpose": (None, "fine-tune")}
        answer = service.http.post("/v1/files", files=form)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
        assert service.http.post("/v1/files", content=b"x").status_code == 415
        assert list(openai.files.list()) == []

    def test_a_deleted_one_is_gone(self, openai: OpenAI) -> None:
        file = upload(openai)
        assert openai.files.delete(file.id).deleted is True
        for ask in (openai.files.retrieve, openai.files.delete, openai.files.content):
            with pytest.raises(NotFoundError) as refused:
                ask(file.id)
            assert refused.value.code == "file_not_found"

    def test_an_id_of_something_else_is_not_found(self, openai: OpenAI, service: Service) -> None:
        unfinished = service.submit()["id"].replace("job_", "file-results-")
        for file in ("file-x", new_id("ds"), f"file-results-{'0' * 32}", unfinished):
            with pytest.raises(NotFoundError):
                openai.files.content(file)


class TestTooLarge:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_dataset_bytes": 3000, "max_body_bytes": 2000})

    def test_a_file_may_be_larger_than_another_body(self, openai: OpenAI) -> None:
        assert upload(openai, rows=row("x" * 1100)).bytes > 2000

    def test_a_file_that_is_too_large_is_413(self, openai: OpenAI) -> None:
        for size in (4000, 400_000):
            with pytest.raises(APIStatusError) as refused:
                upload(openai, rows=b"x" * size)
            assert (refused.value.status_code, refused.value.code) == (413, "too_large")


class TestResults:
    def test_the_metrics_of_a_job_are_a_file(self, openai: OpenAI, service: Service) -> None:
        job_id = service.finished()["id"]
        measure(service, job_id, "train", 1, loss=2.5, sigma=0.01, learning_rate=1e-4)
        measure(service, job_id, "train", 2, loss=2.25, sigma=0.05, learning_rate=2e-4)
        measure(service, job_id, "held_out", 2, loss=2.4, accuracy=0.5)
        (file_id,) = openai.fine_tuning.jobs.retrieve(job_id).result_files
        content = openai.files.content(file_id)
        rows = list(csv.DictReader(io.StringIO(content.text)))
        assert [row["step"] for row in rows] == ["1", "2"]
        assert (rows[0]["train_loss"], rows[0]["valid_loss"]) == ("2.5", "")
        assert (rows[1]["valid_loss"], rows[1]["valid_mean_token_accuracy"]) == ("2.4", "0.5")
        assert (rows[1]["sigma"], rows[1]["train_accuracy"]) == ("0.05", "")
        file = openai.files.retrieve(file_id)
        assert (file.purpose, file.bytes) == ("fine-tune-results", len(content.content))
        with pytest.raises(ConflictError) as refused:
            openai.files.delete(file_id)
        assert refused.value.code == "results_of_job"

    def test_they_are_listed_where_they_are_asked_for(self, any_service: Service) -> None:
        openai = client_of(any_service)
        made = [any_service.finished()["id"].replace("job_", "file-results-") for _ in range(3)]
        any_service.submit()
        listed = openai.files.list(purpose="fine-tune-results", limit=2)
        assert [file.id for file in listed] == made[::-1]
        listed = openai.files.list(purpose="fine-tune-results", limit=2, order="asc")
        assert [file.id for file in listed] == made


class TestEvents:
    def test_they_come_newest_first_and_the_iterator_turns_the_pages(
        self, any_service: Service
    ) -> None:
        openai = client_of(any_service)
        job_id = any_service.submit()["id"]
        tell(any_service, job_id, "job.evaluated", step=5, loss=2.0, accuracy=0.5)
        for _ in range(3):
            tell(any_service, job_id, "job.requeued")
        tell(any_service, job_id, "job.failed")
        events = list(openai.fine_tuning.jobs.list_events(job_id, limit=2))
        told = [(event.message, event.level) for event in events]
        assert told == [
            ("job.failed.", "error"),
            *[("job.requeued.", "warn")] * 3,
            ("job.evaluated.", "info"),
            ("The job was accepted.", "info"),
        ]
        assert len({event.id for event in events}) == 6
        assert [event.type for event in events[3:]] == ["message", "metrics", "message"]
        assert events[4].data == {
            "event": "job.evaluated", "step": 5, "loss": 2.0, "accuracy": 0.5,
            "full_valid_loss": 2.0, "full_valid_mean_token_accuracy": 0.5,
        }  # fmt: skip

    def test_another_jobs_event_is_no_place(self, openai: OpenAI, service: Service) -> None:
        jobs = openai.fine_tuning.jobs
        one, other = service.submit()["id"], service.submit()["id"]
        for after in (jobs.list_events(other).data[0].id, "ftevent-1", "x"):
            with pytest.raises(BadRequestError) as refused:
                jobs.list_events(one, after=after)
            assert refused.value.param == "after"
            with pytest.raises(BadRequestError):
                jobs.checkpoints.list(one, after=after)


class TestCheckpoints:
    def test_each_step_is_listed_once_with_its_metrics(self, any_service: Service) -> None:
        openai = client_of(any_service)
        job_id = any_service.submit()["id"]
        for step in (5, 10, 10, 15):  # after a resume one is written again
            tell(any_service, job_id, "job.checkpoint", step=step)
        measure(any_service, job_id, "train", 10, loss=2.5)
        measure(any_service, job_id, "held_out", 10, loss=2.4, accuracy=0.5)
        checkpoints = list(openai.fine_tuning.jobs.checkpoints.list(job_id, limit=2))
        assert [found.step_number for found in checkpoints] == [15, 10, 5]
        assert len({found.id for found in checkpoints}) == 3
        metrics = checkpoints[1].metrics
        assert (metrics.train_loss, metrics.full_valid_loss) == (2.5, 2.4)
        assert metrics.full_valid_mean_token_accuracy == 0.5
        assert checkpoints[0].metrics.train_loss is None
        assert {found.fine_tuning_job_id for found in checkpoints} == {job_id}


class TestModels:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        hub = ["org/one", "org/family-*"]
        return settings.model_copy(update={"hub_models": hub})

    def test_base_models_and_adapters_are_listed(self, openai: OpenAI, service: Service) -> None:
        service.submit()
        adapter = service.finished()["id"]
        models = {model.id: model for model in openai.models.list()}
        folder = f"file:{service.models / 'tiny'}"
        assert list(models) == [adapter, folder, "org/one"]
        assert models[adapter].owned_by == "default"
        assert models[adapter].created > 1_700_000_000
        assert models[folder].created > 1_700_000_000

    def test_one_is_shown_by_whatever_it_is_named(self, openai: OpenAI, service: Service) -> None:
        named = ["file:tiny", f"file:{service.models}/tiny", "org/one", "org/family-2"]
        for name in named:
            assert openai.models.retrieve(name).id == name
        for name in ("org/other", "gpt-4o-mini", "file:nothing", "file:///etc", new_id("job")):
            with pytest.raises(NotFoundError) as refused:
                openai.models.retrieve(name)
            assert refused.value.code == "model_not_found"

    def test_an_unfinished_job_is_no_model(self, openai: OpenAI, service: Service) -> None:
        with pytest.raises(NotFoundError):
            openai.models.retrieve(service.submit()["id"])

    def test_a_base_model_is_not_deleted(self, openai: OpenAI, service: Service) -> None:
        with pytest.raises(ConflictError, match="Adapters alone are deleted"):
            openai.models.delete("file:tiny")
        with pytest.raises(NotFoundError):
            openai.models.delete("org/other")
        assert (service.models / "tiny" / "config.json").exists()


class TestErrors:
    def test_a_route_that_is_not_there_is_openais_404(self, openai: OpenAI) -> None:
        with pytest.raises(NotFoundError) as refused:
            openai.chat.completions.create(model="m", messages=[])
        assert (refused.value.code, refused.value.type) == ("not_found", "invalid_request_error")

    def test_every_kind_of_error_has_openais_shape(self, service: Service) -> None:
        def ask(method: str, path: str, **more: Any) -> httpx2.Response:
            return service.http.request(method, path, **more)

        broken = {"content": b"{", "headers": {"content-type": "application/json"}}
        answers = {
            400: ask("POST", "/v1/fine_tuning/jobs", **broken),
            403: ask("POST", "/v1/files", headers={"Sec-Fetch-Site": "cross-site"}),
            404: ask("GET", "/v1"),
            405: ask("PUT", "/v1/files"),
            413: ask("POST", "/v1/fine_tuning/jobs", content=b" " * (2 << 20)),
            415: ask("POST", "/v1/fine_tuning/jobs", content=b"x"),
            421: ask("GET", "/v1/models", headers={"Host": "evil.example"}),
        }
        for status, answer in answers.items():
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["x-request-id"]
            assert set(answer.json()) == {"error"}
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
            assert error["type"] == "invalid_request_error"
        assert answers[405].headers["allow"] == "GET, POST"
        assert ask("PUT", "/v1/models/a/b").headers["allow"] == "DELETE, GET"
        assert ask("GET", "/v1x").headers["content-type"] == "application/problem+json"

    def test_each_status_is_the_clients_own_error(self, service: Service) -> None:
        class Raised(ServiceError):
            code = "raised"

        async def raising(status: int) -> None:
            Raised.status = status
            raise Raised("Not now.", "Later.", headers={"Retry-After": "0.01"})

        async def breaking() -> None:
            raise RuntimeError("of our own")

        assert isinstance(service.http, TestClient)
        app = service.http.app
        assert isinstance(app, FastAPI)
        app.add_api_route("/v1/raising/{status}", raising)
        app.add_api_route("/v1/breaking", breaking)
        openai = client_of(service, max_retries=1)
        kinds = {
            409: (ConflictError, "invalid_request_error", "0"),
            429: (RateLimitError, "rate_limit_error", "1"),
            503: (InternalServerError, "server_error", "1"),
        }
        for status, (kind, type_, tries) in kinds.items():
            with pytest.raises(kind, match=r"Not now\. Later\.") as refused:
                openai.get(f"/raising/{status}", cast_to=object)
            assert (refused.value.type, refused.value.code) == (type_, "raised")
            assert refused.value.request.headers["x-stainless-retry-count"] == tries
        with pytest.raises(InternalServerError) as broken:
            client_of(service).get("/breaking", cast_to=object)
        assert (broken.value.code, broken.value.type) == ("internal", "server_error")
        assert "of our own" not in broken.value.message
