"""While its database is away the API says so at once, and it serves again by itself."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncConnection
from structlog.testing import capture_logs

from app import db
from app.db import OUTAGES, make_async_engine, make_engine
from app.jobs.states import Status
from app.migrate import upgrade
from app.postgres import IDLE
from app.settings import Settings
from tests.app.conftest import make_settings, serve
from tests.app.service import ok
from tests.faults.proxy import Proxy
from tests.faults.servers import PostgresServer
from tests.waiting import until
from tests.worker.jobs import add_job, claimed, count, row
from worker.claims import Claims
from worker.patience import until_written

serving = contextmanager(serve)


@pytest.fixture(scope="module")
def migrated_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("outages")) as server:
        upgrade(driven(server.url()))
        yield server


@pytest.fixture
def postgres(migrated_server: PostgresServer) -> PostgresServer:
    """Running, migrated, and without a job."""
    migrated_server.start()
    with psycopg.connect(migrated_server.url()) as connection:
        connection.execute("TRUNCATE jobs CASCADE")
    return migrated_server


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with capture_logs():
        yield


def driven(url: str) -> str:
    return url.replace("postgresql:", "postgresql+psycopg:")


def unavailable(response: Any) -> None:
    problem = ok(response, 503)
    assert problem["code"] == "database_unavailable"
    assert response.headers["retry-after"] == "5"
    assert "Idempotency-Key" in problem["hint"]


def sessions(postgres: PostgresServer) -> list[str]:
    """What the service's connections do, but for those that are idle."""
    with psycopg.connect(postgres.url()) as connection:
        found = connection.execute(
            "SELECT state FROM pg_stat_activity WHERE application_name = 'flatlora'"
        ).fetchall()
    return [state for (state,) in found]


class TestStopped:
    def test_every_route_says_so_and_all_work_again_when_it_is_back(
        self, postgres: PostgresServer, tmp_path: Path
    ) -> None:
        with serving(make_settings(tmp_path, postgres.url())) as service:
            job_id = service.submit()["id"]
            for mode in ("fast", "immediate"):
                postgres.stop(mode)
                started = time.monotonic()
                for path in ("/jobs", f"/jobs/{job_id}", "/datasets", "/workers"):
                    unavailable(service.http.get(path))
                unavailable(service.post(service.body))
                assert time.monotonic() - started < 5
                assert service.http.get("/healthz").status_code == 200
                assert ok(service.http.get("/readyz"), 503)["code"] == "not_ready"
                postgres.start()
                assert service.get(f"/jobs/{job_id}")["id"] == job_id
                service.submit()
                assert service.http.get("/readyz").status_code == 200

    def test_connections_that_break_are_not_kept(
        self, postgres: PostgresServer, tmp_path: Path
    ) -> None:
        with serving(make_settings(tmp_path, postgres.url())) as service:
            for _ in range(3):
                service.submit()
                postgres.kill()
                for _ in range(30):  # more than the pool has
                    unavailable(service.http.get("/jobs"))
                postgres.start()
            service.get("/jobs")
            # the courier of webhooks may be looking at this moment
            until(lambda: set(sessions(postgres)) == {"idle"})
            assert len(sessions(postgres)) <= 3

    def test_one_that_was_cut_while_it_was_idle_costs_no_request(
        self, postgres: PostgresServer, tmp_path: Path
    ) -> None:
        with serving(make_settings(tmp_path, postgres.url())) as service:
            service.submit()
            with psycopg.connect(postgres.url()) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'flatlora'"
                )
            service.submit()


