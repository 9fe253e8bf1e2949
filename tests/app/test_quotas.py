"""What a project may queue, use and store: refused at the limit, never above it, and told."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app.cli.main import cli
from app.db import now
from app.jobs.states import Status
from app.main import create_app
from app.quotas.repository import add_project, limiting
from app.quotas.usage import keep_usage
from app.retention import Retention
from app.settings import Settings, get_settings
from app.tables import JobRow, UsageRow
from tests.app.conftest import make_settings, serve
from tests.app.keys import acting, audited, make_key
from tests.app.listening import said
from tests.app.service import Json, Service, make_model, ok

ROWS = {"Content-Type": "application/x-ndjson"}
DAY = 24 * 3600


def limited(folder: Path, url: str, **values: Any) -> Iterator[Service]:
    yield from serve(make_settings(folder, url, **values))


def allow(service: Service, project: str = "default", **limits: Any) -> None:
    """As ``flatlora projects set`` does."""
    with Session(service.engine) as session, session.begin():
        session.execute(add_project(service.engine.dialect.name, project=project))
        session.execute(limiting(project, limits))


def refused(response: httpx2.Response) -> Json:
    problem = ok(response, 429)
    assert problem["code"] == "quota_exceeded"
    assert int(response.headers["retry-after"]) > 0
    return problem


class TestQueued:
    @pytest.fixture
    def service(self, tmp_path: Path, migrated_url: str) -> Iterator[Service]:
        yield from limited(tmp_path, migrated_url, max_queued_jobs=2)

    def test_at_the_limit_a_job_is_refused_with_what_is_used_and_allowed(
        self, service: Service
    ) -> None:
        first = service.submit()["id"]
        service.submit()
        problem = refused(service.post(service.body))
        assert problem["detail"] == ("The project has 2 queued jobs, and may have 2 (max_queued).")
        assert len(service.get("/jobs")["items"]) == 2
        service.set(first, status=Status.RUNNING)
        service.submit()
        assert service.get("/quota")["queued"] == {"used": 2, "allowed": 2}
        assert {action for _, _, action, _ in audited(service)} == {"create_job"}
        assert len(audited(service)) == 3

    def test_a_repeated_request_is_answered_and_never_refused(self, service: Service) -> None:
        jobs = [ok(service.post(service.body, Idempotency_Key=k), 202)["id"] for k in "ab"]
        refused(service.post(service.body, Idempotency_Key="c"))
        for key, job_id in zip("ab", jobs, strict=True):
            again = service.post(service.body, Idempotency_Key=key)
            assert ok(again, 202)["id"] == job_id
        # What was refused is not remembered: the key is free for when there is room.
        service.set(jobs[0], status=Status.RUNNING)
        assert ok(service.post(service.body, Idempotency_Key="c"), 202)["id"] not in jobs

    def test_pausing_makes_no_room_for_more(self, service: Service) -> None:
        paused = service.submit()["id"]
        ok(service.http.post(f"/jobs/{paused}/pause"), 202)
        others = [service.submit()["id"] for _ in range(2)]
        refused(service.http.post(f"/jobs/{paused}/resume"))
        assert service.get(f"/jobs/{paused}")["status"] == "paused"
        service.set(others[0], status=Status.RUNNING)
        for _ in range(2):
            assert ok(service.http.post(f"/jobs/{paused}/resume"), 202)["status"] == "queued"

    def test_a_retry_that_waits_is_the_answer_also_where_the_queue_is_full(
        self, service: Service
    ) -> None:
        over = service.finished()["id"]
        again = ok(service.http.post(f"/jobs/{over}/retry"), 202)["id"]
        service.submit()
        assert ok(service.http.post(f"/jobs/{over}/retry"), 202)["id"] == again
        other = service.submit
        with pytest.raises(AssertionError, match="quota_exceeded"):
            other()

    def test_what_is_wrong_with_a_job_is_said_first(self, service: Service) -> None:
        for _ in range(2):
            service.submit()
        ok(service.post(service.body | {"dataset_uri": "file:nowhere"}), 422)


@pytest.mark.parametrize(
    ("database", "number"),
    [
        ("postgres", 50),
        pytest.param("postgres", 200, marks=pytest.mark.torture),
        pytest.param("sqlite", 200, marks=pytest.mark.torture),
    ],
)
class TestAtOnce:
    """SQLite lets one request write at a time, so that there the rule is not put to the test."""

    @pytest.fixture
    def url(self, request: pytest.FixtureRequest, database: str) -> str:
        url: str = request.getfixturevalue(f"migrated_{database}_url")
        return url

    def test_no_more_are_taken_than_allowed(self, tmp_path: Path, url: str, number: int) -> None:
        settings = make_settings(tmp_path, url, max_queued_jobs=7)
        assert asyncio.run(at_once(settings, [None] * number)) == {202: 7, 429: number - 7}

    def test_with_one_key_all_have_the_one_job(self, tmp_path: Path, url: str, number: int) -> None:
        settings = make_settings(tmp_path, url, max_queued_jobs=1)
        assert asyncio.run(at_once(settings, ["same"] * number)) == {202: number}


async def at_once(settings: Settings, keys: list[str | None]) -> Counter[int]:
    """How so many requests at the same time are answered."""
    make_model(settings.model_roots[0] / "tiny")
    (settings.dataset_roots[0] / "train.jsonl").write_text("{}\n")
    body = {"base_model": "file:tiny", "dataset_uri": "file:train.jsonl"}
    app = create_app(settings)
    async with app.router.lifespan_context(app) as state:
        assert state is not None

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(state)}, receive, send)

        transport = httpx2.ASGITransport(with_state)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:

            async def post(key: str | None) -> int:
                headers = {"Idempotency-Key": key} if key else {}
                return (await http.post("/jobs", json=body, headers=headers)).status_code

            return Counter(await asyncio.gather(*map(post, keys)))


class TestProjects:
    @pytest.fixture
    def settings(self, tmp_path: Path, migrated_sqlite_url: str) -> Settings:
        return make_settings(tmp_path, migrated_sqlite_url, auth="key", max_queued_jobs=1)

    def test_each_has_its_own_limit_or_the_settings_or_none(self, service: Service) -> None:
        allow(service, "wide", max_queued=3)
        allow(service, "open", max_queued=-1)
        allow(service, "shut", max_queued=0)
        for project, most in (("usual", 1), ("wide", 3), ("open", 5), ("shut", 0)):
            with acting(service, make_key(service, project)["key"]):
                for _ in range(most):
                    service.submit()
                if project == "open":
                    assert service.get("/quota")["queued"] == {"used": 5, "allowed": None}
                else:
                    refused(service.post(service.body))
                    assert service.get("/quota")["queued"] == {"used": most, "allowed": most}


class TestGpuMinutes:
    @pytest.fixture
    def service(self, tmp_path: Path, migrated_url: str) -> Iterator[Service]:
        yield from limited(tmp_path, migrated_url, gpu_minutes=60)

    def used(self, service: Service) -> float:
        return float(service.get("/quota")["gpu_minutes"]["used"])

    def test_of_all_jobs_that_ran_in_thirty_days_on_all_their_gpus(self, service: Service) -> None:
        over, running, old, waiting = (service.submit()["id"] for _ in range(4))
        ended = {"status": Status.SUCCEEDED, "started_at": now(-40 * DAY)}
        service.set(over, **ended, finished_at=now(-29 * DAY), runtime=600, gpus=2)
        service.set(running, status=Status.RUNNING, started_at=now(-60), runtime=60)
        service.set(old, **ended, finished_at=now(-31 * DAY), runtime=6000)
        assert self.used(service) == 21
        service.set(waiting, started_at=now(-60), runtime=30)  # has run, and waits again
        assert self.used(service) == 21.5

    def test_when_they_are_used_up_a_job_is_refused_and_those_that_run_go_on(
        self, service: Service
    ) -> None:
        job_id = service.submit()["id"]
        service.set(job_id, status=Status.RUNNING, started_at=now(), runtime=3599)
        service.submit()
        service.set(job_id, runtime=3600)
        problem = refused(service.post(service.body))
        assert "has used 60.0 GPU-minutes in the last 30 days, and may use 60" in problem["detail"]
        assert service.get(f"/jobs/{job_id}")["status"] == "running"

    def test_a_deleted_job_stays_charged(self, service: Service) -> None:
        job_id = service.submit()["id"]
        service.set(job_id, status=Status.FAILED, finished_at=now(), runtime=1800, gpus=2)
        with Session(service.engine) as session, session.begin():
            row = session.get_one(JobRow, job_id)
            session.execute(keep_usage(row))
            session.delete(row)
        assert self.used(service) == 60
        refused(service.post(service.body))

    def test_cleaning_keeps_what_removed_jobs_have_used_for_as_long_as_it_counts(
        self, service: Service
    ) -> None:
        recent, long_ago = service.submit()["id"], service.submit()["id"]
        for job_id, days in ((recent, 5), (long_ago, 31)):
            ended = {"finished_at": now(-days * DAY), "started_at": now(-days * DAY)}
            service.set(job_id, status=Status.SUCCEEDED, runtime=600, **ended)
        settings = service.settings.model_copy(update={"keep_jobs_days": 1})
        cleaned = Retention(service.engine, service.store, settings).clean()
        assert cleaned.jobs == 2
        assert self.used(service) == 10
        with Session(service.engine) as session:
            assert list(session.scalars(select(UsageRow.job_id))) == [recent]

    def test_to_count_them_reads_the_window_alone_and_not_all_jobs_of_the_project(
        self, tmp_path: Path, migrated_sqlite_url: str
    ) -> None:
        (tmp_path / "planned").mkdir()
        for service in limited(tmp_path / "planned", migrated_sqlite_url):
            with said("sum(jobs.runtime") as sums:
                self.used(service)
            assert len(sums) == 2
            for statement, values in sums:
                with service.engine.connect() as connection:
                    explained = f"EXPLAIN QUERY PLAN {statement}"
                    plan = connection.exec_driver_sql(explained, values).all()
                index = "ix_jobs_project_finished_at_started_at (project=? AND finished_at"
                assert [index in step[-1] for step in plan] == [True]


class TestStoredBytes:
    @pytest.fixture
    def service(self, tmp_path: Path, migrated_sqlite_url: str) -> Iterator[Service]:
        yield from limited(tmp_path, migrated_sqlite_url, max_stored_bytes=10)

    @staticmethod
    def upload(service: Service, body: Any, name: str = "a.jsonl") -> httpx2.Response:
        return service.http.post(f"/datasets?filename={name}", content=body, headers=ROWS)

    def test_at_the_limit_an_upload_is_refused(self, service: Service) -> None:
        ok(self.upload(service, b"12345"), 201)
        problem = refused(self.upload(service, b"123456"))
        assert (
            "stores 5 bytes of datasets, and may store 10 (max_stored_bytes); this upload"
            in (problem["detail"])
        )
        ok(self.upload(service, b"54321"), 201)
        assert service.get("/quota")["stored_bytes"] == {"used": 10, "allowed": 10}

    def test_one_that_never_fits_is_too_large(self, service: Service) -> None:
        problem = ok(self.upload(service, b"x" * 11), 413)
        assert problem["code"] == "too_large"
        assert "may store 10 bytes" in problem["detail"]

    def test_the_same_bytes_again_cost_nothing(self, service: Service) -> None:
        ok(self.upload(service, b"0123456789"), 201)
        ok(self.upload(service, b"0123456789"), 200)
        ok(self.upload(service, b"0123456789", "b.jsonl"), 201)
        assert service.get("/quota")["stored_bytes"]["used"] == 10

    def test_one_that_does_not_say_its_size_is_refused_when_it_has_come(
        self, service: Service
    ) -> None:
        ok(self.upload(service, b"12345"), 201)
        refused(self.upload(service, iter([b"123", b"456"])))
        assert len(service.get("/datasets")["items"]) == 1

    def test_what_is_refused_when_it_has_come_is_not_in_the_store(self, service: Service) -> None:
        body = bytes(service.settings.max_stored_bytes or 0) + b"x"
        sha256 = hashlib.sha256(body).hexdigest()
        url = "/datasets?filename=a.jsonl"
        answer = service.http.post(url, content=iter([body]), headers=ROWS)
        assert answer.status_code in {413, 429}
        assert not asyncio.run(service.store.holds(sha256, len(body)))

    def test_uploads_in_parts_count_by_what_they_announce(self, service: Service) -> None:
        allowed = service.settings.max_stored_bytes or 0
        size = allowed // 2 + 1
        begin = f"filename=a.jsonl&size={size}"
        first, second = ("a" * 64, "b" * 64)
        ok(service.http.put(f"/datasets/uploads/{first}?{begin}"), 200)
        assert service.get("/quota")["stored_bytes"]["used"] == size
        refused(service.http.put(f"/datasets/uploads/{second}?{begin}"))
        assert service.http.delete(f"/datasets/uploads/{first}").status_code == 204
        ok(service.http.put(f"/datasets/uploads/{second}?{begin}"), 200)

    def test_an_upload_that_fills_the_room_is_finished(self, service: Service) -> None:
        body = b"x" * (service.settings.max_stored_bytes or 0)
        at = f"/datasets/uploads/{hashlib.sha256(body).hexdigest()}"
        ok(service.http.put(f"{at}?filename=a.jsonl&size={len(body)}"), 200)
        part = {"Upload-Offset": "0", "Content-Type": "application/octet-stream"}
        assert ok(service.http.patch(at, content=body, headers=part), 201)["dataset"]
        assert service.get("/quota")["stored_bytes"]["used"] == len(body)

    def test_a_form_is_measured_by_its_file(self, service: Service) -> None:
        def send(body: bytes) -> httpx2.Response:
            return service.http.post("/datasets", files={"file": ("a.jsonl", body)})

        ok(send(b"12345"), 201)
        refused(send(b"123456"))
        ok(send(b"54321"), 201)


class TestCommand:
    @pytest.fixture(params=["sqlite", "postgres"])
    def url(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        url: str = request.getfixturevalue(f"migrated_{request.param}_url")
        monkeypatch.setenv("FLATLORA_DATABASE_URL", url)
        get_settings.cache_clear()
        yield url
        get_settings.cache_clear()

    def test_limits_are_set_and_shown_beside_the_service(self, url: str, tmp_path: Path) -> None:
        def run(*words: str) -> Json:
            done = CliRunner().invoke(cli, ["projects", *words, "--json"])
            assert done.exit_code == 0, done.output
            found: Json = json.loads(done.stdout)
            return found

        none = dict.fromkeys(("max_queued", "max_running", "gpu_minutes", "max_stored_bytes")) | {
            "requests_per_minute": 12_000
        }
        assert run("set", "search", "--max-queued", "3", "--gpu-minutes", "1.5")["limits"] == (
            none | {"max_queued": 3, "gpu_minutes": 1.5}
        )
        changed = ("--max-queued", "default", "--requests-per-minute", "none")
        assert run("set", "search", *changed, "--max-running", "0")["limits"] == (
            none | {"gpu_minutes": 1.5, "max_running": 0, "requests_per_minute": None}
        )
        for service in serve(make_settings(tmp_path, url)):
            service.submit()
            service.set(service.submit()["id"], status=Status.RUNNING)
            assert run("list")["items"] == [
                {"project": "default", "queued": 1, "running": 1, "limits": none},
                {
                    "project": "search", "queued": 0, "running": 0,
                    "limits": none
                    | {"gpu_minutes": 1.5, "max_running": 0, "requests_per_minute": None},
                },
            ]  # fmt: skip
            shown = CliRunner().invoke(cli, ["projects", "list"]).stdout
            assert "0 of any" in shown
            actor = "operator (command line)"
            assert audited(service)[:2] == [("search", actor, "set_project", "search")] * 2

    @pytest.mark.parametrize(
        "words",
        [
            ["set", "search"],
            ["set", "A B", "--max-queued", "1"],
            ["set", "search", "--max-queued", "-1"],
            ["set", "search", "--max-queued", "1.5"],
            ["set", "search", "--max-queued", "many"],
            ["set", "search", "--gpu-minutes", "nan"],
            ["set", "search", "--max-queued", "99999999999"],
        ],
    )
    def test_what_is_no_limit_is_refused(
        self, migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch, words: list[str]
    ) -> None:
        monkeypatch.setenv("FLATLORA_DATABASE_URL", migrated_sqlite_url)
        get_settings.cache_clear()
        assert CliRunner().invoke(cli, ["projects", *words]).exit_code == 2
        get_settings.cache_clear()


def test_where_nothing_is_limited_nothing_is_counted_and_nothing_locked(
    any_service: Service,
) -> None:
    any_service.submit()
    with said("projects") as statements:
        any_service.submit()
    assert statements == []
