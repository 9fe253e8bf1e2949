"""A job through real HTTP against the real processes, as a user sees it."""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.app.receiver import Receiver
from tests.system.conftest import copy_into
from tests.system.service import EXAMPLES, Json, Service, until

TINY_BASE = EXAMPLES / "tiny-base"


def folder_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return folder_hashes(TINY_BASE)


@pytest.fixture(scope="module")
def finished(shared_service: Service, receiver: Receiver, before: dict[str, str]) -> Json:
    body = {
        "base_model": f"file:{TINY_BASE}",
        "dataset_uri": f"file:{EXAMPLES / 'data' / 'train.jsonl'}",
        "rank": 8,
        "sigma": 0.05,
        "data": {"max_length": 192},
        "training": {"max_steps": 30, "batch_size": 8, "learning_rate": 3e-3},
        "evaluation": {"validation_uri": f"file:{EXAMPLES / 'data' / 'test.jsonl'}"},
        "webhook_url": receiver.url(),
    }
    return shared_service.finish(shared_service.submit(body))


@pytest.fixture(scope="module")
def adapter(
    shared_service: Service, finished: Json, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    with shared_service.http as http:
        response = http.get(f"/jobs/{finished['id']}/adapter")
    folder = tmp_path_factory.mktemp("adapter")
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        tar.extractall(folder, filter="data")
    (inner,) = folder.iterdir()
    return inner


class TestFinishedJob:
    def test_the_held_out_loss_falls(self, finished: Json) -> None:
        held_out = finished["result"]["held_out"]
        assert held_out["after"]["loss"] < held_out["before"]["loss"] - 0.5

    def test_the_base_models_files_are_as_they_were(
        self, finished: Json, before: dict[str, str]
    ) -> None:
        assert folder_hashes(TINY_BASE) == before

    def test_peft_reproduces_the_held_out_loss(self, finished: Json, adapter: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter)
        model.eval()
        loss = held_out_loss(model, AutoTokenizer.from_pretrained(adapter))
        assert loss == pytest.approx(finished["result"]["held_out"]["after"]["loss"], abs=1e-4)

    def test_every_step_is_in_the_metrics_and_sigma_rises(
        self, shared_service: Service, finished: Json
    ) -> None:
        with shared_service.http as http:
            items = http.get(f"/jobs/{finished['id']}/metrics?series=train").json()["items"]
        assert [item["step"] for item in items] == list(range(1, 31))
        sigmas = [item["data"]["sigma"] for item in items]
        assert sigmas == sorted(sigmas)
        assert 0 < sigmas[-1] <= 0.05

    def test_the_events_tell_its_life_in_order(
        self, shared_service: Service, finished: Json
    ) -> None:
        with shared_service.http as http:
            items = http.get(f"/jobs/{finished['id']}/events").json()["items"]
        assert [item["seq"] for item in items] == list(range(1, len(items) + 1))
        types = [item["type"] for item in items]
        assert types[:3] == ["job.queued", "job.running", "job.preflight"]
        assert types[-1] == "job.succeeded"

    def test_single_files_are_those_of_the_archive(
        self, shared_service: Service, finished: Json, adapter: Path
    ) -> None:
        assert {file["name"] for file in finished["adapter"]["files"]} == {
            path.name for path in adapter.iterdir()
        }
        with shared_service.http as http:
            for file in finished["adapter"]["files"]:
                content = http.get(f"/jobs/{finished['id']}/adapter/{file['name']}").content
                assert hashlib.sha256(content).hexdigest() == file["sha256"]
                assert (adapter / file["name"]).read_bytes() == content

    def test_nothing_but_its_description_and_log_stays_on_the_worker(
        self, shared_service: Service, finished: Json
    ) -> None:
        work = shared_service.data_dir / "work" / finished["id"]
        until(lambda: {path.name for path in work.iterdir()} == {"job.json", "trainer.log"})

    def test_its_webhook_was_told_of_all_of_it_and_each_word_is_signed(
        self, shared_service: Service, receiver: Receiver, finished: Json
    ) -> None:
        until(lambda: "job.succeeded" in receiver.types, seconds=10)
        with shared_service.http as http:
            secret = http.get("/webhooks/secret").json()["secret"]
            log = http.get(f"/jobs/{finished['id']}/deliveries").json()["items"]
        told = [message.verify(secret) for message in receiver.messages]
        begun, *between, ended = receiver.types
        assert (begun, ended) == ("job.running", "job.succeeded")
        assert set(between) == {"job.checkpoint"}
        assert {one["data"]["id"] for one in told} == {finished["id"]}
        assert told[-1]["data"]["result"] == finished["result"]
        assert [one["id"] for one in log] == receiver.ids


def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Mean cross-entropy over the assistant's tokens, row by row, with nothing of ours."""
    import json

    total, count = 0.0, 0
    for line in (EXAMPLES / "data" / "test.jsonl").read_text().splitlines():
        rendered = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([rendered["input_ids"]])
        mask = torch.tensor(rendered["assistant_masks"], dtype=torch.bool)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total += losses[mask].sum().item()
        count += int(mask.sum())
    return total / count


@pytest.mark.torture
class TestUploadedDataset:
    def test_it_is_read_like_the_same_file(self, shared_service: Service, body: Json) -> None:
        rows = EXAMPLES / "data" / "train.jsonl"
        with shared_service.http as http:
            upload = http.post(
                "/datasets", params={"filename": "train.jsonl"}, content=rows.read_bytes(),
                headers={"Content-Type": "application/octet-stream"},
            )  # fmt: skip
        assert upload.status_code == 201, upload.text
        body["dry_run"] = True
        by_upload = shared_service.submit({**body, "dataset_uri": upload.json()["uri"]})
        by_file = shared_service.submit(body)
        reports = [shared_service.finish(job_id)["report"] for job_id in (by_upload, by_file)]
        for report in reports:
            assert report.pop("time")["seconds"] > 0  # of this moment's machine
            report["memory"].pop("device_free_bytes")
        assert reports[0] == reports[1]
        assert reports[0]["rows"]["used"] > 500


class TestDryRun:
    def test_it_ends_with_the_report_and_without_an_adapter(
        self, shared_service: Service, body: Json
    ) -> None:
        job = shared_service.finish(shared_service.submit({**body, "dry_run": True}))
        assert job["adapter"] is None
        assert job["report"]["rows"]["read"] > 100


class TestCancel:
    def test_a_running_job_stops_and_its_trainer_is_gone(
        self, service: Service, body: Json
    ) -> None:
        body["training"]["max_steps"] = 5000
        job_id = service.submit(body)
        service.wait_for(job_id, lambda job: job["step"] >= 3)
        with service.http as http:
            assert http.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelling"
        job = service.wait_for(job_id, lambda job: job["status"] == "cancelled", seconds=10)
        assert job["finished_at"]
        assert not service.trainers()
        with service.http as http:
            again = http.post(f"/jobs/{job_id}/cancel")
        assert (again.status_code, again.json()["status"]) == (202, "cancelled")

    @pytest.mark.torture
    def test_a_queued_job_stops_at_once(self, service: Service, body: Json) -> None:
        body["training"]["max_steps"] = 5000
        first, second = service.submit(body), service.submit(body)
        assert service.job(second)["queue_position"] is not None
        with service.http as http:
            assert http.post(f"/jobs/{second}/cancel").json()["status"] == "cancelled"
            http.post(f"/jobs/{first}/cancel")
        service.wait_for(first, lambda job: job["status"] == "cancelled", seconds=20)


@pytest.mark.torture
class TestFailedJob:
    def test_a_bad_row_is_named_by_its_line_and_the_service_goes_on(
        self, service: Service, body: Json, broken_rows: Path
    ) -> None:
        uri = copy_into(service, broken_rows)
        job_id = service.submit({**body, "dataset_uri": uri})
        job = service.wait_for(job_id, lambda job: job["status"] == "failed")
        assert job["failure"]["reason"] == "dataset_invalid"
        assert job["failure"]["yours_to_fix"] is True
        assert "line 37" in job["failure"]["message"]
        service.finish(service.submit({**body, "dry_run": True}))

    def test_max_runtime_stops_it(self, service: Service, body: Json) -> None:
        body["training"]["max_steps"] = 5000
        job_id = service.submit({**body, "resources": {"max_runtime": 4}})
        job = service.wait_for(job_id, lambda job: job["status"] == "failed", seconds=60)
        assert job["failure"]["reason"] == "max_runtime"
        assert not service.trainers()

    def test_a_file_that_goes_away_after_submitting_is_explained(
        self, service: Service, body: Json
    ) -> None:
        blocker = service.submit({**body, "training": {"max_steps": 5000, "batch_size": 4}})
        uri = copy_into(service, EXAMPLES / "data" / "train.jsonl")
        job_id = service.submit({**body, "dataset_uri": uri})
        Path(uri.removeprefix("file:")).unlink()
        with service.http as http:
            http.post(f"/jobs/{blocker}/cancel")
        job = service.wait_for(job_id, lambda job: job["status"] == "failed", seconds=60)
        assert job["failure"]["reason"] == "dataset_unavailable"
        assert Path(uri).name in job["failure"]["message"]
