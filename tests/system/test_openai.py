"""The stock client of OpenAI, with no more than its base URL changed, trains an adapter here."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.system.service import EXAMPLES, ROOT, Service


@pytest.fixture(scope="module")
def service(shared_service: Service) -> Service:
    return shared_service


def url(service: Service) -> str:
    return f"http://127.0.0.1:{service.port}/v1"


def key(service: Service) -> str:
    return (service.data_dir / "api_key").read_text().strip()


@pytest.fixture(scope="module")
def openai(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=url(service), api_key=key(service)) as client:
        yield client


@pytest.fixture(scope="module")
def trained(service: Service) -> str:
    """What the example of the page prints, run as it stands there on the fewer rows."""
    page = (ROOT / "docs" / "openai.md").read_text()
    (example,) = re.findall(r"```python\n(from openai import OpenAI.*?)```", page, re.DOTALL)
    for written, meant in {
        "http://127.0.0.1:8321/v1": url(service),
        "flk_…": key(service),
        "file:examples/tiny-base": f"file:{EXAMPLES / 'tiny-base'}",
        "train.jsonl": "test.jsonl",
    }.items():
        assert written in example
        example = example.replace(written, meant)
    command = [sys.executable, "-W", "error", "-c", example]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


class TestTraining:
    def test_the_example_of_the_page_trains_an_adapter_with_noise(
        self, service: Service, openai: OpenAI, trained: str
    ) -> None:
        adapter, _, results = trained.partition("\n")
        job = openai.fine_tuning.jobs.retrieve(adapter)
        assert (job.status, job.fine_tuned_model) == ("succeeded", adapter)
        assert job.hyperparameters.to_dict()["sigma"] == 0.05
        assert job.trained_tokens
        assert openai.models.retrieve(adapter).owned_by == job.organization_id == "default"
        assert adapter in {model.id for model in openai.models.list()}
        assert results.startswith("step,train_loss,train_accuracy,valid_loss,")
        native = service.job(adapter)
        assert native["result"]["sigma"] == 0.05
        assert native["result"]["perturbed_layers"] > 0
        with service.http as http:
            config = http.get(f"/jobs/{adapter}/adapter/adapter_config.json").json()
            assert config["r"] == 8
            listed = http.get("/adapters")
        assert adapter in {item["job_id"] for item in listed.json()["items"]}

    def test_the_asynchronous_client_hears_what_happened(
        self, service: Service, trained: str
    ) -> None:
        job_id = trained.partition("\n")[0]

        async def look() -> None:
            async with AsyncOpenAI(base_url=url(service), api_key=key(service)) as client:
                jobs = client.fine_tuning.jobs
                events = [event async for event in jobs.list_events(job_id, limit=3)]
                told = [event.to_dict()["data"]["event"] for event in events]  # type: ignore[index] # a dict
                assert (told[0], told[-1]) == ("job.succeeded", "job.queued")
                assert "metrics" in {event.type for event in events}
                listed = jobs.checkpoints.list(job_id, limit=1)
                checkpoints = [checkpoint async for checkpoint in listed]
                assert checkpoints[0].metrics.train_loss
                assert checkpoints[0].metrics.full_valid_loss  # the last step is evaluated
                steps = [found.step_number for found in checkpoints]
                assert steps == sorted(steps, reverse=True)

        asyncio.run(look())
