"""OpenAI's client makes, lists and stops the jobs that the native API knows."""

from datetime import datetime
from typing import Any

import pytest
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from app.db import now
from app.ids import new_id
from app.jobs.states import Phase, Reason, Status
from tests.app.openai_client import client_of, row, upload
from tests.app.service import Json, Service, ok

MODEL = "file:tiny"


@pytest.fixture
def openai(service: Service) -> OpenAI:
    return client_of(service)


def create(openai: OpenAI, **values: Any) -> FineTuningJob:
    given = {"model": MODEL, "training_file": upload(openai).id} | values
    return openai.fine_tuning.jobs.create(**given)


def supervised(**hyperparameters: Any) -> Json:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


REFUSED: list[tuple[Json, str, str]] = [
    ({"model": "gpt-4o-mini"}, "model", "neither a hub id nor a file: URI"),
    ({"model": "job_" + "0" * 32}, "model", "an adapter is not trained further"),
    ({"training_file": "file-abc"}, "training_file", "There is no file 'file-abc'"),
    ({"training_file": f"file-{'0' * 32}"}, "training_file", f"no file file-{'0' * 32}"),
    ({"training_file": "ftp://x"}, "training_file", "does not begin with"),
    ({"validation_file": f"file-{'0' * 32}"}, "validation_file", "POST /v1/files"),
    ({"method": {"type": "dpo", "dpo": {}}}, "method.type", "found 'dpo'"),
    ({"method": {"type": "reinforcement"}}, "method.type", "found 'reinforcement'"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", ""),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater than 0"),
    (
        {"method": supervised(batch_size="many")},
        "method.supervised.hyperparameters.batch_size",
        'found "many"',
    ),
    ({"hyperparameters": {"sigam": 1}}, "hyperparameters.sigam", "Did you mean 'sigma'?"),
    ({"hyperparameters": {"sigma": 2}}, "hyperparameters.sigma", "less than or equal to 1"),
    (
        {"hyperparameters": {"rank": 4}, "method": supervised(rank=8)},
        "method.supervised.hyperparameters.rank",
        "hyperparameters.rank says 4 of the same",
    ),
    (
        {"hyperparameters": {"n_epochs": 1, "max_steps": 5}},
        "hyperparameters.n_epochs",
        "give epochs or max_steps",
    ),
    ({"extra_body": {"flatlora": {"lora": {"a": 1}}}}, "flatlora.lora.a", "no field 'a'"),
    ({"extra_body": {"flatlora": {"lora": 3}}}, "flatlora.lora", "found 3"),
    ({"extra_body": {"flatlora": {"name": ""}}}, "flatlora.name", "at least 1"),
    ({"extra_body": {"wrong": 1}}, "wrong", "There is no field 'wrong'"),
    ({"metadata": {"two words": "x"}}, "metadata.two words", "match pattern"),
    ({"suffix": "x" * 65}, "suffix", "at most 64"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
]


class TestCreate:
    def test_it_is_the_native_job_with_the_native_defaults(
        self, openai: OpenAI, service: Service
    ) -> None:
        file = upload(openai)
        job = openai.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
        native = service.get(f"/jobs/{job.id}")
        assert native["spec"]["base_model"] == MODEL
        assert native["spec"]["dataset_uri"] == file.id.replace("file-", "dataset:ds_")
        assert (job.status, job.model, job.training_file) == ("queued", MODEL, file.id)
        assert job.hyperparameters.to_dict() == {
            "n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 1.0,
            "learning_rate": 2e-4, "rank": 16, "sigma": 0.05,
        }  # fmt: skip
        assert job.method
        assert job.method.type == "supervised"
        assert job.seed == 42
        assert (job.fine_tuned_model, job.finished_at, job.error) == (None, None, None)
        assert (job.result_files, job.trained_tokens, job.metadata) == ([], None, None)
        created_at = datetime.fromisoformat(native["created_at"])
        assert job.created_at == int(created_at.timestamp())

    def test_every_setting_of_openai_has_its_native_place(
        self, openai: OpenAI, service: Service
    ) -> None:
        held_out = upload(openai, "held-out.jsonl", row("b"))
        job = create(
            openai,
            validation_file=held_out.id,
            suffix="nightly",
            seed=7,
            metadata={"team": "search"},
            method=supervised(n_epochs=2, batch_size=8, learning_rate_multiplier=0.1),
        )
        spec = service.get(f"/jobs/{job.id}")["spec"]
        assert spec["evaluation"]["validation_uri"] == held_out.id.replace("file-", "dataset:ds_")
        assert (spec["name"], spec["seed"], spec["labels"]) == ("nightly", 7, {"team": "search"})
        assert spec["training"]["epochs"] == 2
        assert spec["training"]["batch_size"] == 8
        assert spec["training"]["learning_rate"] == 2e-5
        assert (job.validation_file, job.metadata) == (held_out.id, {"team": "search"})
        assert job.hyperparameters.learning_rate_multiplier == 0.1

    @pytest.mark.parametrize("place", ["hyperparameters", "method"])
    def test_our_own_settings_stand_among_the_hyperparameters(
        self, openai: OpenAI, service: Service, place: str
    ) -> None:
        knobs = {"rank": 4, "sigma": 0.1, "learning_rate": 1e-3, "alpha": 9.0, "max_length": 64}
        given = {"hyperparameters": knobs} if place == "hyperparameters" else {
            "method": supervised(**knobs)
        }  # fmt: skip
        spec = service.get(f"/jobs/{create(openai, **given).id}")["spec"]
        assert (spec["rank"], spec["sigma"]) == (4, 0.1)
        assert spec["training"]["learning_rate"] == 1e-3
        assert (spec["lora"]["alpha"], spec["data"]["max_length"]) == (9.0, 64)

    def test_any_part_of_the_native_body_comes_beside_them(
        self, openai: OpenAI, service: Service
    ) -> None:
        more = {"priority": 1, "lora": {"dropout": 0.1}, "resources": {"max_runtime": 60}}
        job = create(openai, method=supervised(alpha=8), extra_body={"flatlora": more})
        spec = service.get(f"/jobs/{job.id}")["spec"]
        assert (spec["lora"]["alpha"], spec["lora"]["dropout"]) == (8, 0.1)
        assert (spec["priority"], spec["resources"]["max_runtime"]) == (1, 60)
        assert job.to_dict()["flatlora"] == spec

    def test_auto_is_the_default(self, openai: OpenAI) -> None:
        auto = create(
            openai,
            method=supervised(
                n_epochs="auto", batch_size="auto", learning_rate_multiplier="auto", rank="auto"
            ),
        )
        plain = create(openai)
        assert auto.hyperparameters == plain.hyperparameters
        assert auto.id != plain.id

    def test_a_dataset_uri_may_stand_for_a_file(self, openai: OpenAI) -> None:
        job = create(openai, training_file="file:train.jsonl")
        assert job.training_file == "file:train.jsonl"

    def test_what_is_wrong_is_named_in_openais_words(self, openai: OpenAI) -> None:
        for given, param, says in REFUSED:
            with pytest.raises(BadRequestError) as refused:
                create(openai, **given)
            assert refused.value.param == param
            assert refused.value.type == "invalid_request_error"
            assert says in refused.value.message
            assert refused.value.code
            assert refused.value.request_id
        assert list(openai.fine_tuning.jobs.list()) == []


class TestShow:
    def test_only_openais_words_of_status_appear(self, openai: OpenAI, service: Service) -> None:
        job = create(openai)
        cases: list[tuple[Json, str]] = [
            ({"status": Status.RUNNING, "phase": Phase.VALIDATING}, "validating_files"),
            ({"status": Status.RUNNING, "phase": Phase.TRAINING}, "running"),
            ({"status": Status.CANCELLING}, "running"),
            ({"status": Status.PAUSING}, "pausing"),
            ({"status": Status.PAUSED}, "paused"),
            ({"status": Status.CANCELLED}, "cancelled"),
            ({"status": Status.FAILED}, "failed"),
        ]
        for values, status in cases:
            service.set(job.id, **values)
            assert openai.fine_tuning.jobs.retrieve(job.id).status == status
        assert {values["status"] for values, _ in cases} | {"queued", "succeeded"} == set(Status)

    def test_a_running_job_says_when_it_will_be_over(
        self, openai: OpenAI, service: Service
    ) -> None:
        job = create(openai)
        progress = {"eta_seconds": 100.0}
        service.set(job.id, status=Status.RUNNING, progress=progress, updated_at=now())
        estimated = openai.fine_tuning.jobs.retrieve(job.id).estimated_finish
        assert estimated
        assert 98 <= estimated - job.created_at <= 110

    def test_a_failed_job_says_why(self, openai: OpenAI, service: Service) -> None:
        job = create(openai)
        values = {"status": Status.FAILED, "message": "Line 37 is broken.", "hint": "Mend it."}
        for reason, param in ((Reason.DATASET_INVALID, "training_file"), (Reason.DISK_FULL, None)):
            service.set(job.id, reason=reason, finished_at=now(), **values)
            failed = openai.fine_tuning.jobs.retrieve(job.id)
            assert failed.error
            assert failed.error.to_dict() == {
                "code": reason, "message": "Line 37 is broken. Mend it.", "param": param
            }  # fmt: skip
            assert failed.finished_at

    def test_a_finished_one_names_its_adapter(self, openai: OpenAI, service: Service) -> None:
        native = service.finished()
        service.set(native["id"], result={"train_tokens": 1234})
        job = openai.fine_tuning.jobs.retrieve(native["id"])
        assert (job.status, job.fine_tuned_model) == ("succeeded", native["id"])
        assert job.trained_tokens == 1234
        assert openai.models.retrieve(job.fine_tuned_model or "").id == native["id"]

    def test_a_dry_run_has_no_model(self, openai: OpenAI, service: Service) -> None:
        job = create(openai, extra_body={"flatlora": {"dry_run": True}})
        # As a worker leaves it: the JSON null, which is not NULL.
        service.set(job.id, status=Status.SUCCEEDED, finished_at=now(), adapter=None)
        shown = openai.fine_tuning.jobs.retrieve(job.id)
        assert (shown.fine_tuned_model, shown.result_files) == (None, [])
        assert job.id not in {model.id for model in openai.models.list()}
        assert list(openai.files.list(purpose="fine-tune-results")) == []

    def test_one_that_is_not_there_is_not_found(self, openai: OpenAI) -> None:
        jobs = openai.fine_tuning.jobs
        for job_id in (new_id("job"), "job_x", "ftjob-abc"):
            for ask in (jobs.retrieve, jobs.cancel, jobs.list_events, jobs.checkpoints.list):
                with pytest.raises(NotFoundError) as refused:
                    ask(job_id)
                assert refused.value.code == "job_not_found"


class TestList:
    def test_the_iterator_turns_the_pages(self, any_service: Service) -> None:
        openai = client_of(any_service)
        made = [any_service.submit(name=str(number))["id"] for number in range(5)]
        listed = [job.id for job in openai.fine_tuning.jobs.list(limit=2)]
        assert listed == made[::-1]
        first = openai.fine_tuning.jobs.list(limit=2)
        assert [first.has_more, len(first.data)] == [True, 2]
        assert openai.fine_tuning.jobs.list(limit=5).has_more is False

    def test_metadata_filters(self, any_service: Service) -> None:
        openai = client_of(any_service)
        jobs = openai.fine_tuning.jobs
        none = any_service.submit()["id"]
        search = any_service.submit(labels={"team": "search"})["id"]
        both = any_service.submit(labels={"team": "search", "run.id": ""})["id"]
        assert [job.id for job in jobs.list(metadata={"team": "search"})] == [both, search]
        wanted = {"team": "search", "run.id": ""}
        assert [job.id for job in jobs.list(metadata=wanted)] == [both]
        assert list(jobs.list(metadata={"team": "other"})) == []
        assert [job.id for job in jobs.list(metadata={})] == [both, search, none]
        assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [none]

    def test_what_cannot_be_a_page_is_refused(self, openai: OpenAI) -> None:
        jobs = openai.fine_tuning.jobs
        for query in ({"after": "job_x"}, {"limit": 0}, {"wrong": "1"}, {"metadata": "x"}):
            with pytest.raises(BadRequestError) as refused:
                jobs.list(extra_query=query)
            assert refused.value.param == next(iter(query))
        with pytest.raises(BadRequestError, match="no name of metadata"):
            jobs.list(metadata={"two words": "x"})


class TestStop:
    def test_cancel_is_repeatable(self, openai: OpenAI) -> None:
        job = create(openai)
        for _ in range(2):
            assert openai.fine_tuning.jobs.cancel(job.id).status == "cancelled"

    def test_a_job_is_paused_and_goes_on(self, openai: OpenAI) -> None:
        job = create(openai)
        for _ in range(2):
            paused: str = openai.fine_tuning.jobs.pause(job.id).status  # none of the client's types
            assert paused == "paused"
        for _ in range(2):
            assert openai.fine_tuning.jobs.resume(job.id).status == "queued"

    def test_an_adapter_is_deleted_with_its_job(self, openai: OpenAI, service: Service) -> None:
        job_id = service.finished()["id"]
        assert openai.models.delete(job_id).deleted is True
        for ask in (openai.models.retrieve, openai.models.delete, openai.fine_tuning.jobs.retrieve):
            with pytest.raises(NotFoundError):
                ask(job_id)

    def test_a_conflict_is_told_once_and_not_tried_again(self, service: Service) -> None:
        openai = client_of(service, max_retries=2)
        job_id = service.finished()["id"]
        with pytest.raises(ConflictError, match="succeeded and cannot be cancelled") as refused:
            openai.fine_tuning.jobs.cancel(job_id)
        assert refused.value.code == "illegal_transition"
        assert refused.value.response.headers["x-should-retry"] == "false"
        assert refused.value.request.headers["x-stainless-retry-count"] == "0"

    def test_the_audit_log_has_the_native_ids(self, openai: OpenAI, service: Service) -> None:
        job = create(openai)
        openai.fine_tuning.jobs.cancel(job.id)
        entries = ok(service.http.get("/audit"), 200)["items"]
        assert [(entry["action"], entry["object"]) for entry in entries] == [
            ("cancel_fine_tuning_job", job.id),
            ("create_fine_tuning_job", job.id),
            ("create_file", job.training_file.replace("file-", "ds_")),
        ]
