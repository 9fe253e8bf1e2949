"""Every route is one that the Python client, sync and async, and the command line can ask for.

The table below names how. Each line is done against a small service, which must see the request.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli.main import cli
from flatlora_client import FlatLoraError
from tests.client.both import Connect
from tests.client.conftest import connect as connect
from tests.client.conftest import peer as peer
from tests.client.conftest import served as served
from tests.client.peer import Json, Peer
from tests.contracts.openapi import SNAPSHOT

JOB = "job_" + "0" * 32
SHA256 = "ab" * 32
URL = "https://hooks.example.com"
LARGE = (8 << 20) + 1
"""Bytes of a file that is sent in parts."""

EXCEPTIONS = {
    "healthz": "Whether the process lives is asked by what runs it; `ready` says whether it serves."
}


@dataclass(frozen=True)
class Way:
    """How a route is reached: a method with its arguments, and a command with its words."""

    method: str
    given: tuple[Any, ...]
    command: str
    named: Json = field(default_factory=dict)


WAYS = {
    "list_jobs": Way("jobs.list", (), "jobs list"),
    "create_job": Way(
        "jobs.create", (), "jobs submit -m m -d dataset:ds_1",
        {"base_model": "m", "dataset_uri": "dataset:ds_1"},
    ),
    "get_job": Way("jobs.get", (JOB,), f"jobs show {JOB}"),
    "delete_job": Way("jobs.delete", (JOB,), f"jobs delete {JOB}"),
    "cancel_job": Way("jobs.cancel", (JOB,), f"jobs cancel {JOB}"),
    "pause_job": Way("jobs.pause", (JOB,), f"jobs pause {JOB}"),
    "resume_job": Way("jobs.resume", (JOB,), f"jobs resume {JOB}"),
    "retry_job": Way("jobs.retry", (JOB,), f"jobs retry {JOB}"),
    "list_events": Way("jobs.events", (JOB,), f"jobs events {JOB}"),
    "list_metrics": Way("jobs.metrics", (JOB,), f"jobs metrics {JOB}"),
    "list_logs": Way("jobs.logs", (JOB,), f"jobs logs {JOB}"),
    "list_checkpoints": Way("jobs.checkpoints", (JOB,), f"jobs checkpoints {JOB}"),
    "get_adapter": Way("jobs.download_tar", (JOB, "a.tar"), f"jobs download {JOB} --tar"),
    "get_adapter_file": Way("jobs.download", (JOB, "a"), f"jobs download {JOB}"),
    "list_deliveries": Way("deliveries.list", (JOB,), f"jobs deliveries {JOB}"),
    "retry_delivery": Way("deliveries.retry", ("msg_1",), "webhooks retry msg_1"),
    "list_adapters": Way("adapters.list", (), "adapters list"),
    "show_adapter": Way("adapters.get", (JOB,), f"adapters show {JOB}"),
    "list_datasets": Way("datasets.list", (), "datasets list"),
    "create_dataset": Way("datasets.upload", ("small.jsonl",), "datasets upload small.jsonl"),
    "get_dataset": Way("datasets.get", ("ds_1",), "datasets show ds_1"),
    "delete_dataset": Way("datasets.delete", ("ds_1",), "datasets delete ds_1"),
    "begin_upload": Way("datasets.upload", ("large.jsonl",), "datasets upload large.jsonl"),
    "append_to_upload": Way("datasets.upload", ("large.jsonl",), "datasets upload large.jsonl"),
    "get_upload": Way("datasets.upload_state", (SHA256,), f"datasets upload-state {SHA256}"),
    "forget_upload": Way("datasets.forget_upload", (SHA256,), f"datasets forget-upload {SHA256}"),
    "list_models": Way("models.list", (), "models list"),
    "list_workers": Way("workers.list", (), "workers list"),
    "list_keys": Way("keys.list", (), "keys list --remote"),
    "create_key": Way("keys.create", (), "keys create ci --remote", {"name": "ci"}),
    "revoke_key": Way("keys.revoke", ("key1",), "keys revoke key1 --remote"),
    "list_audit_events": Way("audit.list", (), "audit"),
    "get_quota": Way("quota", (), "quota"),
    "test_webhook": Way("webhooks.test", (URL,), f"webhooks test {URL}"),
    "show_webhook_secret": Way("webhooks.secret", (), "webhooks secret"),
    "rotate_webhook_secret": Way("webhooks.rotate_secret", (), "webhooks secret --rotate"),
    "version": Way("version", (), "version --service"),
    "readyz": Way("ready", (), "version --service"),
}  # fmt: skip


def routes() -> dict[str, tuple[str, str]]:
    """Method and path of each operation outside the façade, which the `openai` client is for."""
    paths = json.loads(SNAPSHOT.read_text())["paths"]
    return {
        operation["operationId"]: (method.upper(), path)
        for path, item in paths.items()
        for method, operation in item.items()
        if not path.startswith("/v1/")
    }


ROUTES = routes()


def test_every_route_has_a_way_or_a_reason() -> None:
    assert not WAYS.keys() & EXCEPTIONS.keys()
    assert WAYS.keys() | EXCEPTIONS.keys() == ROUTES.keys(), (
        "A route has come or gone: name the method of flatlora_client and the command that reach "
        "it in WAYS, or say in EXCEPTIONS why there is none."
    )


@pytest.fixture(autouse=True)
def place(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with files to send, and a service that has one finished job."""
    monkeypatch.setenv("FLATLORA_URL", peer.url)
    monkeypatch.chdir(tmp_path)
    Path("small.jsonl").write_text("{}\n")
    with Path("large.jsonl").open("wb") as large:
        large.truncate(LARGE)
    peer.publish({"adapter_config.json": b"{}"})
    peer.answer("GET /version", {"version": "1", "features": {}})


def reaches(peer: Peer, operation: str) -> bool:
    method, path = ROUTES[operation]
    return bool(peer.asked(f"{method} {re.sub('{.*?}', '*', path)}"))


@pytest.mark.parametrize("operation", WAYS)
def test_a_method_of_either_client_reaches_it(peer: Peer, connect: Connect, operation: str) -> None:
    way = WAYS[operation]
    method: Any = connect(peer.url, max_retries=0)
    for name in way.method.split("."):
        method = getattr(method, name)
    perform(method, way)
    assert reaches(peer, operation), [f"{seen.method} {seen.path}" for seen in peer.seen]


def perform(method: Callable[..., Any], way: Way) -> None:
    """To its end, or to where this service knows no more."""
    try:
        found = method(*way.given, **way.named)
        if isinstance(found, Iterable) and not isinstance(found, str):
            list(found)
    except FlatLoraError:
        pass


@pytest.mark.parametrize("operation", WAYS)
def test_a_command_reaches_it(peer: Peer, operation: str) -> None:
    done = CliRunner().invoke(cli, [*WAYS[operation].command.split(), "--json"])
    assert done.exit_code != 2, done.output
    assert reaches(peer, operation), done.output
