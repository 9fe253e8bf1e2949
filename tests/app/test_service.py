"""What holds for every request: problems, request ids, health, and the log."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from starlette.testclient import TestClient

from app import __version__
from app.logs import blot_secrets, configure_logs
from app.main import create_app
from app.migrate import downgrade
from app.settings import Settings
from tests.app.conftest import make_settings, serve
from tests.app.service import Service, ok


class TestProblems:
    def test_an_unknown_route(self, service: Service) -> None:
        problem = ok(service.http.get("/nothing/here"), 404)
        assert (problem["code"], problem["instance"]) == ("not_found", "/nothing/here")
        assert "/docs" in problem["hint"]

    @pytest.mark.parametrize(
        ("path", "allowed"),
        [
            ("/jobs", "GET, POST"),
            ("/models", "GET"),
            ("/jobs/j", "DELETE, GET, HEAD"),
            ("/metrics", "GET, HEAD"),
        ],
    )
    def test_a_method_that_a_route_does_not_know(
        self, service: Service, path: str, allowed: str
    ) -> None:
        response = service.http.request("PUT", path)
        assert ok(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == allowed

    @pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/version"])
    def test_what_is_probed_may_be_asked_for_without_its_body(
        self, service: Service, path: str
    ) -> None:
        asked = service.http.head(path)
        assert asked.status_code == 200
        assert asked.headers["content-type"] == service.http.get(path).headers["content-type"]

    def test_an_unforeseen_error_tells_nothing_of_itself(
        self, service: Service, capsys: pytest.CaptureFixture[str]
    ) -> None:
        job_id = service.submit()["id"]
        service.set(job_id, spec={"of": "another version"})
        configure_logs()
        response = service.http.get(f"/jobs/{job_id}", headers={"X-Request-ID": "here"})
        problem = ok(response, 500)
        assert problem["code"] == "internal"
        assert "another" not in problem["detail"] + problem["hint"]
        logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        error = next(line for line in logged if line["event"] == "unhandled error")
        assert "another version" in error["exception"]
        assert error["request_id"] == "here"
        structlog.reset_defaults()


class TestRequestId:
    def test_it_is_echoed(self, service: Service) -> None:
        response = service.http.get("/healthz", headers={"X-Request-ID": "my-id.1"})
        assert response.headers["x-request-id"] == "my-id.1"

    @pytest.mark.parametrize("given", ["", "a b", "x" * 65, '"><script>'])
    def test_one_that_is_no_id_is_replaced(self, service: Service, given: str) -> None:
        first = service.http.get("/healthz", headers={"X-Request-ID": given})
        second = service.http.get("/healthz")
        assert len(first.headers["x-request-id"]) == 32
        assert first.headers["x-request-id"] != second.headers["x-request-id"]


class TestHealth:
    def test_health_and_version(self, service: Service) -> None:
        assert service.get("/healthz") == {"status": "ok"}
        found = service.get("/version")
        assert (found["version"], found["api"], found["commit"]) == (__version__, "1", None)

    def test_the_version_says_what_this_service_can(
        self, tmp_path: Path, migrated_sqlite_url: str
    ) -> None:
        values = {"commit": "c0ffee", "auth": "key", "max_part_bytes": 5, "max_dataset_bytes": 9}
        for service in serve(make_settings(tmp_path, migrated_sqlite_url, **values)):
            found = service.get("/version")  # asks for no key
            assert found["commit"] == "c0ffee"
            assert found["features"] == {
                "mode": "embedded", "auth": "key",
                "dataset_schemes": ["file:", "dataset:", "https:", "hf:"],
                "downloads": "stream", "max_body_bytes": 1 << 20, "max_dataset_bytes": 9,
                "max_part_bytes": 5, "max_rank": 1024, "max_sigma": 1.0,
            }  # fmt: skip

    def test_ready(self, any_service: Service) -> None:
        assert any_service.get("/readyz") == {"status": "ok", "broker": None}

    def test_not_before_the_migrations(self, any_service: Service) -> None:
        downgrade(any_service.settings.database, "base")
        response = any_service.http.get("/readyz")
        problem = ok(response, 503)
        assert "migration none, this program expects" in problem["detail"]
        assert "retry-after" in response.headers
        assert any_service.http.get("/healthz").status_code == 200

    def test_not_on_an_empty_database(self, tmp_path: Path, postgres_url: str) -> None:
        with app_on(make_settings(tmp_path, postgres_url)) as http:
            assert "migration none" in ok(http.get("/readyz"), 503)["detail"]

    def test_not_without_a_database(self, tmp_path: Path) -> None:
        url = "postgresql://nobody@127.0.0.1:1/nothing"
        with app_on(make_settings(tmp_path, url)) as http:
            assert "database does not answer" in ok(http.get("/readyz"), 503)["detail"]

    def test_not_without_the_store(self, service: Service) -> None:
        shutil.rmtree(service.settings.artifacts_dir)
        service.settings.artifacts_dir.touch()
        assert "store cannot be written" in ok(service.http.get("/readyz"), 503)["detail"]


def app_on(settings: Settings) -> TestClient:
    return TestClient(create_app(settings), base_url="http://localhost")


class TestLog:
    @pytest.fixture(autouse=True)
    def logs(self) -> Iterator[None]:
        yield
        structlog.reset_defaults()

    def lines(self, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    def test_one_line_for_each_request(
        self, service: Service, capsys: pytest.CaptureFixture[str]
    ) -> None:
        configure_logs()
        service.http.get("/jobs?limit=1", headers={"Authorization": "Bearer flk_" + "0" * 48})
        service.http.get("/healthz")
        (line,) = [line for line in self.lines(capsys) if line["event"] == "request"]
        assert (line["method"], line["path"], line["status"]) == ("GET", "/jobs", 200)
        assert line["milliseconds"] > 0
        assert len(line["request_id"]) == 32

    def test_no_secret_comes_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logs()
        key = "flk_" + "ab12" * 12
        log = structlog.get_logger()
        try:
            raise ValueError(f"key {key}")
        except ValueError:
            log.exception("failed", url=f"postgresql://me:{key}@host/x", deep={"list": [key]})
        written = capsys.readouterr().err
        assert "ab12" not in written
        assert "Traceback" in written
        assert json.loads(written)["url"] == "postgresql://[secret]host/x"

    def test_ordinary_words_stay(self) -> None:
        event = {"event": "hf_hub flk_ bearer of news", "number": 3}
        assert blot_secrets(None, "", dict(event)) == event | {"event": "hf_hub flk_ [secret] news"}


class TestHead:
    def test_whatever_carries_an_etag_answers_to_head(self, service: Service) -> None:
        """The document names no HEAD: it is the same as GET, without a body."""
        job_id = service.finished()["id"]
        names = {"job_id": job_id, "file": "README.md", "sha256": "0" * 64}
        found, missing = set[str](), set[str]()
        for path, operations in service.get("/openapi.json")["paths"].items():
            url = re.sub(r"{(\w+)}", lambda name: names.get(name[1], "x"), path)
            if "get" not in operations or "etag" not in (got := service.http.get(url)).headers:
                continue
            head = service.http.head(url)
            if head.status_code == 405:
                missing.add(path)
                continue
            found.add(path)
            assert (head.status_code, head.content) == (200, b"")
            for name in ("etag", "content-length", "content-type"):
                assert head.headers[name] == got.headers[name]
            again = service.http.head(url, headers={"If-None-Match": got.headers["etag"]})
            assert again.status_code == 304
        adapter = "/jobs/{job_id}/adapter"
        assert found >= {"/jobs/{job_id}", adapter, f"{adapter}/{{file}}"}
        assert not missing
