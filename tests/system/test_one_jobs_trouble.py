"""One job's trouble stays that job's: the service answers, and the next job runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.service import EXAMPLES, Json, Service, until

HOSTILE = [
    '{"\\ud800": 1}',
    '{"\\u0000": 1}',
    '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "\\udfff"}]}',
    '{"messages": [{"role": "assistant", "tool_calls": 5, "content": "\\u0000"}]}',
    '{"messages": ' + "[" * 5000 + "]" * 5000 + "}",
    "\x00\x01\x02",
]


def write_rows(service: Service, name: str, rows: list[str]) -> str:
    path = service.folder / name
    path.write_text("\n".join(rows) + "\n")
    return f"file:{path}"


def good_rows() -> list[str]:
    return (EXAMPLES / "data" / "train.jsonl").read_text().splitlines()[:40]


class TestHostileRows:
    def test_they_end_their_own_job_and_are_told_by_their_places(
        self, shared_service: Service, body: Json
    ) -> None:
        uri = write_rows(shared_service, "hostile.jsonl", [*good_rows(), *HOSTILE])
        job_id = shared_service.submit({**body, "dataset_uri": uri, "dry_run": True})
        job = shared_service.wait_for(job_id, lambda job: job["status"] == "failed")
        assert job["failure"]["reason"] == "dataset_invalid"
        for line in range(41, 46):
            assert f"line {line}: " in job["failure"]["message"]
        assert job["attempt"] == 1

    @pytest.mark.torture
    def test_allowed_ones_are_in_the_report_and_the_service_shows_it(
        self, shared_service: Service, body: Json
    ) -> None:
        uri = write_rows(shared_service, "hostile.jsonl", [*good_rows(), *HOSTILE])
        allowing = {**body["data"], "max_bad_rows": len(HOSTILE)}
        job = shared_service.finish(
            shared_service.submit({**body, "dataset_uri": uri, "dry_run": True, "data": allowing})
        )
        assert job["report"]["rows"]["bad"] == len(HOSTILE)
        with shared_service.http as http:
            assert http.get("/jobs").status_code == 200
        assert shared_service.flatlora("jobs", "list").returncode == 0


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """A hub that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        kept: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    kept.append(listening.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


@pytest.fixture
def hub_service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    service.environment["HF_HOME"] = str(tmp_path / "hub")
    yield service
    service.stop()


class TestHub:
    def test_one_that_cannot_be_reached_is_told(self, hub_service: Service, body: Json) -> None:
        hub_service.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
        hub_service.start()
        job_id = hub_service.submit({**body, "base_model": "org/model"})
        job = hub_service.wait_for(job_id, lambda job: job["status"] == "failed")
        assert job["failure"]["reason"] == "base_model_unavailable"
        assert "cannot get org/model from the hub" in job["failure"]["message"]

    @pytest.mark.torture
    def test_a_download_that_stalls_can_be_cancelled(
        self, hub_service: Service, body: Json, silent_hub: str
    ) -> None:
        hub_service.environment["HF_ENDPOINT"] = silent_hub
        hub_service.environment["HF_HUB_ETAG_TIMEOUT"] = "120"  # not before it is cancelled
        hub_service.start()
        job_id = hub_service.submit({**body, "base_model": "org/model"})
        until(lambda: len(hub_service.trainers()) == 1)
        assert hub_service.job(job_id)["phase"] == "fetching"
        with hub_service.http as http:
            http.post(f"/jobs/{job_id}/cancel")
        hub_service.wait_for(job_id, lambda job: job["status"] == "cancelled", seconds=10)
        assert not hub_service.trainers()


@pytest.mark.torture
class TestLeftovers:
    def test_what_a_job_left_that_was_over_before_anybody_could_clear_it_is_cleared(
        self, service: Service, body: Json
    ) -> None:
        job_id = service.finish(service.submit({**body, "dry_run": True}))["id"]
        service.stop()
        left = service.data_dir / "work" / job_id / "checkpoints"
        left.mkdir()
        (left / "large").write_bytes(bytes(1000))
        service.start()
        until(lambda: not left.exists())
        assert (left.parent / "trainer.log").exists()


@pytest.mark.torture
class TestDispatcherAlone:
    def test_it_runs_under_a_manager_that_gives_it_no_input(
        self, service: Service, body: Json
    ) -> None:
        """As systemd, nohup and containers start a program."""
        job_id = service.submit({**body, "dry_run": True})
        service.finish(job_id)
        service.stop()
        with subprocess.Popen(
            [sys.executable, "-m", "worker.dispatcher"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=service.environment,
            cwd=service.folder,
        ) as dispatcher:
            assert dispatcher.stderr
            lines = (json.loads(line)["event"] for line in dispatcher.stderr)
            assert "dispatcher ready" in lines
            os.kill(dispatcher.pid, signal.SIGTERM)
            assert dispatcher.wait(20) == 0
