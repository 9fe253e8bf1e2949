"""From ``POST /jobs`` to the rows on a worker, fetched by a process that can be killed."""

import json
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.objects import connect
from app.settings import Settings
from tests.app.net.conftest import authority as authority
from tests.app.net.conftest import forbidden as forbidden
from tests.app.net.conftest import site as site
from tests.app.net.world import NETWORK, PUBLIC, Forbidden, Site, give, redirect
from tests.app.service import Service
from tests.emulators import GoogleServer
from tests.system.service import processes, until
from tests.worker.hub import COMMITS, Hub, small_hub
from tests.worker.ordering import ROWS
from worker.inputs import LOG_FILE, read_job
from worker.process import _environment
from worker.slot import Bench, Slot
from worker.trainer import Signals, _die_at_once
from worker.training.errors import Stopped

Json = dict[str, Any]
SECRETS = {
    "HF_TOKEN": "hf_token", "AWS_SECRET_ACCESS_KEY": "aws", "AZURE_STORAGE_KEY": "azure",
    "FLATLORA_DATABASE_URL": "postgresql://u:p@h/d", "FLATLORA_API_KEY": "flk_1",
    "IDENTITY_HEADER": "identity",
}  # fmt: skip


@pytest.fixture
def settings(
    tmp_path: Path, migrated_sqlite_url: str, site: Site, forbidden: Forbidden
) -> Settings:
    """The training is done by a script, the fetching is real."""
    return Settings.model_validate({
        "data_dir": tmp_path / "data", "database_url": migrated_sqlite_url, "auth": "none",
        "dataset_roots": [tmp_path / "rows"], "model_roots": [tmp_path / "models"],
        "trainer_module": "tests.worker.scripted_trainer", "retry_seconds": 0,
        "allowed_networks": NETWORK, "allowed_ports": [site.port, forbidden.port],
        "dataset_buckets": "s3://flatlora,az://flatlora,gs://flatlora", "heartbeat_seconds": 1,
    })  # fmt: skip


@pytest.fixture
def service(settings: Settings, tmp_path: Path) -> Iterator[Service]:
    (tmp_path / "rows").mkdir()
    with TestClient(create_app(settings), base_url="http://localhost") as http:
        service = Service(http, settings)
        yield service
        service.engine.dispose()


def attempt(service: Service) -> None:
    """Work on the next job as a worker does."""
    bench = Bench(service.settings, Slot("slot", "cpu"), threading.Event())
    with closing(bench):
        assert bench.run_next()


def submitted(service: Service, uri: str, **values: Any) -> tuple[str, Path]:
    """The job's id, and its folder with a script for the trainer that comes after the fetching."""
    job_id = service.submit(dataset_uri=uri, **values)["id"]
    folder = service.settings.work_dir / job_id
    folder.mkdir(parents=True)
    failed = {"kind": "failed", "reason": "config_invalid", "message": "enough", "hint": None}
    script = {"then": "exit", "code": 1, "says": [failed]}
    (folder / "script.json").write_text(json.dumps(script))
    return job_id, folder


def failure_of(service: Service, uri: str) -> Json:
    job_id, _ = submitted(service, uri)
    attempt(service)
    job = service.get(f"/jobs/{job_id}")
    assert job["status"] == "failed"
    assert job["attempt"] == 1
    failure: Json = job["failure"]
    return failure


