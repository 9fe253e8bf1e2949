"""Schemathesis over the whole document: no 5xx, and every answer is one that is promised.

It sends requests that fit the schema, requests that do not, and chains of requests that use what
earlier ones have made. In every run some; ten thousand where asked for: ``pytest -m torture``.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from tests.faults.procs import reserve_port
from tests.system.service import EXAMPLES, ROOT
from tests.waiting import until

KEY = "flk_operator_of_the_fuzzed_service"
# A job that fits its schema may still name a model that is not here.
NOT_CHECKED = "positive_data_acceptance"


@pytest.fixture(params=["sqlite"])
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The API alone, in a process of its own: jobs wait, and the examples of the document fit."""
    database = {}
    if request.param == "postgres":
        database["FLATLORA_DATABASE_URL"] = request.getfixturevalue("migrated_postgres_url")
    with reserve_port() as reserved:
        # By its number: on a socket that it is given, uvicorn lets each answer wait 40 ms (Nagle).
        port = reserved.getsockname()[1]
        environment = {
            **{name: value for name, value in os.environ.items() if "FLATLORA" not in name},
            "FLATLORA_DATA_DIR": str(tmp_path / "data"),
            "FLATLORA_API_KEY": KEY,
            "FLATLORA_DATASET_ROOTS": str(ROOT),
            "FLATLORA_MODEL_ROOTS": str(ROOT),
            "FLATLORA_LOG_LEVEL": "error",
            **database,
        }
        migrate = [sys.executable, "-m", "app.cli.main", "migrate"]
        (tmp_path / "data").mkdir(mode=0o700)
        subprocess.run(migrate, env=environment, check=True, capture_output=True)
        command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:make_app"]
        command += ["--port", str(port), "--log-level", "warning"]
        server = subprocess.Popen(command, env=environment)
        url = f"http://127.0.0.1:{port}"
        until(lambda: _is_ready(url))
        yield url
        assert server.poll() is None, "the API has died"
        server.terminate()
        assert server.wait(30) in {0, -15}


def _is_ready(url: str) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/readyz", timeout=30).is_success
    return False


CONFIG = """
[parameters]
"header.Flatlora-Project" = "default"  # another is refused before anything else is looked at

[[operations]]
include-operation-id = "get_job"
parameters = { wait = 0 }  # a long-poll that waits is tested elsewhere

[[operations]]
include-operation-id = "list_events"
phases.coverage.enabled = false  # its header is a number, so one more header would be a mistake
"""


def fuzz(url: str, folder: Path, *options: str, key: str | None = KEY) -> int:
    """Run it; how many cases it has sent."""
    with_key = ["--header", f"Authorization: Bearer {key}"] if key else []
    (folder / "schemathesis.toml").write_text(CONFIG)
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert program
    done = subprocess.run(
        [program, "run", f"{url}/openapi.json", *with_key, "--no-color", "--continue-on-failure",
         "--suppress-health-check", "filter_too_much", "--exclude-checks", NOT_CHECKED, *options],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    found = re.search(r"([\d,]+) generated", done.stdout)
    assert found, done.stdout
    return int(found[1].replace(",", ""))


def test_every_operation_keeps_its_promises(api: str, tmp_path: Path) -> None:
    assert EXAMPLES.is_relative_to(ROOT)
    phases = ("--phases", "examples,fuzzing,stateful", "--max-examples", "2", "--seed", "1")
    assert fuzz(api, tmp_path, *phases) > 100


@pytest.mark.torture
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("api", "key"),
    [("sqlite", KEY), ("postgres", KEY), ("sqlite", None)],
    ids=["with a key", "with a key, on Postgres", "without a key"],
    indirect=["api"],
)
def test_ten_thousand_cases(api: str, tmp_path: Path, key: str | None) -> None:
    assert fuzz(api, tmp_path, "--max-examples", "250", key=key) >= 10_000
