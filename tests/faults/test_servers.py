"""What the tests rely on of their servers: the same port, the data kept or gone, no leftovers."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import redis

from tests.faults.procs import descendants, is_alive
from tests.faults.servers import PostgresServer, RedisServer
from tests.system.service import until

FOREVER = """
import pathlib, signal, sys, threading
from tests.faults.servers import PostgresServer, RedisServer
servers = [PostgresServer(pathlib.Path(sys.argv[1])), RedisServer(pathlib.Path(sys.argv[1]))]
for server in servers:
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
print(*(server.pid for server in servers), flush=True)
signal.pause()
"""


class TestPostgres:
    def test_what_was_committed_outlives_every_end(self, tmp_path: Path) -> None:
        with PostgresServer(tmp_path) as postgres:
            port = postgres.port
            with psycopg.connect(postgres.url()) as connection:
                connection.execute("CREATE TABLE kept (id serial)")
            ends: list[Callable[[], None]] = [
                postgres.kill, postgres.stop, lambda: postgres.stop("immediate"),
            ]  # fmt: skip
            for rows, stop in enumerate(ends, start=1):
                with psycopg.connect(postgres.url(), autocommit=True) as connection:
                    connection.execute("INSERT INTO kept DEFAULT VALUES")
                    stop()
                    with pytest.raises(psycopg.OperationalError):
                        connection.execute("SELECT 1")
                with pytest.raises(psycopg.OperationalError):
                    psycopg.connect(postgres.url())
                postgres.start()
                assert postgres.port == port
                with psycopg.connect(postgres.url()) as connection:
                    assert connection.execute("SELECT count(*) FROM kept").fetchone() == (rows,)

    def test_one_may_begin_with_anothers_data(self, tmp_path: Path) -> None:
        with PostgresServer(tmp_path / "first") as first:
            with psycopg.connect(first.url()) as connection:
                connection.execute("CREATE TABLE kept (id int)")
            first.stop()
            with (
                PostgresServer(tmp_path / "second", template=first) as second,
                psycopg.connect(second.url()) as connection,
            ):
                assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


class TestRedis:
    @pytest.mark.parametrize("appendonly", [True, False])
    def test_it_keeps_its_data_over_a_kill_where_it_is_told_to(
        self, tmp_path: Path, appendonly: bool
    ) -> None:
        with RedisServer(tmp_path, appendonly=appendonly) as server, server.client() as client:
            client.set("key", "value")
            server.kill()
            with pytest.raises(redis.exceptions.ConnectionError):
                client.ping()
            server.start()
            assert client.get("key") == (b"value" if appendonly else None)

    def test_wiped_it_is_empty(self, tmp_path: Path) -> None:
        with RedisServer(tmp_path, appendonly=True) as server, server.client() as client:
            client.set("key", "value")
            server.wipe()
            assert client.get("key") is None

    def test_nobody_enters_without_its_password(self, tmp_path: Path) -> None:
        with (
            RedisServer(tmp_path) as server,
            redis.Redis(port=server.port) as stranger,
            pytest.raises(redis.exceptions.AuthenticationError),
        ):
            stranger.ping()


class TestNoneIsLeft:
    def test_they_die_with_the_tests_whichever_thread_has_started_them(
        self, tmp_path: Path, open_folder: Path
    ) -> None:
        tests = subprocess.Popen(
            [sys.executable, "-c", FOREVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(open_folder)},
        )
        assert tests.stdout
        pids = [int(pid) for pid in tests.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        os.kill(tests.pid, signal.SIGKILL)
        tests.wait()
        tests.stdout.close()
        until(lambda: not any(map(is_alive, pids)), seconds=10)

    def test_closed_they_leave_neither_processes_nor_data(self, tmp_path: Path) -> None:
        with PostgresServer(tmp_path) as postgres, RedisServer(tmp_path) as redis_server:
            pids = [postgres.pid, redis_server.pid]
            pids += [child.pid for child in descendants(postgres.pid)]
            assert len(pids) > 2
            assert all(map(is_alive, pids))
        assert not any(map(is_alive, pids))
        assert not postgres.data.exists()
        assert not redis_server.data.exists()
        assert postgres.log.exists()
