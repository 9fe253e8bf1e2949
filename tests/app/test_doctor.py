"""The doctor finds what is really broken, says what mends it, and hangs on nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from sqlalchemy import create_engine, insert, update

from app import __version__
from app.db import now
from app.doctor import machine
from app.doctor.broker import BROKER
from app.doctor.database import DATABASE
from app.doctor.examination import CHECKS, _Run
from app.doctor.finding import Check, Finding, Level, ok
from app.doctor.gpu import GPU
from app.doctor.machine import DISK, FILES, FOLDER, PORT
from app.doctor.store import STORE
from app.migrate import downgrade
from app.settings import Settings
from app.tables import JobRow, OutboxRow, WorkerRow
from tests.app.conftest import make_settings
from tests.app.service import running
from tests.faults.servers import PostgresServer, RedisServer
from tests.s3 import S3Server

Found = dict[str, Finding]
Make = Callable[..., Settings]


def look(check: Check, settings: Settings) -> Found:
    """What one check finds; it must say what mends whatever is not in order."""
    found = {finding.name: finding for finding in _Run(check, settings).findings()}
    for finding in found.values():
        assert finding.found
        assert finding.level is Level.OK or (finding.expected and finding.mend)
    return found


def levels(found: Found) -> dict[str, str]:
    return {name: finding.level.value for name, finding in found.items()}


@pytest.fixture
def make(tmp_path: Path, migrated_sqlite_url: str) -> Make:
    def make(**values: object) -> Settings:
        url = values.pop("database_url", migrated_sqlite_url)
        return make_settings(tmp_path, str(url), **values)

    return make


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), appendonly=True) as server:
        yield server


@contextmanager
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@contextmanager
def answering(handle: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A web server that answers every request alike."""

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            handle(self)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do  # noqa: N815 - the server's names

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def empty(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


class TestMachine:
    def test_a_folder_that_others_may_enter(self, make: Make) -> None:
        settings = make()
        settings.data_dir.mkdir(mode=0o755)
        settings.key_file.touch(mode=0o644)
        found = look(FOLDER, settings)
        assert levels(found) == {"data folder": "warn", "API key": "warn"}
        assert found["data folder"].mend == f"chmod 700 {settings.data_dir}"
        settings.data_dir.chmod(0o700)
        settings.key_file.chmod(0o600)
        assert levels(look(FOLDER, settings)) == {"data folder": "ok"}

    @pytest.mark.parametrize("where", ["/proc", "/proc/new", "file", "file/new"])
    def test_a_folder_that_cannot_be_written(self, make: Make, tmp_path: Path, where: str) -> None:
        (tmp_path / "file").touch()
        found = look(FOLDER, make(data_dir=tmp_path / where))
        assert levels(found) == {"data folder": "fail"}
        assert "FLATLORA_DATA_DIR" in found["data folder"].mend

    def test_one_that_is_not_there_yet_is_not_made(self, make: Make) -> None:
        settings = make()
        for check in (FOLDER, DISK, STORE):
            assert set(levels(look(check, settings)).values()) == {"ok"}
        assert not settings.data_dir.exists()

    def test_a_disk_too_small_for_the_largest_dataset(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert levels(look(DISK, make(max_dataset_bytes=1 << 20))) == {"disk": "ok"}
        assert levels(look(DISK, make(max_dataset_bytes=1 << 60))) == {"disk": "warn"}
        monkeypatch.setattr(machine, "CHECKPOINT_BYTES", 1 << 60)
        assert levels(look(DISK, make())) == {"disk": "fail"}

    def test_a_low_limit_of_open_files(self) -> None:
        code = (
            "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
            "from app.doctor.machine import files; from app.settings import Settings\n"
            "(found,) = files(Settings()); print(found.level, found.mend)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("warn ulimit -n 256")

    def test_a_cluster_needs_more_of_them(self, make: Make, migrated_postgres_url: str) -> None:
        url = "redis://127.0.0.1:1/0"
        cluster = make(database_url=migrated_postgres_url, broker_url=url)
        (embedded,), (many,) = look(FILES, make()).values(), look(FILES, cluster).values()
        assert (embedded.expected[:3], many.expected[:4]) == ("256", "4096")


class TestPort:
    def test_free_ours_and_somebody_elses(self, make: Make, tmp_path: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        assert "free" in look(PORT, make(port=free))["port"].found
        with running(make()) as url:
            port = httpx2.URL(url).port
            httpx2.get(f"{url}/version")
            assert f"flatlora {__version__} answers" in look(PORT, make(port=port))["port"].found
        with answering(empty) as url:
            found = look(PORT, make(port=httpx2.URL(url).port))
            assert levels(found) == {"port": "fail"}
            assert "something else listens" in found["port"].found
        with silent() as port:
            assert levels(look(PORT, make(port=port))) == {"port": "fail"}

    def test_an_address_that_is_not_of_this_machine(self, make: Make) -> None:
        found = look(PORT, make(host="192.0.2.1"))
        assert levels(found) == {"port": "fail"}
        assert "FLATLORA_HOST" in found["port"].mend


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
            assert time.monotonic() - started < 8

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
        options = ("--replicaof", f"127.0.0.1 {redis.port}", "--masterauth", redis.password)
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
            assert time.monotonic() - started < 8


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
        assert time.monotonic() - started < 8

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


FAKE_TORCH = """
class Cuda:
    def is_available(self): return GPUS > 0
    def device_count(self): return GPUS
    def get_device_name(self, index): return "NVIDIA H100"
    def mem_get_info(self, index): return 70 << 30, 80 << 30
class Version: cuda = "13.0"
class Tensor:
    def sum(self): return self
    def item(self): return 8
def ones(size, device):
    if device == BROKEN: raise RuntimeError("CUDA error: no kernel image is available")
    return Tensor()
cuda, version, __version__ = Cuda(), Version(), "2.13.0+cu130"
"""


class TestGpu:
    """Torch and the driver as they are on machines that are not at hand."""

    @pytest.fixture
    def torch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        def install(source: str) -> None:
            (tmp_path / "fake" / "torch.py").write_text(source)

        (tmp_path / "fake").mkdir()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return install

    @pytest.fixture
    def driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\necho 'NVIDIA H100, 535.104, 81559 MiB'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def test_gpus_that_compute(self, make: Make, torch: Callable[[str], None]) -> None:
        torch(f"GPUS, BROKEN = 2, None\n{FAKE_TORCH}")
        found = look(GPU, make(devices="0,1"))
        assert levels(found) == {"torch": "ok", "gpu 0": "ok", "gpu 1": "ok"}
        assert "70.0 GiB of 80.0 GiB free" in found["gpu 0"].found

    def test_one_that_does_not(self, make: Make, torch: Callable[[str], None]) -> None:
        torch(f"GPUS, BROKEN = 2, 1\n{FAKE_TORCH}")
        found = look(GPU, make())
        assert levels(found) == {"torch": "ok", "gpu 0": "ok", "gpu 1": "fail"}
        assert "no kernel image" in found["gpu 1"].found

    def test_one_that_is_asked_for_and_not_there(
        self, make: Make, torch: Callable[[str], None]
    ) -> None:
        torch(f"GPUS, BROKEN = 1, None\n{FAKE_TORCH}")
        found = look(GPU, make(devices="0,1"))
        assert levels(found) == {"torch": "ok", "gpu 0": "ok", "gpu": "fail"}
        assert "FLATLORA_DEVICES" in found["gpu"].mend

    @pytest.mark.parametrize(("devices", "level"), [("", "ok"), ("cpu,cpu", "ok"), ("0", "warn")])
    def test_none_is_well_unless_one_is_asked_for(
        self, make: Make, torch: Callable[[str], None], devices: str, level: str
    ) -> None:
        torch(f"GPUS, BROKEN = 0, None\n{FAKE_TORCH}")
        assert levels(look(GPU, make(devices=devices)))["gpu"] == level

    def test_one_that_torch_cannot_use(
        self, make: Make, torch: Callable[[str], None], driver: None
    ) -> None:
        complaint = "UserWarning: CUDA initialization: The NVIDIA driver is too old (found 12020)"
        torch(
            f"import sys; sys.stderr.write('{complaint}\\n')\nGPUS, BROKEN = 0, None\n{FAKE_TORCH}"
        )
        found = look(GPU, make())["gpu"]
        assert found.level is Level.WARN
        assert "NVIDIA H100, 535.104" in found.found
        assert "too old" in found.found
        assert "driver" in found.mend

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
            ("import os; os.kill(os.getpid(), 11)", "ended with -11"),
        ],
    )
    def test_a_broken_torch(
        self, make: Make, torch: Callable[[str], None], source: str, said: str
    ) -> None:
        torch(source)
        found = look(GPU, make())
        assert levels(found) == {"torch": "fail"}
        assert said in found["torch"].found

    def test_without_torch_an_api_is_well_and_an_embedded_service_is_not(
        self, make: Make, migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        url = "redis://127.0.0.1:1/0"
        cluster = make(database_url=migrated_postgres_url, broker_url=url)
        assert levels(look(GPU, cluster)) == {"torch": "ok"}
        assert levels(look(GPU, make())) == {"torch": "fail"}

    def test_the_torch_that_is_here(self, make: Make) -> None:
        assert look(GPU, make())["torch"].level is Level.OK


class TestExamination:
    def test_what_hangs_or_raises_late_hides_nothing_that_came_before(self, make: Make) -> None:
        released = threading.Event()

        def hangs(_: Settings) -> Iterator[Finding]:
            yield ok("first", "seen")
            released.wait()

        def breaks(_: Settings) -> Iterator[Finding]:
            yield ok("first", "seen")
            raise RuntimeError("of its own")

        for run, said in ((hangs, "no answer within 0.2 s"), (breaks, "RuntimeError: of its own")):
            found = look(Check("check", run, "expected", "mend", seconds=0.2), make())
            assert levels(found) == {"first": "ok", "check": "fail"}
            assert found["check"].found == said
        released.set()

    def test_none_takes_long_but_torch(self) -> None:
        assert all(check.seconds <= 6 for check in CHECKS if check is not GPU)
        assert all(check.mend for check in CHECKS)


def doctor(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command, with no setting but these."""
    theirs = {name: value for name, value in os.environ.items() if "FLATLORA" not in name}
    return subprocess.run(
        [sys.executable, "-m", "app.cli.main", "doctor", *arguments],
        env={**theirs, "FLATLORA_DATA_DIR": str(folder / "data"), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


class TestCommand:
    @pytest.fixture
    def quick(self, tmp_path: Path) -> dict[str, str]:
        """Without the seconds that torch takes, and without a hub."""
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "torch.py").write_text(f"GPUS, BROKEN = 0, None\n{FAKE_TORCH}")
        root = str(Path(__file__).parents[2])
        return {"PYTHONPATH": f"{tmp_path / 'fake'}:{root}", "HF_HUB_OFFLINE": "1"}

    def test_before_the_first_start_all_is_well_and_nothing_is_made(
        self, tmp_path: Path, quick: dict[str, str]
    ) -> None:
        done = doctor(tmp_path, **quick)
        assert done.returncode == 0, done.stdout
        assert "0 fail" in done.stdout
        assert done.stderr == ""
        assert not (tmp_path / "data").exists()

    def test_a_cluster_in_order(
        self,
        tmp_path: Path,
        quick: dict[str, str],
        migrated_postgres_url: str,
        redis: RedisServer,
        s3_server: S3Server,
        s3_url: str,
    ) -> None:
        with answering(empty) as hub:
            done = doctor(
                tmp_path,
                "--json",
                **{**quick, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub},
                **s3_server.environment,
                FLATLORA_DATABASE_URL=migrated_postgres_url,
                FLATLORA_BROKER_URL=redis.url(),
                FLATLORA_STORE_URL=s3_url,
                FLATLORA_DOWNLOADS="redirect",
                FLATLORA_MAX_DATASET_BYTES="1000",
            )
        assert done.returncode == 0, done.stdout
        answer = json.loads(done.stdout)
        assert answer["ok"]
        told = {check["name"]: check["level"] for check in answer["checks"]}
        assert told.pop("workers") == "warn"  # none was started
        told.pop("open files")  # this machine's
        assert told == dict.fromkeys((
            "program", "data folder", "disk", "port", "database", "clock", "schema", "queue",
            "outbox", "broker", "redis persistence", "redis eviction", "redis writes", "store",
            "store creation", "store URLs", "hub", "torch", "gpu",
        ), "ok")  # fmt: skip

    def test_whatever_is_broken_is_told_for_itself_without_a_secret_or_a_traceback(
        self, tmp_path: Path, quick: dict[str, str]
    ) -> None:
        (tmp_path / "fake" / "torch.py").write_text("raise OSError('no libcudart')")
        (tmp_path / "file").touch()
        with answering(empty) as taken, silent() as port:
            environment = {
                **quick,
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": "http://127.0.0.1:1",
                "FLATLORA_DATA_DIR": str(tmp_path / "file"),
                "FLATLORA_PORT": taken.rpartition(":")[2],
                "FLATLORA_API_KEY": "c4n4ry-key",
                "FLATLORA_DATABASE_URL": f"postgresql://me:c4n4ry-pw@127.0.0.1:{port}/x",
                "FLATLORA_BROKER_URL": f"redis://:c4n4ry-pw@127.0.0.1:{port}/0",
                "FLATLORA_STORE_URL": "s3://bucket",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "AKIAC4N4RYC4N4RYC4N4",
                "AWS_SECRET_ACCESS_KEY": "c4n4ry-secret",
            }
            started = time.monotonic()
            as_json = doctor(tmp_path, "--json", **environment)
            waited = time.monotonic() - started
            for_people = doctor(tmp_path, **environment)
        assert as_json.returncode == for_people.returncode == 1
        told = {check["name"]: check for check in json.loads(as_json.stdout)["checks"]}
        failed = {name for name, check in told.items() if check["level"] == "fail"}
        assert failed == {"data folder", "port", "database", "broker", "store", "torch"}
        assert told["hub"]["level"] == "warn"
        assert waited < 25
        for done in (as_json, for_people):
            written = (done.stdout + done.stderr).lower()
            assert "c4n4ry" not in written
            assert "traceback" not in written
        for check in told.values():
            if check["level"] != "ok":
                assert check["mend"] in for_people.stdout

    def test_the_disk_that_is_left_is_that_of_the_data_folder(self, tmp_path: Path) -> None:
        """And not that of the folder it is run in."""
        (finding,) = machine.disk(Settings(data_dir=tmp_path / "not" / "there"))
        assert finding.found.endswith(str(tmp_path))
        free = shutil.disk_usage(tmp_path).free / 2**30
        assert float(finding.found.split()[0]) == pytest.approx(free, abs=2)
