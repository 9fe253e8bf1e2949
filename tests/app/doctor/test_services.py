"""What is wrong with what the service stands on, found on real servers that are broken."""

import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from sqlalchemy import create_engine, insert, update

from app import __version__
from app.db import now
from app.doctor import database
from app.doctor.broker import BROKER
from app.doctor.database import DATABASE
from app.doctor.finding import Level
from app.doctor.store import STORE
from app.migrate import downgrade
from app.settings import Settings
from app.tables import JobRow, OutboxRow, WorkerRow
from tests.app.doctor.patients import Found, Make, answering, levels, look, silent
from tests.faults.servers import PostgresServer, RedisServer
from tests.s3 import S3Server


@pytest.fixture(autouse=True)
def slow_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does something else is no finding here."""
    monkeypatch.setattr(database, "SLOW_SECONDS", 5)


class TestDatabase:
    def test_one_in_order(self, make: Make, migrated_url: str) -> None:
        found = look(DATABASE, make(database_url=migrated_url))
        assert levels(found) == dict.fromkeys(("database", "clock", "schema", "queue"), "ok")
        assert "ms a round trip" in found["database"].found

    def test_one_that_is_not_migrated(self, make: Make, migrated_url: str) -> None:
        downgrade(migrated_url, "base")
        found = look(DATABASE, make(database_url=migrated_url))
        assert levels(found) == {"database": "ok", "clock": "ok", "schema": "fail"}
        assert found["schema"].mend == "flatlora migrate"

    def test_a_closed_port(self, make: Make) -> None:
        found = look(DATABASE, make(database_url="postgresql://me:pw@127.0.0.1:1/x"))
        assert levels(found) == {"database": "fail"}
        assert "refused" in found["database"].found

    def test_a_wrong_password_and_a_database_that_is_not_there(
        self, make: Make, tmp_path: Path
    ) -> None:
        with PostgresServer(tmp_path / "pg") as server:
            with psycopg.connect(server.url(), autocommit=True) as connection:
                connection.execute("CREATE ROLE me LOGIN PASSWORD 'right'")
            (server.data / "pg_hba.conf").write_text("host all me 127.0.0.1/32 scram-sha-256\n")
            server.stop()
            server._process = server._spawn()  # its user may not come in any more to see it ready
            url = f"postgresql://me:%s@127.0.0.1:{server.port}/%s"
            deadline = time.monotonic() + 30
            while (
                "starting up"
                in (
                    said := look(DATABASE, make(database_url=url % ("wrong", "postgres")))[
                        "database"
                    ]
                ).found
                or "refused" in said.found
            ):
                assert time.monotonic() < deadline
            assert said.level is Level.FAIL
            assert "password authentication failed" in said.found
            assert "%40" in said.mend
            said = look(DATABASE, make(database_url=url % ("right", "nothing")))["database"]
            assert 'database "nothing" does not exist' in said.found
            assert "Create the database" in said.mend

    def test_one_that_says_nothing(self, make: Make) -> None:
        with silent() as port:
            started = time.monotonic()
            found = look(DATABASE, make(database_url=f"postgresql://me@127.0.0.1:{port}/x"))
            assert levels(found) == {"database": "fail"}
            assert time.monotonic() - started < 15

    @pytest.mark.parametrize("seconds", [3600, -3600])
    def test_another_clock(self, make: Make, migrated_postgres_url: str, seconds: int) -> None:
        engine = create_engine(migrated_postgres_url)
        with engine.begin() as connection:
            # Found before the real one by who looks there first.
            connection.exec_driver_sql(
                "CREATE FUNCTION clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS "
                f"'SELECT pg_catalog.clock_timestamp() + make_interval(secs => {seconds})'"
            )
        engine.dispose()
        options = "options=-csearch_path%3Dpublic%2Cpg_catalog"
        found = look(DATABASE, make(database_url=f"{migrated_postgres_url}&{options}"))
        assert found["clock"].level is Level.WARN
        assert ("ahead" if seconds > 0 else "behind") in found["clock"].found
        assert "3600" in found["clock"].found or "3599" in found["clock"].found

    def test_a_clock_like_ours(self, make: Make, migrated_postgres_url: str) -> None:
        found = look(DATABASE, make(database_url=migrated_postgres_url))
        assert found["clock"].level is Level.OK

    def test_no_url(self, make: Make) -> None:
        found = look(DATABASE, make(database_url="hunter2"))
        assert levels(found) == {"database": "fail"}
        assert "hunter2" not in found["database"].found


class TestCluster:
    @pytest.fixture
    def settings(self, make: Make, migrated_postgres_url: str, redis: RedisServer) -> Settings:
        return make(database_url=migrated_postgres_url, broker_url=redis.url())

    def write(self, settings: Settings, *statements: Any) -> None:
        engine = create_engine(settings.database)
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(statement)
        engine.dispose()

    def worker(self, name: str, *, heard: float = 0, version: str = __version__) -> Any:
        return insert(WorkerRow).values(
            name=name, host="h", pid=1, version=version, slots=[{"name": name, "device": "0"}],
            state="active", started_at=now(-999), heartbeat_at=now(-heard),
        )  # fmt: skip

    def job(self, settings: Settings, waited: float, **values: Any) -> None:
        row = insert(JobRow).values(
            id="job_1", labels={}, base_model="m", dataset_uri="d", spec={}, status="queued",
            attempt=0, fence=0, runtime=0, recoveries=0, step=0,
            created_at=now(-waited), updated_at=now(-waited), **values,
        )  # fmt: skip
        self.write(settings, row)

    def test_no_worker(self, settings: Settings) -> None:
        found = look(DATABASE, settings)
        assert found["workers"].level is Level.WARN
        assert "flatlora worker" in found["workers"].mend

    def test_workers_in_order(self, settings: Settings) -> None:
        self.write(settings, self.worker("a"), self.worker("b"))
        found = look(DATABASE, settings)
        assert set(levels(found).values()) == {"ok"}
        assert found["workers"].found == "2 with 2 slots"

    def test_a_silent_one_is_named(self, settings: Settings) -> None:
        self.write(settings, self.worker("a"), self.worker("b", heard=100))
        found = look(DATABASE, settings)["workers"]
        assert found.level is Level.WARN
        assert found.found.endswith("silent: b")

    def test_one_of_another_version(self, settings: Settings) -> None:
        self.write(settings, self.worker("a", version="0.0.1"))
        found = look(DATABASE, settings)["workers"]
        assert (found.level, found.found) == (Level.WARN, "workers run 0.0.1")

    def test_a_job_that_waits_beside_an_idle_slot(self, settings: Settings) -> None:
        self.write(settings, self.worker("a"))
        self.job(settings, waited=1000)
        found = look(DATABASE, settings)["queue"]
        assert found.level is Level.WARN
        assert found.found.startswith("1 queued, 0 running; the oldest has waited 100")

    def test_a_job_that_waits_while_all_are_busy(self, settings: Settings) -> None:
        self.write(settings, self.worker("a"))
        self.job(settings, waited=1000)
        self.write(settings, update(JobRow).values(id="job_2", status="running"))
        self.job(settings, waited=1000)
        assert look(DATABASE, settings)["queue"].level is Level.OK

    def test_wake_ups_that_are_not_sent(self, settings: Settings) -> None:
        self.write(settings, self.worker("a"))
        self.job(settings, waited=100)
        due = insert(OutboxRow).values(job_id="job_1", due_at=now(-100), created_at=now(-100))
        self.write(settings, due)
        found = look(DATABASE, settings)["outbox"]
        assert found.level is Level.WARN
        assert "broker" in found.mend
        self.write(settings, update(OutboxRow).values(due_at=now(50)))
        assert look(DATABASE, settings)["outbox"].level is Level.OK


class TestBroker:
    @pytest.fixture
    def at(self, make: Make, migrated_postgres_url: str) -> Callable[[str], Found]:
        def at(url: str) -> Found:
            return look(BROKER, make(database_url=migrated_postgres_url, broker_url=url))

        return at

    def test_one_in_order(self, at: Callable[[str], Found], redis: RedisServer) -> None:
        names = ("broker", "redis persistence", "redis eviction", "redis writes")
        assert levels(at(redis.url())) == dict.fromkeys(names, "ok")
        with redis.client() as client:
            assert client.keys("*") == []

    def test_none_is_needed_on_one_machine(self, make: Make) -> None:
        assert levels(look(BROKER, make())) == {"broker": "ok"}

    def test_one_that_forgets_and_evicts(self, at: Callable[[str], Found], tmp_path: Path) -> None:
        options = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
        with RedisServer(tmp_path, *options, appendonly=False) as server:
            found = at(server.url())
        assert levels(found) == {
            "broker": "ok", "redis persistence": "warn", "redis eviction": "warn",
            "redis writes": "ok",
        }  # fmt: skip
        assert "appendonly yes" in found["redis persistence"].mend
        assert "noeviction" in found["redis eviction"].mend

    def test_one_that_is_full(self, at: Callable[[str], Found], tmp_path: Path) -> None:
        with RedisServer(tmp_path, "--maxmemory", "1", appendonly=True) as server:
            found = at(server.url())["redis writes"]
        assert found.level is Level.FAIL
        assert "maxmemory" in found.found

    def test_a_replica(
        self, at: Callable[[str], Found], redis: RedisServer, tmp_path: Path
    ) -> None:
        options = ("--replicaof", "127.0.0.1", str(redis.port), "--masterauth", redis.password)
        with RedisServer(tmp_path, *options) as server:
            found = at(server.url())["redis writes"]
        assert found.level is Level.FAIL
        assert "read only replica" in found.found

    def test_a_user_who_may_only_read(self, at: Callable[[str], Found], redis: RedisServer) -> None:
        with redis.client() as client:
            client.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+ping",
                                   "+info")  # fmt: skip
            client.execute_command("ACL", "SETUSER", "closed", "on", ">pw", "~flatlora*", "+@list",
                                   "+@write", "+expire", "+ping")  # fmt: skip
        found = at(redis.url().replace(f":{redis.password}", "reader:pw"))
        assert levels(found)["redis writes"] == "fail"
        assert "ACL" in found["redis writes"].mend
        # One who may not ask how it is set is told to see for himself.
        found = at(redis.url().replace(f":{redis.password}", "closed:pw"))
        assert levels(found) == {"broker": "warn", "redis writes": "ok"}
        assert "maxmemory-policy noeviction" in found["broker"].mend

    def test_a_wrong_password_and_none(
        self, at: Callable[[str], Found], redis: RedisServer
    ) -> None:
        for url in (
            redis.url().replace(redis.password, "wrong"),
            redis.url().replace(f":{redis.password}@", ""),
        ):
            found = at(url)
            assert levels(found) == {"broker": "fail"}
            assert "password" in found["broker"].mend

    def test_a_closed_port_and_a_silent_one(self, at: Callable[[str], Found]) -> None:
        assert levels(at("redis://127.0.0.1:1/0")) == {"broker": "fail"}
        with silent() as port:
            started = time.monotonic()
            assert levels(at(f"redis://127.0.0.1:{port}/0")) == {"broker": "fail"}
            assert time.monotonic() - started < 15


class TestStore:
    @pytest.fixture
    def s3(
        self, make: Make, s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> Make:
        for name, value in s3_server.environment.items():
            monkeypatch.setenv(name, value)

        def made(**values: object) -> Settings:
            return make(store_url=s3_url, **values)

        return made

    def test_a_folder_in_order(self, make: Make) -> None:
        settings = make()
        settings.artifacts_dir.mkdir(parents=True)
        assert levels(look(STORE, settings)) == {"store": "ok", "store creation": "ok"}
        assert list(settings.artifacts_dir.rglob("*")) == []

    def test_a_folder_that_is_none(self, make: Make) -> None:
        settings = make()
        settings.data_dir.mkdir()
        settings.artifacts_dir.touch()
        assert levels(look(STORE, settings)) == {"store": "fail"}

    def test_s3_in_order(self, s3: Make) -> None:
        found = look(STORE, s3(downloads="redirect"))
        assert levels(found) == dict.fromkeys(("store", "store creation", "store URLs"), "ok")

    def test_a_bucket_that_is_not_there(self, s3: Make, make: Make) -> None:
        found = look(STORE, make(store_url="s3://nobodys-bucket"))
        assert levels(found) == {"store": "fail"}
        assert "bucket" in found["store"].mend

    def test_one_that_is_away(self, s3: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        started = time.monotonic()
        assert levels(look(STORE, s3())) == {"store": "fail"}
        assert time.monotonic() - started < 15

    def test_one_that_creates_twice(
        self, s3: Make, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As older gateways do: they know no If-None-Match on PUT."""

        def forward(handler: BaseHTTPRequestHandler) -> None:
            body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
            headers = {
                name: value
                for name, value in handler.headers.items()
                if name.lower() not in {"if-none-match", "content-length", "host"}
            }
            answer = httpx2.request(
                handler.command, s3_server.endpoint + handler.path, content=body, headers=headers
            )
            handler.send_response(answer.status_code)
            for name in ("etag", "last-modified", "content-type"):
                if name in answer.headers:
                    handler.send_header(name, answer.headers[name])
            handler.send_header("Content-Length", str(len(answer.content)))
            handler.end_headers()
            handler.wfile.write(answer.content)

        with answering(forward) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            found = look(STORE, s3())
        assert levels(found) == {"store": "ok", "store creation": "fail"}
        assert "If-None-Match" in found["store creation"].mend
