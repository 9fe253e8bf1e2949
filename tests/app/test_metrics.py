"""What Prometheus is told, by the database's word and not by memory."""

import asyncio
import platform
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, text
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import __version__
from app.broker_health import BrokerHealth
from app.db import now
from app.jobs.states import Status
from app.main import create_app
from app.settings import Settings
from app.tables import OutboxRow, WorkerRow
from tests.app.conftest import make_settings, serve
from tests.app.scraping import Scrape, scrape
from tests.app.service import Service, ok
from tests.faults.servers import RedisServer


def run(service: Service, *statements: Any) -> None:
    with Session(service.engine) as session, session.begin():
        for statement in statements:
            session.execute(statement)


def worker(name: str, *, slots: int = 1, state: str = "active", heard: float = 0) -> Any:
    return insert(WorkerRow).values(
        name=name,
        host="h",
        pid=1,
        version=__version__,
        slots=[{"name": f"{name}-{index}", "device": str(index)} for index in range(slots)],
        state=state,
        started_at=now(-1000),
        heartbeat_at=now(-heard),
    )


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def cluster(tmp_path: Path, migrated_postgres_url: str, redis: RedisServer) -> Iterator[Service]:
    # No relay within the test: what is in the outbox stays there.
    yield from serve(
        make_settings(tmp_path, migrated_postgres_url, broker_url=redis.url(), relay_seconds=10_000)
    )


class TestRoute:
    @pytest.fixture
    def settings(self, tmp_path: Path, migrated_sqlite_url: str) -> Settings:
        return make_settings(tmp_path, migrated_sqlite_url, auth="key")

    def test_it_asks_for_no_key_and_speaks_both_formats(self, service: Service) -> None:
        response = service.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        wanted = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        response = service.http.get("/metrics", headers=wanted)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")

    def test_a_foreign_host_gets_nothing(self, service: Service) -> None:
        response = service.http.get("/metrics", headers={"Host": "evil.example"})
        assert ok(response, 421)["code"] == "host_not_allowed"

    def test_two_apps_in_one_process_count_for_themselves(
        self, tmp_path: Path, service: Service, migrated_sqlite_url: str
    ) -> None:
        service.http.get("/version")
        (tmp_path / "other").mkdir()
        for other in serve(make_settings(tmp_path / "other", migrated_sqlite_url)):
            assert not scrape(other).has("flatlora_http_request_seconds_count")


class TestQueue:
    def test_jobs_are_counted_by_state_and_every_state_is_told(self, any_service: Service) -> None:
        ids = [any_service.submit()["id"] for _ in range(3)]
        any_service.set(ids[0], status=Status.RUNNING)
        found = scrape(any_service)
        told = {status: found("flatlora_jobs", state=status) for status in Status}
        assert told == dict.fromkeys(Status, 0) | {Status.QUEUED: 2, Status.RUNNING: 1}
        assert found("flatlora_database_up") == 1

    def test_the_oldest_is_the_one_that_could_have_started_first(
        self, any_service: Service
    ) -> None:
        waiting, back, resting, held = (any_service.submit()["id"] for _ in range(4))
        any_service.set(waiting, created_at=now(-90), updated_at=now(-90))
        # Ran for an hour and has come back: it does not wait since it was submitted.
        any_service.set(back, created_at=now(-3600), updated_at=now(-10))
        # Must rest after its trainer has died.
        any_service.set(resting, updated_at=now(-500), available_at=now(500))
        any_service.set(held, status=Status.RUNNING, updated_at=now(-5000))
        assert scrape(any_service)("flatlora_oldest_queued_seconds") == pytest.approx(90, abs=5)

    def test_one_that_rested_waits_since_it_may_start(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, updated_at=now(-500), available_at=now(-20))
        assert scrape(any_service)("flatlora_oldest_queued_seconds") == pytest.approx(20, abs=5)

    def test_an_empty_queue_waits_for_nothing(self, any_service: Service) -> None:
        assert scrape(any_service)("flatlora_oldest_queued_seconds") == 0

    def test_an_embedded_service_tells_nothing_of_workers(self, service: Service) -> None:
        found = scrape(service)
        for name in ("flatlora_workers", "flatlora_slots", "flatlora_outbox_lag_seconds"):
            assert not found.has(name)
        assert not found.has("flatlora_broker_up")

    def test_nobodys_job_or_file_is_named(self, service: Service) -> None:
        job = service.submit(name="my-secret-project", labels={"team": "search"})
        service.get(f"/jobs/{job['id']}")
        body = scrape(service).body
        for word in (job["id"], "my-secret-project", "search", "train.jsonl", "default"):
            assert word not in body


class TestCluster:
    def test_workers_and_slots(self, cluster: Service) -> None:
        run(
            cluster,
            worker("a", slots=2),
            worker("b", slots=4, state="draining", heard=5),
            worker("c", slots=8, heard=100),
        )
        cluster.set(cluster.submit()["id"], status=Status.RUNNING, worker="a-0")
        found = scrape(cluster)
        told = {s: found("flatlora_workers", state=s) for s in ("active", "draining", "silent")}
        assert told == {"active": 1, "draining": 1, "silent": 1}
        assert found("flatlora_slots", state="busy") == 1
        assert found("flatlora_slots", state="idle") == 5
        assert found("flatlora_worker_heartbeat_age_seconds", worker="a") < 5
        age = found("flatlora_worker_heartbeat_age_seconds", worker="c")
        assert age == pytest.approx(100, abs=5)

    def test_without_workers_it_says_none(self, cluster: Service) -> None:
        assert scrape(cluster)("flatlora_workers", state="active") == 0

    def test_the_outbox_lags_by_what_is_due(self, cluster: Service) -> None:
        job_id = cluster.submit()["id"]
        run(cluster, delete(OutboxRow))
        for due in (300, -40):
            statement = insert(OutboxRow).values(
                job_id=job_id, due_at=now(due), created_at=now(-400)
            )
            run(cluster, statement)
        assert scrape(cluster)("flatlora_outbox_lag_seconds") == pytest.approx(40, abs=5)

    def test_the_broker_is_up(self, cluster: Service) -> None:
        assert scrape(cluster)("flatlora_broker_up") == 1
        assert cluster.get("/readyz") == {"status": "ok", "broker": "ok"}


