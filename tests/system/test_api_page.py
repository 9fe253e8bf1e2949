"""docs/api.md is run as it stands there: first all of its curl, then all of its Python."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import WebhookVerificationError

from flatlora_client import FlatLora
from tests.app.receiver import Receiver
from tests.system.service import EXAMPLES, ROOT, Service

PAGE = (ROOT / "docs" / "api.md").read_text()
BLOCK = re.compile(
    r"(?:<!-- (not run: [^>]+|run on demand) -->\n)?^```(bash|python)\n(.*?)^```", re.M | re.S
)
ON_DEMAND = pytest.mark.parametrize(
    "on_demand", [False, pytest.param(True, marks=pytest.mark.torture)]
)
"""Some blocks need a trainer once more, or load torch."""
TOOLS = ("bash", "curl", "jq", "sha256sum", "tar")


def blocks(language: str, *, on_demand: bool = False) -> list[str]:
    """Those that are to be run."""
    spared = ("not run",) if on_demand else ("not run", "run on demand")
    found = BLOCK.findall(PAGE)
    return [text for mark, kind, text in found if kind == language and not mark.startswith(spared)]


def meant(written: str, replacements: dict[str, str]) -> str:
    """The page's text, with what is another in this test."""
    for name, value in replacements.items():
        written = written.replace(name, value)
    return written


@pytest.fixture(scope="module")
def folder(shared_service: Service) -> Path:
    """Where the service was started, and where the page's commands are given."""
    (shared_service.folder / "examples").symlink_to(EXAMPLES)
    return shared_service.folder


@pytest.fixture(scope="module")
def replacements(shared_service: Service, receiver: Receiver) -> dict[str, str]:
    return {
        "http://127.0.0.1:8321": f"http://127.0.0.1:{shared_service.port}",
        "flatlora-data/api_key": str(shared_service.data_dir / "api_key"),
        "https://hooks.example.com/flatlora": receiver.url("/flatlora"),
        # It has to come to an end, not to learn: the demo shows that.
        '"max_steps": 150': '"max_steps": 6',
    }


def run(command: Sequence[str], script: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        input=script, cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{script}"
    return done.stdout


def test_what_is_replaced_stands_on_the_page(replacements: dict[str, str]) -> None:
    assert [name for name in replacements if name not in PAGE] == []


def test_every_block_is_one_that_can_be_run_or_says_why_not() -> None:
    assert len(re.findall(r"^```\w+$", PAGE, re.M)) == len(BLOCK.findall(PAGE))
    assert len(blocks("bash")) >= 10
    assert len(blocks("python")) >= 10


class TestFirstToLast:
    @pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}")
    @ON_DEMAND
    def test_with_curl(
        self, folder: Path, replacements: dict[str, str], receiver: Receiver, on_demand: bool
    ) -> None:
        script = "\n".join(["set -euo pipefail", *blocks("bash", on_demand=on_demand)])
        told = run(["bash"], meant(script, replacements), folder)
        for words in ('"status": "succeeded"', "job.succeeded", '"delivered": true'):
            assert words in told
        assert ("pausing\nqueued\ncancel" in told) is on_demand
        assert '"code": "invalid_request"' in told
        assert '"pointer": "/sigmma"' in told
        assert "webhook.test" in receiver.types

    @ON_DEMAND
    def test_with_python(
        self,
        shared_service: Service,
        folder: Path,
        replacements: dict[str, str],
        receiver: Receiver,
        on_demand: bool,
    ) -> None:
        key = (shared_service.data_dir / "api_key").read_text().strip()
        written = "\n".join(blocks("python", on_demand=on_demand))
        told = run(
            [sys.executable, "-"],
            meant(written, replacements),
            folder,
            FLATLORA_URL=f"http://127.0.0.1:{shared_service.port}",
            FLATLORA_API_KEY=key,
            PYTHONPATH=str(ROOT),
        )
        assert "job.succeeded" in told
        assert "422 invalid_request" in told
        assert (folder / "adapter-python" / "adapter_model.safetensors").exists()
        with shared_service.http as http:
            trained = http.get("/adapters").json()["items"]
        assert len(trained) == 1, "one key, one body, one job"

    def test_its_receiver_takes_what_was_sent_and_nothing_altered(
        self, shared_service: Service, receiver: Receiver
    ) -> None:
        key = (shared_service.data_dir / "api_key").read_text().strip()
        with FlatLora(f"http://127.0.0.1:{shared_service.port}", key) as client:
            client.webhooks.test(receiver.url())
            (written,) = [block for block in blocks("python") if "def receive" in block]
            names: dict[str, Any] = {"client": client}
            exec(written, names)  # noqa: S102 - it is the page's own
        message = receiver.messages[-1]
        assert names["receive"](message.body, message.headers) == "webhook.test"
        with pytest.raises(WebhookVerificationError):
            names["receive"](message.body + b" ", message.headers)
