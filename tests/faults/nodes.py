"""The machines of a cluster: an API server, and workers, each with its own way to the servers."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import httpx2

from tests.faults.procs import Process, descendants, end, is_alive, reserve_port, send, spawn
from tests.faults.proxy import Proxy
from tests.faults.servers import PostgresServer, RedisServer
from tests.faults.summary import count
from tests.system.service import until

READY_SECONDS = 60  # others may use the machine too
TRAINERS = ("worker.trainer", "tests.faults.tiny_trainer")


class Node:
    """``flatlora <command>`` with a data folder of its own, which it keeps over its restarts.

    Attributes:
        name: Such as ``worker-0``.
        environment: Of its next start; change it as you like.
        log: What it has printed.
        postgres: Between it and the database, for its faults alone.
        redis: Between it and the broker.
    """

    command = ""
    role = ""
    """Of its first process, in the counts of faults."""

    def __init__(
        self,
        name: str,
        folder: Path,
        environment: Mapping[str, str],
        postgres: PostgresServer,
        redis: RedisServer,
    ) -> None:
        self.name = name
        self.data_dir = folder / name
        self.log = folder / f"{name}.log"
        self.postgres = Proxy("127.0.0.1", postgres.port, name="postgres")
        self.redis = Proxy("127.0.0.1", redis.port, name="redis")
        self.environment = {
            **environment,
            "FLATLORA_DATA_DIR": str(self.data_dir),
            "FLATLORA_DATABASE_URL": postgres.url(port=self.postgres.port),
            "FLATLORA_BROKER_URL": redis.url(port=self.redis.port),
        }
        for proxy in (self.postgres, self.redis):
            proxy.start()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process, f"{self.name} was not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start it, without waiting until it is ready."""
        assert not self.is_running, f"{self.name} runs already"
        self._process = spawn(
            [sys.executable, "-m", "app.cli.main", self.command],
            log=self.log,
            environment=self.environment,
            folder=self._folder,
        )

    def start(self) -> None:
        self.launch()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.is_running, f"{self.name} has ended:\n{self.tail()}"
            return self._is_ready()

        until(is_ready, seconds=READY_SECONDS)

    def terminate(self) -> None:
        """SIGTERM, which drains a worker."""
        assert self._process, f"{self.name} was not started"
        self._process.send_signal(signal.SIGTERM)

    def stop(self, *, seconds: float = 60) -> int:
        """Until it has ended after a SIGTERM; its exit code. Nothing of it is left."""
        self.terminate()
        assert self._process
        return self._process.wait(seconds)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process else None

    def kill(self) -> list[int]:
        """``kill -9`` of its first process; the ids of the others, which have to follow."""
        others = [process.pid for process in descendants(self.pid)]
        assert self._process, f"{self.name} was not started"
        self._process.kill()
        self._process.wait()
        count(f"{self.role} killed")
        return others

    def restart(self) -> None:
        """Killed where it runs, and started."""
        if self.is_running:
            others = self.kill()
            until(lambda: not any(map(is_alive, others)), seconds=20)
        self.start()

    def tree(self) -> list[Process]:
        """What it has started, and that in turn; without its first process."""
        return descendants(self.pid) if self.is_running else []

    def close(self) -> None:
        """Gone at once, whatever state it is in; no fault of the test."""
        if self._process and self.is_running:
            end([self.pid, *(process.pid for process in self.tree())])
            self._process.wait()
        for proxy in (self.postgres, self.redis):
            proxy.close()

    def tail(self, characters: int = 4000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def _is_ready(self) -> bool:
        raise NotImplementedError


class Api(Node):
    command = role = "api"

    def __init__(
        self,
        name: str,
        folder: Path,
        environment: Mapping[str, str],
        postgres: PostgresServer,
        redis: RedisServer,
    ) -> None:
        super().__init__(name, folder, environment, postgres, redis)
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self.environment["FLATLORA_PORT"] = str(self.port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def http(self) -> httpx2.Client:
        """With the key. One for all requests: connections that a kill has broken are replaced."""
        key = self.environment["FLATLORA_API_KEY"]
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60)

    def servers(self) -> list[int]:
        """The process that answers requests, if it is there; its parent starts it again."""
        return [process.pid for process in self.tree() if "app.serve" in process.command]

    def close(self) -> None:
        super().close()
        self._reserved.close()
        if "http" in self.__dict__:
            self.http.close()

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz").is_success
        except httpx2.TransportError:
            return False


class Worker(Node):
    """A machine that trains: parent, Celery, a pool child for each slot, a trainer for each job."""

    command, role = "worker", "worker parent"

    @property
    def alive_file(self) -> Path:
        return self.data_dir / "worker.alive"

    @property
    def slots(self) -> int:
        return self.environment["FLATLORA_DEVICES"].count(",") + 1

    def celery(self) -> list[int]:
        """Celery's main process, if it is there."""
        return [process.pid for process in self._celery_processes() if process.parent == self.pid]

    def pool_children(self, *, busy: bool | None = None) -> list[int]:
        """One for each slot; only those that have a trainer, or have none, if so asked."""
        main = self.celery()
        children = [process.pid for process in self._celery_processes() if process.parent in main]
        parents = {process.parent for process in self._trainers()}
        return [pid for pid in children if busy is None or (pid in parents) == busy]

    def trainers(self, job_id: str = "") -> list[int]:
        """Those that run here, or that of one job."""
        return [process.pid for process in self._trainers() if job_id in process.command]

    def freeze(self) -> None:
        """SIGSTOP of all its processes: a machine that hangs."""
        stopped: set[int] = set()
        while new := {self.pid, *(process.pid for process in self.tree())} - stopped:
            for pid in new:
                send(pid, signal.SIGSTOP)
            stopped |= new  # one may have started another before it was stopped
        count("worker frozen")

    def thaw(self) -> None:
        for pid in (self.pid, *(process.pid for process in self.tree())):
            send(pid, signal.SIGCONT)

    def launch(self) -> None:
        self._ready_after = self.log.stat().st_size if self.log.exists() else 0
        super().launch()

    def _is_ready(self) -> bool:
        """Every slot has said so since this start."""
        with self.log.open("rb") as log:
            log.seek(self._ready_after)
            return log.read().count(b"slot ready") >= self.slots

    def _celery_processes(self) -> list[Process]:
        return [process for process in self.tree() if "worker.celery_worker" in process.command]

    def _trainers(self) -> list[Process]:
        return [
            process for process in self.tree() if any(name in process.command for name in TRAINERS)
        ]
