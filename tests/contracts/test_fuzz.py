"""Schemathesis over the whole document: no 5xx, and every answer is one that is promised.

It sends requests that fit the schema, requests that do not, and chains of requests that use what
earlier ones have made, to a service that has jobs in every state and a worker that runs new ones.
In every run some; ten thousand where asked for: ``pytest -m torture``.
"""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.contracts.openapi import document
from tests.contracts.stocked import KEY, Stock, serving
from tests.system.service import EXAMPLES, ROOT

# A job that fits its schema may still name a model that is not here.
NOT_CHECKED = "positive_data_acceptance"


@dataclass
class Api:
    url: str
    stock: Stock

    def answered(self) -> Counter[tuple[str, int]]:
        """How often each operation has answered with each status."""
        samples = [
            sample
            for family in text_string_to_metric_families(httpx2.get(f"{self.url}/metrics").text)
            for sample in family.samples
            if sample.name == "flatlora_http_request_seconds_count"
        ]
        found: Counter[tuple[str, int]] = Counter()
        for sample in samples:
            route = sample.labels["route"].replace(":path}", "}")
            key = f"{sample.labels['method']} {route}", int(sample.labels["status"])
            found[key] += int(sample.value)
        return found


@pytest.fixture(params=["sqlite"])
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Api]:
    """A service of its own, with jobs in every state; the examples of the document fit it."""
    database_url = request.getfixturevalue(f"migrated_{request.param}_url")
    with (
        serving(tmp_path, database_url) as (url, receiver),
        closing(Stock(url, receiver)) as stock,
    ):
        stock.fill()
        yield Api(url, stock)


SETTINGS = """
generation.max-examples = %(examples)d

# What the service has, most of the time; else what Schemathesis makes up.
[parameters]
"header.Flatlora-Project" = "default"  # another is refused before anything else is looked at
"header.Range" = { dictionary = "ranges", probability = 0.5 }
"path.dataset_id" = { dictionary = "datasets", probability = 0.7 }
"path.delivery_id" = { dictionary = "deliveries", probability = 0.7 }
"path.file" = { dictionary = "files of adapters", probability = 0.9 }
"path.file_id" = { dictionary = "files", probability = 0.7 }
"path.fine_tuning_job_id" = { dictionary = "jobs", probability = 0.7 }
"path.job_id" = { dictionary = "jobs", probability = 0.7 }
"path.key_id" = { dictionary = "keys", probability = 0.7 }
"path.model" = { dictionary = "finished", probability = 0.7 }
"path.sha256" = { dictionary = "uploads", probability = 0.7 }

[[operations]]
include-operation-id = "get_job"
parameters = { wait = 0 }  # a long-poll that waits is tested elsewhere

[[operations]]
include-operation-id = "list_events"
phases.coverage.enabled = false  # its header is a number, so one more header would be a mistake

[[operations]]
include-operation-id = ["get_adapter", "get_adapter_file", "show_adapter", "get_file_content"]
generation.max-examples = %(downloads)d
parameters."path.job_id" = { dictionary = "finished", probability = 0.9 }

[[operations]]
include-operation-id = "retry_job"
parameters."path.job_id" = { dictionary = "over", probability = 0.7 }

[[operations]]
include-operation-id = "create_fine_tuning_job"
parameters."body.model" = { dictionary = "models", probability = 0.7 }
parameters."body.training_file" = { dictionary = "files", probability = 0.7 }

[[operations]]
include-operation-id = "test_webhook"
parameters."body.url" = { dictionary = "hooks", probability = 0.7 }

[[operations]]
include-operation-id = "append_to_upload"
parameters."header.Upload-Offset" = { dictionary = "offsets", probability = 0.5 }

# These use up what they name: it is not what the others read.
[[operations]]
include-operation-id = "cancel_job"
parameters."path.job_id" = { dictionary = "stopped", probability = 0.7 }

[[operations]]
include-operation-id = "cancel_fine_tuning_job"
parameters."path.fine_tuning_job_id" = { dictionary = "stopped", probability = 0.7 }

[[operations]]
include-operation-id = "delete_job"
parameters."path.job_id" = { dictionary = "spent", probability = 0.7 }

[[operations]]
include-operation-id = "delete_openai_model"
parameters."path.model" = { dictionary = "spent models", probability = 0.7 }

[[operations]]
include-operation-id = "delete_dataset"
parameters."path.dataset_id" = { dictionary = "spent datasets", probability = 0.7 }

[[operations]]
include-operation-id = "forget_upload"
parameters."path.sha256" = { dictionary = "spent uploads", probability = 0.7 }

[[operations]]
include-operation-id = "delete_file"
parameters."path.file_id" = { dictionary = "spent files", probability = 0.7 }
"""
RANGES = ["bytes=0-9", "bytes=5-", "bytes=-3"]
DOWNLOADS = ("GET /jobs/{job_id}/adapter", "GET /jobs/{job_id}/adapter/{file}")
RECORDS = ("events", "logs", "metrics", "checkpoints", "deliveries")
MET = {
    *((download, status) for download in DOWNLOADS for status in (200, 206)),
    *((f"GET /jobs/{{job_id}}/{record}", 200) for record in RECORDS),
    ("GET /adapters/{job_id}", 200),
    ("GET /v1/files/{file_id}/content", 206),
    ("POST /jobs/{job_id}/retry", 202),
    ("POST /deliveries/{delivery_id}/retry", 202),
    ("DELETE /jobs/{job_id}", 204),
}
"""What the smallest run is answered too: nobody answers so who has no finished job."""
OPERATIONS = {
    f"{method.upper()} {path}" for path, item in document()["paths"].items() for method in item
}


def settings(stock: Stock, examples: int) -> str:
    numbers = {"examples": examples, "downloads": max(examples, 12)}
    lists = {**stock.ids, "ranges": RANGES, "offsets": [0]}
    written = [f"{json.dumps(name)}.values = {json.dumps(ids)}" for name, ids in lists.items()]
    return "\n".join([SETTINGS % numbers, "[dictionaries]", *written])


def fuzz(api: Api, folder: Path, *options: str, examples: int, key: str | None = KEY) -> int:
    """Run it; how many cases it has sent."""
    with_key = ["--header", f"Authorization: Bearer {key}"] if key else []
    (folder / "schemathesis.toml").write_text(settings(api.stock, examples))
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert program
    done = subprocess.run(
        [program, "run", f"{api.url}/openapi.json", *with_key, "--no-color",
         "--continue-on-failure", "--suppress-health-check", "filter_too_much",
         "--exclude-checks", NOT_CHECKED, *options],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    found = re.search(r"([\d,]+) generated", done.stdout)
    assert found, done.stdout
    return int(found[1].replace(",", ""))


def test_every_operation_keeps_its_promises(api: Api, tmp_path: Path) -> None:
    assert EXAMPLES.is_relative_to(ROOT)
    before = api.answered()
    phases = ("--phases", "examples,fuzzing,stateful", "--seed", "1")
    assert fuzz(api, tmp_path, *phases, examples=2) > 100
    assert set(api.answered() - before) >= MET


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("api", "key"),
    [("sqlite", KEY), ("postgres", KEY), ("sqlite", None)],
    ids=["with a key", "with a key, on Postgres", "without a key"],
    indirect=["api"],
)
def test_ten_thousand_cases(api: Api, tmp_path: Path, key: str | None) -> None:
    before = api.answered()
    assert fuzz(api, tmp_path, examples=250, key=key) >= 10_000
    if key:
        met = api.answered() - before
        assert {operation for operation, status in met if status < 300} >= OPERATIONS