class TestSilent:
    def test_a_database_that_says_nothing_is_not_waited_for_for_ever(
        self, postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(db, "ANSWER_SECONDS", 2)
        with Proxy("127.0.0.1", postgres.port) as proxy:
            settings = make_settings(tmp_path, postgres.url(port=proxy.port))
            with serving(settings) as service:
                job_id = service.submit()["id"]
                proxy.stall()
                started = time.monotonic()
                unavailable(service.http.get(f"/jobs/{job_id}"))
                assert time.monotonic() - started < 12
                proxy.pass_through()
                assert service.get(f"/jobs/{job_id}")["id"] == job_id

    def test_a_transaction_that_its_client_has_left_open_is_ended(
        self, postgres: PostgresServer
    ) -> None:
        seconds = 0.5
        with of(postgres, answer_seconds=seconds) as engine, engine.connect() as connection:
            connection.execute(text("SELECT 1"))
            until(
                lambda: "idle in transaction" not in sessions(postgres),
                seconds=IDLE * seconds + 20,
            )
            with pytest.raises(OUTAGES):
                connection.execute(text("SELECT 1"))


class TestLostAnswer:
    def test_a_request_that_is_sent_again_with_its_key_makes_no_second_job(
        self, postgres: PostgresServer, tmp_path: Path
    ) -> None:
        with Proxy("127.0.0.1", postgres.port) as proxy:
            settings = make_settings(tmp_path, postgres.url(port=proxy.port))
            with serving(settings) as service:
                service.get("/jobs")
                proxy.cut_after(b"INSERT INTO jobs", b"COMMIT")  # of no courier
                unavailable(service.post(service.body, Idempotency_Key="k"))
                again = ok(service.post(service.body, Idempotency_Key="k"), 202)
                assert [job["id"] for job in service.get("/jobs")["items"]] == [again["id"]]


class TestReadOnly:
    """As a standby is, until it is promoted."""

    @pytest.fixture(autouse=True)
    def read_only(self, postgres: PostgresServer) -> Iterator[None]:
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
            yield
            connection.execute("SET default_transaction_read_only = off")
            connection.execute("ALTER DATABASE postgres RESET default_transaction_read_only")

    def test_what_writes_is_an_outage_and_the_rest_is_served(
        self, postgres: PostgresServer, tmp_path: Path
    ) -> None:
        with serving(make_settings(tmp_path, postgres.url())) as service:
            unavailable(service.post(service.body))
            assert service.get("/jobs")["items"] == []


class TestSqlite:
    def test_one_whose_lock_is_held_for_too_long_is_an_outage(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(db, "SQLITE_BUSY_SECONDS", 0)
        with serving(settings) as service:
            until(lambda: service.http.get("/jobs").is_success)  # what has just started writes, too
            file = str(settings.database).removeprefix("sqlite:///")
            with closing(sqlite3.connect(file, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                unavailable(service.post(service.body))
                assert service.get("/jobs")["items"] == []
            service.submit()


class TestWorker:
    def test_what_a_job_has_come_to_is_written_after_a_restart(
        self, postgres: PostgresServer
    ) -> None:
        with of(postgres) as engine:
            claims = Claims(engine, worker="w1", lease_seconds=60, max_attempts=3)
            job_id = add_job(engine)
            lease = claimed(claims)
            postgres.stop("immediate")
            restart = threading.Timer(1, postgres.start)
            restart.start()
            until_written(
                lambda: claims.succeed(lease, result={"steps": 3}, adapter=None),
                threading.Event(),
            )
            restart.join()
            job = row(engine, job_id)
            assert (job.status, job.result) == (Status.SUCCEEDED, {"steps": 3})
            assert count(engine) == 1


class TestOptions:
    EXPECTED = {
        "application_name": "flatlora",
        "connect_timeout": "5",
        "keepalives": "1",
        "keepalives_idle": "10",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        "tcp_user_timeout": "20000",
    }

    def test_a_worker_notices_a_dead_server(self, postgres: PostgresServer) -> None:
        with of(postgres) as engine, engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            assert self.EXPECTED.items() <= driver.info.get_parameters().items()

    async def of_api(self, connection: AsyncConnection) -> dict[str, str]:
        raw: Any = await connection.get_raw_connection()
        found: dict[str, str] = raw.driver_connection.info.get_parameters()
        return found

    def test_so_does_the_api(self, postgres: PostgresServer) -> None:
        async def parameters() -> dict[str, str]:
            engine = make_async_engine(driven(postgres.url()))
            async with engine.connect() as connection:
                found = await self.of_api(connection)
            await engine.dispose()
            return found

        assert self.EXPECTED.items() <= asyncio.run(parameters()).items()


@contextmanager
def of(postgres: PostgresServer, **options: float) -> Iterator[Engine]:
    engine = make_engine(driven(postgres.url()), **options)
    yield engine
    engine.dispose()