class TestBroker:
    @pytest.fixture
    def silent(self) -> Iterator[int]:
        """A port that takes connections and never says a word."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            yield int(listening.getsockname()[1])

    @pytest.mark.parametrize("kind", ["closed", "silent", "locked"])
    def test_one_that_is_away_is_told_within_seconds_and_does_not_unready(
        self,
        kind: str,
        silent: int,
        redis: RedisServer,
        tmp_path: Path,
        migrated_postgres_url: str,
    ) -> None:
        url = {
            "closed": "redis://127.0.0.1:1/0",
            "silent": f"redis://127.0.0.1:{silent}/0",
            "locked": f"redis://:wrong@127.0.0.1:{redis.port}/0",
        }[kind]
        settings = make_settings(
            tmp_path, migrated_postgres_url, broker_url=url, relay_seconds=10_000
        )
        started = time.monotonic()
        assert asyncio.run(BrokerHealth(url).state()) == "unreachable"
        assert time.monotonic() - started < 5
        for service in serve(settings):
            assert service.get("/readyz") == {"status": "ok", "broker": "unreachable"}
            assert scrape(service)("flatlora_broker_up") == 0


class TestDatabase:
    def test_one_that_is_gone_costs_its_numbers_and_not_the_answer(self, tmp_path: Path) -> None:
        settings = make_settings(tmp_path, "postgresql://nobody@127.0.0.1:1/nothing")
        with TestClient(create_app(settings), base_url="http://localhost") as http:
            found = Scrape(http.get("/metrics").text)
        assert found("flatlora_database_up") == 0
        assert not found.has("flatlora_jobs")
        assert (
            found("flatlora_build_info", version=__version__, python=platform.python_version()) == 1
        )

    def test_one_that_says_nothing_is_waited_for_for_two_seconds(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            settings = make_settings(tmp_path, f"postgresql://nobody@127.0.0.1:{port}/nothing")
            with TestClient(create_app(settings), base_url="http://localhost") as http:
                started = time.monotonic()
                found = Scrape(http.get("/metrics").text)
                waited = time.monotonic() - started
                assert found("flatlora_database_up") == 0
                assert waited < 5
                # And not again by each who asks.
                started = time.monotonic()
                http.get("/metrics")
                assert time.monotonic() - started < 1.8

    def test_one_without_tables_is_no_reason_to_fail(self, service: Service) -> None:
        with service.engine.begin() as connection:
            connection.execute(text("ALTER TABLE jobs RENAME TO hidden"))
        assert not scrape(service, database_up=False).has("flatlora_jobs")

    def test_one_reading_serves_all_who_ask_at_the_same_time(self, service: Service) -> None:
        assert scrape(service)("flatlora_jobs", state="queued") == 0
        read_at = time.monotonic()
        service.submit()
        found = scrape(service)("flatlora_jobs", state="queued")
        if time.monotonic() - read_at < timedelta(seconds=2).total_seconds():
            assert found == 0
        deadline = time.monotonic() + 10
        while scrape(service)("flatlora_jobs", state="queued") != 1:
            assert time.monotonic() < deadline


class TestRequests:
    def count(self, found: Scrape, method: str, route: str, status: str) -> float:
        labels = {"method": method, "route": route, "status": status}
        return found("flatlora_http_request_seconds_count", **labels)

    def test_they_are_counted_by_template_and_status(self, service: Service) -> None:
        job_id = service.submit()["id"]
        for _ in range(3):
            service.http.get(f"/jobs/{job_id}")
        service.http.get("/jobs/job_none")
        service.refused({"rank": 0})
        found = scrape(service)
        assert self.count(found, "POST", "/jobs", "202") == 1
        assert self.count(found, "POST", "/jobs", "422") == 1
        assert self.count(found, "GET", "/jobs/{job_id}", "200") == 3
        assert self.count(found, "GET", "/jobs/{job_id}", "404") == 1

    def test_strangers_make_no_series_of_their_own(self, service: Service) -> None:
        for index in range(5):
            service.http.get(f"/admin/{index}.php")
            service.http.request(f"HACK{index}", "/jobs")
        found = scrape(service)
        assert self.count(found, "GET", "unmatched", "404") == 5
        names = [
            sample.labels
            for family in found.families
            for sample in family.samples
            if sample.name == "flatlora_http_request_seconds_count"
        ]
        assert {labels["method"] for labels in names} == {"GET", "OTHER"}
        assert "php" not in found.body

    def test_a_refused_host_counts_too(self, service: Service) -> None:
        service.http.get("/jobs", headers={"Host": "evil.example"})
        assert self.count(scrape(service), "GET", "unmatched", "421") == 1

    def test_an_error_of_our_own_is_a_500(self, service: Service) -> None:
        job_id = service.submit()["id"]
        service.set(job_id, spec={"of": "another version"})
        assert service.http.get(f"/jobs/{job_id}").status_code == 500
        assert self.count(scrape(service), "GET", "/jobs/{job_id}", "500") == 1
