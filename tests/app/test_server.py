"""The app behind a real server on a real socket, where that makes a difference."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.app.conftest import make_settings
from tests.app.service import Service, ok, running


@pytest.fixture
def live(tmp_path: Path, migrated_sqlite_url: str) -> Iterator[Service]:
    settings = make_settings(tmp_path, migrated_sqlite_url)
    with running(settings) as url, httpx2.Client(base_url=url, timeout=30) as http:
        service = Service(http, settings)
        yield service
        service.engine.dispose()


class TestServer:
    def test_a_job_is_in_the_database_before_its_answer_arrives(self, live: Service) -> None:
        for _ in range(20):
            job_id = live.submit()["id"]
            with live.engine.connect() as connection:
                query = "SELECT count(*) FROM jobs WHERE id = ?"
                assert connection.exec_driver_sql(query, (job_id,)).scalar() == 1

    def test_hundreds_at_once_with_one_key_make_one_job(self, live: Service) -> None:
        def post(_: int) -> str:
            return str(ok(live.post(live.body, Idempotency_Key="k"), 202)["id"])

        with ThreadPoolExecutor(100) as pool:
            assert len(set(pool.map(post, range(400)))) == 1

    def test_a_large_adapter_streams_and_a_broken_download_goes_on(self, live: Service) -> None:
        content = os.urandom(1 << 20) * 8
        path = f"/jobs/{live.finished({'adapter_model.safetensors': content})['id']}/adapter"
        whole = live.http.get(path)
        assert len(whole.content) == int(whole.headers["content-length"])
        with live.http.stream("GET", path) as response:
            received = next(response.iter_raw(3 << 20))
        ask = {"Range": f"bytes={len(received)}-", "If-Range": whole.headers["etag"]}
        rest = live.http.get(path, headers=ask)
        assert rest.status_code == 206
        assert received + rest.content == whole.content

    def test_head_sends_no_body(self, live: Service) -> None:
        path = f"/jobs/{live.finished()['id']}/adapter"
        assert int(live.http.head(path).headers["content-length"]) > 0
        assert live.http.get("/healthz").status_code == 200  # the connection is in order

    def test_an_upload_larger_than_the_limit_of_other_bodies(self, live: Service) -> None:
        chunks = (b"x" * (1 << 20) for _ in range(20))
        response = live.http.post("/datasets", params={"filename": "a.csv"}, content=chunks,
                                  headers={"Content-Type": "text/csv"})  # fmt: skip
        assert ok(response, 201)["size"] == 20 << 20

    def test_a_body_that_says_it_is_too_large_is_refused_unread(self, live: Service) -> None:
        host, port = live.http.base_url.host, live.http.base_url.port
        with socket.create_connection((host, port or 80), timeout=30) as connection:
            connection.sendall(
                b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 999999999\r\n\r\n"
            )
            answer = connection.recv(65536).decode()
        assert answer.startswith("HTTP/1.1 413")
        assert "application/problem+json" in answer


class TestStart:
    def test_what_every_part_stands_on_imports_none_of_them(self) -> None:
        code = (
            "import json, sys, app.errors, app.settings, app.storage;"
            "print(json.dumps(sorted(name for name in sys.modules if name.startswith('app.'))))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        base = {
            "app.devices", "app.errors", "app.faults", "app.objects", "app.settings", "app.sources",
            "app.storage", "app.uris",
        }  # fmt: skip
        assert set(json.loads(done.stdout)) == base

    def test_the_process_imports_no_torch_and_no_worker(self) -> None:
        code = (
            "import json, sys; from app.main import make_app; make_app();"
            "print(json.dumps(sorted(name.partition('.')[0] for name in sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        loaded = set(json.loads(done.stdout))
        heavy = {"torch", "transformers", "peft", "numpy", "worker", "flatlora", "alembic"}
        assert not loaded & heavy