class TestFetched:
    def test_from_a_site(self, service: Service, site: Site, tmp_path: Path) -> None:
        site.routes |= {"/rows.jsonl": give(ROWS), "/held-out": give(b"{}\n")}
        job_id, folder = submitted(
            service, site.url("/rows.jsonl?sig=secret"),
            evaluation={"validation_uri": site.url("/held-out")},
        )  # fmt: skip
        attempt(service)
        assert service.get(f"/jobs/{job_id}")["failure"]["message"] == "enough"
        described = read_job(folder)
        assert described.dataset.uri == site.url("/rows.jsonl")
        assert (described.dataset.filename, described.dataset.revision) == ("rows.jsonl", None)
        assert "revision" not in json.loads((folder / "job.json").read_text())["dataset"]
        assert described.validation is not None
        assert "secret" not in (folder / LOG_FILE).read_text()

    def test_from_a_bucket(self, service: Service, s3_url: str) -> None:
        obstore.put(connect("s3://flatlora"), "from-a-bucket.jsonl", ROWS)
        job_id, folder = submitted(service, "s3://flatlora/from-a-bucket.jsonl")
        attempt(service)
        assert service.get(f"/jobs/{job_id}")["failure"]["message"] == "enough"
        assert read_job(folder).dataset.filename == "from-a-bucket.jsonl"

    @pytest.mark.torture
    def test_from_a_container_of_azure(self, service: Service, azure_url: str) -> None:
        obstore.put(connect("az://flatlora"), "from-a-container.jsonl", ROWS)
        job_id, folder = submitted(service, "az://flatlora/from-a-container.jsonl")
        attempt(service)
        assert service.get(f"/jobs/{job_id}")["failure"]["message"] == "enough"
        assert read_job(folder).dataset.filename == "from-a-container.jsonl"

    @pytest.mark.torture
    def test_from_a_bucket_of_google(self, service: Service, google: GoogleServer) -> None:
        google.put("from-google.jsonl", ROWS)
        job_id, folder = submitted(service, "gs://flatlora/from-google.jsonl")
        attempt(service)
        assert service.get(f"/jobs/{job_id}")["failure"]["message"] == "enough"
        assert read_job(folder).dataset.filename == "from-google.jsonl"

    def test_from_the_hub(
        self, service: Service, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        hub.is_gated = True
        for name, value in {**SECRETS, "HF_ENDPOINT": hub.endpoint}.items():
            monkeypatch.setenv(name, value)
        job_id, folder = submitted(service, "hf://datasets/org/name/rows.jsonl")
        attempt(service)
        assert service.get(f"/jobs/{job_id}")["failure"]["message"] == "enough"
        assert read_job(folder).dataset.revision == COMMITS[0]
        assert not (tmp_path / "hub" / "hub").exists()  # it is in the job's folder, not in a cache

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        with small_hub() as hub:
            hub.files = {(COMMITS[0], "rows.jsonl"): ROWS}
            yield hub


class TestRefused:
    def test_a_redirect_to_the_inside(
        self, service: Service, site: Site, forbidden: Forbidden
    ) -> None:
        site.routes["/rows.jsonl"] = redirect(f"https://127.0.0.1:{forbidden.port}/")
        failure = failure_of(service, site.url("/rows.jsonl"))
        assert failure["reason"] == "dataset_unavailable"
        assert failure["yours_to_fix"] is True
        assert "an address that is not public" in failure["message"]
        assert "FLATLORA_ALLOWED_NETWORKS" in failure["hint"]

    def test_a_name_that_stands_for_the_inside(
        self, service: Service, forbidden: Forbidden
    ) -> None:
        """This machine's own, which its resolver knows."""
        name = next(n for n in (socket.gethostname(), "ip6-localhost") if _is_known(n))
        failure = failure_of(service, f"https://{name}:{forbidden.port}/rows.jsonl")
        assert failure["reason"] == "dataset_unavailable"
        assert "an address that is not public" in failure["message"]

    def test_what_this_workers_settings_no_longer_allow(
        self, service: Service, site: Site, forbidden: Forbidden
    ) -> None:
        job_id, _ = submitted(service, site.url("/rows.jsonl"))
        changed: Json = {"allowed_networks": [], "dataset_buckets": []}
        service.settings = service.settings.model_copy(update=changed)
        attempt(service)
        failure = service.get(f"/jobs/{job_id}")["failure"]
        assert failure["reason"] == "dataset_unavailable"
        assert site.asked == []


@dataclass
class Silent:
    """A site that takes connections and says nothing."""

    url: str
    listening: socket.socket

    @property
    def is_asked(self) -> bool:
        return bool(select.select([self.listening], [], [], 0)[0])


class TestStalled:
    def test_a_cancel_does_not_wait_for_it_and_no_command_line_shows_its_url(
        self, service: Service, silent: Silent
    ) -> None:
        job_id, folder = submitted(service, f"{silent.url}?sig=secret")
        thread = threading.Thread(target=attempt, args=(service,))
        thread.start()
        until(lambda: silent.is_asked, seconds=20)
        (pid,) = processes("worker.trainer", "web", job_id)
        assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        service.http.post(f"/jobs/{job_id}/cancel")
        until(lambda: service.get(f"/jobs/{job_id}")["status"] == "cancelled", seconds=20)
        thread.join()
        assert processes("worker.trainer", job_id) == []
        assert not list(folder.glob("dataset/*.order"))

    def test_its_time_is_limited(self, service: Service, silent: Silent) -> None:
        service.settings = service.settings.model_copy(update={"dataset_seconds": 0.2})
        failure = failure_of(service, silent.url)
        assert failure["reason"] == "dataset_unavailable"
        assert "could not be fetched within 0.2 seconds" in failure["message"]

    def test_a_wish_that_came_while_the_process_began_is_not_forgotten(self) -> None:
        control = Signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped) as caught:
            _die_at_once(control)
        assert caught.value.wish == "cancel"

    @pytest.fixture
    def silent(self, settings: Settings, site: Site) -> Iterator[Silent]:
        with socket.create_server((PUBLIC, 0)) as listening:
            port = listening.getsockname()[1]
            settings.allowed_ports.append(port)
            yield Silent(f"https://{PUBLIC}:{port}/rows.jsonl", listening)


def test_each_process_has_only_the_secrets_of_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTPS_PROXY", "http://u:p@proxy")
    known = {*SECRETS, "HTTPS_PROXY"}
    assert known & _environment("web").keys() == set()
    assert known & _environment("train").keys() == set()
    assert known & _environment("hub").keys() == {"HF_TOKEN", "HTTPS_PROXY"}
    clouds = {"AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_KEY", "HTTPS_PROXY", "IDENTITY_HEADER"}
    assert known & _environment("bucket").keys() == clouds


def _is_known(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, 1)) and name != "localhost"
    except OSError:
        return False
