"""A whole cluster in processes of its own, for tests that break it and look what it has kept.

    def test_a_killed_trainer_is_no_loss(cluster: Cluster) -> None:
        job_id = cluster.submit(steps=30)
        cluster.wait(job_id, lambda row: row["step"] >= 12)
        cluster.kill("trainer")
        assert cluster.finish(job_id)["attempt"] == 2
        cluster.check()

``cluster`` has one worker with one slot; ``make_cluster(workers=2, slots=2, …)`` makes others.

    cluster.api, cluster.workers[n]      machines; each has start, stop (drains), kill, restart,
                                         environment (of its next start), and its own proxies
                                         postgres and redis: cut, stall, half_open, slow, cut_after
    cluster.postgres, cluster.redis      servers: start, stop, kill, wipe
    cluster.proxies("postgres")          every machine's, to break the network as a whole

What is asked of ``cluster`` itself goes past every proxy and past the API, except ``submit``,
``post``, ``job``, ``events`` and ``cancel``, which are requests.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import unquote

import httpx2
import psycopg
from psycopg.rows import dict_row

from tests.faults import journal
from tests.faults.journal import Story, Tolerance, Violation
from tests.faults.nodes import Api, Node, Worker
from tests.faults.objects import hashes_in_store
from tests.faults.procs import Process, descendants, end, naming
from tests.faults.proxy import Proxy
from tests.faults.servers import PostgresServer, RedisServer, migrated_server
from tests.faults.summary import count
from tests.faults.tiny_trainer import LOG_VARIABLE
from tests.system.service import EXAMPLES, TERMINAL, until

Json = dict[str, Any]
Row = dict[str, Any]
What = Literal[
    "worker parent", "celery main", "pool child", "trainer", "api", "api server", "postgres",
    "redis",
]  # fmt: skip

ROWS = b"".join(b'{"prompt": "%d", "completion": "%d"}\n' % (n, n) for n in range(20))

# A tenth and less of the defaults, so that what takes a minute there takes seconds here.
SHORT = {
    "FLATLORA_LEASE_SECONDS": "3",
    "FLATLORA_HEARTBEAT_SECONDS": "0.5",
    "FLATLORA_RELAY_SECONDS": "0.5",
    "FLATLORA_SWEEP_SECONDS": "1",
    "FLATLORA_RETRY_SECONDS": "0.2",
    "FLATLORA_CANCEL_GRACE_SECONDS": "3",
    "FLATLORA_DRAIN_GRACE_SECONDS": "10",
    "FLATLORA_STALL_SECONDS": "60",  # importing torch is silent, and slow where others work too
}


class Cluster:
    """Postgres, Redis, an API and workers.

    Args:
        folder: For logs, data folders, the store and the execution log; stays.
        workers: Machines that train, each with a data folder of its own.
        slots: Of each.
        trainer: ``tiny`` is tests.faults.tiny_trainer, which a job's label ``real: "1"`` makes the
            real one; ``real`` is the real one for all.
        environment: For every machine, over the short timings: FLATLORA_… or others.
        store_url: Where artifacts lie. Empty: in a folder that all machines share.
        appendonly: Whether what Redis holds outlives its being killed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 1,
        slots: int = 1,
        trainer: Literal["tiny", "real"] = "tiny",
        environment: Mapping[str, str] | None = None,
        store_url: str = "",
        appendonly: bool = False,
    ) -> None:
        self.folder = folder
        self.execution_log = folder / "executions.jsonl"
        self.store_url = store_url or f"file://{folder / 'store'}"
        self.accepted: dict[str, str] = {}
        """Jobs that were answered with 202, each with the hash of its dataset."""
        self.thawed: list[float] = []
        """When frozen workers were woken."""
        self._is_real = trainer == "real"
        self._more = dict(environment or {})
        self._make_inputs()
        self.postgres = PostgresServer(folder, template=migrated_server())
        self.redis = RedisServer(folder, appendonly=appendonly)
        shared = self._environment(slots)
        servers = (self.postgres, self.redis)
        self.api = Api("api", folder, shared, *servers)
        self.workers = [
            Worker(f"worker-{index}", folder, shared, *servers) for index in range(workers)
        ]

    @property
    def nodes(self) -> list[Node]:
        return [self.api, *self.workers]

    def _environment(self, slots: int) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if "FLATLORA" not in name}
        roots = f"{self.folder / 'inputs'},{EXAMPLES}"
        module = "worker.trainer" if self._is_real else "tests.faults.tiny_trainer"
        return {
            **inherited,
            **SHORT,
            "FLATLORA_API_KEY": f"flk_{secrets.token_hex(24)}",
            "FLATLORA_DATASET_ROOTS": roots,
            "FLATLORA_DEVICES": ",".join(["cpu"] * slots),
            "FLATLORA_MODEL_ROOTS": roots,
            "FLATLORA_STORE_URL": self.store_url,
            "FLATLORA_TRAINER_MODULE": module,
            LOG_VARIABLE: str(self.execution_log),
            **self._more,
        }

    def _make_inputs(self) -> None:
        """Rows, and what passes for a base model until somebody loads it."""
        inputs = self.folder / "inputs"
        (inputs / "model").mkdir(parents=True)
        (inputs / "model" / "config.json").write_text("{}")
        (inputs / "model" / "model.safetensors").write_bytes(bytes(8))
        (inputs / "rows.jsonl").write_bytes(ROWS)
        (self.folder / "store").mkdir(mode=0o700)

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Everything, and wait until all are ready."""
        self.postgres.start()
        self.redis.start()
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()

    def close(self) -> None:
        """End everything at once, in whatever state it is. May be called twice."""
        for node in self.nodes:
            node.close()
        end([process.pid for process in self.processes()])
        for server in (self.postgres, self.redis):
            server.close()

    def processes(self) -> list[Process]:
        """All that live of the machines, whoever is their parent now."""
        return [process for process in naming(str(self.folder)) if process.pid != os.getpid()]

    def orphans(self) -> list[Process]:
        """Those that belong to no machine that runs."""
        processes = self.processes()  # first: what is started meanwhile is none
        known = {node.pid for node in self.nodes if node.is_running}
        known |= {process.pid for pid in list(known) for process in descendants(pid)}
        return [process for process in processes if process.pid not in known]

    def kill(self, what: What, *, worker: int | None = None, job_id: str = "") -> list[int]:
        """``kill -9``, counted as a fault; the ids of what was killed.

        The worker's parent is that of the first worker if none is named, the rest of any of them;
        a pool child only while it has a job. Waits for up to 10 s until there is one to kill.
        """
        match what:
            case "postgres" | "redis":
                server = self.postgres if what == "postgres" else self.redis
                pids = [server.pid]
                server.kill()
                count(f"{what} killed")
            case "api":
                pids = [self.api.pid]
                self.api.kill()
            case "worker parent":
                pids = [self.workers[worker or 0].pid]
                self.workers[worker or 0].kill()
            case _:
                pids = until(lambda: self._find(what, worker, job_id), seconds=10, every=0.01)[:1]
                end(pids)
                count(f"{what} killed")
        return pids

    def _find(self, what: str, worker: int | None, job_id: str) -> list[int]:
        if what == "api server":
            return self.api.servers()
        found: list[int] = []
        for node in self.workers if worker is None else [self.workers[worker]]:
            match what:
                case "celery main":
                    found += node.celery()
                case "pool child":
                    found += node.pool_children(busy=True)
                case "trainer":
                    found += node.trainers(job_id)
        return found

    def stop_postgres(self) -> None:
        self.postgres.stop()
        count("postgres stopped")

    def freeze(self, worker: int = 0) -> None:
        self.workers[worker].freeze()

    def thaw(self, worker: int = 0) -> None:
        self.thawed.append(time.time())
        self.workers[worker].thaw()

    def wipe_redis(self) -> None:
        self.redis.wipe()
        count("redis wiped")

    def proxies(self, server: Literal["postgres", "redis"]) -> list[Proxy]:
        return [getattr(node, server) for node in self.nodes]

    def body(
        self,
        *,
        steps: int = 20,
        checkpoint_steps: int = 5,
        step_ms: int = 10,
        labels: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Json:
        """A job; ``labels`` as tests.faults.tiny_trainer takes them, ``more`` over all the rest."""
        inputs = EXAMPLES if self._is_real else self.folder / "inputs"
        model, rows = (
            ("tiny-base", "data/train.jsonl") if self._is_real else ("model", "rows.jsonl")
        )
        return {
            "base_model": f"file:{inputs / model}",
            "dataset_uri": f"file:{inputs / rows}",
            "rank": 4,
            "labels": {"step_ms": str(step_ms), **(labels or {})},
            "training": {"max_steps": steps, "checkpoint_steps": checkpoint_steps},
            **more,
        }

    def post(self, body: Json, *, key: str | None = None) -> httpx2.Response:
        """POST /jobs. A job that is accepted is looked for by ``check``."""
        headers = {"Idempotency-Key": key} if key else {}
        digest = self._digest(body["dataset_uri"])
        response = self.api.http.post("/jobs", json=body, headers=headers)
        if response.status_code == 202:
            self.accepted[response.json()["id"]] = digest
        return response

    def _digest(self, uri: str) -> str:
        """Of the rows as they are now; of none where the service is to refuse them."""
        if uri.startswith("dataset:"):
            known = "SELECT sha256 FROM datasets WHERE id = %s"
            return "".join(row["sha256"] for row in self.query(known, uri.removeprefix("dataset:")))
        path = Path(unquote(uri.removeprefix("file:")))
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

    def submit(self, *, key: str | None = None, **what: Any) -> str:
        """A job of ``body(**what)``; its id."""
        response = self.post(self.body(**what), key=key)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def job(self, job_id: str) -> Json:
        return self._get(f"/jobs/{job_id}")

    def events(self, job_id: str) -> list[Json]:
        items: list[Json] = self._get(f"/jobs/{job_id}/events?limit=1000")["items"]
        return items

    def cancel(self, job_id: str) -> httpx2.Response:
        return self.ask(job_id, "cancel")

    def ask(self, job_id: str, what: Literal["cancel", "pause", "resume"]) -> httpx2.Response:
        return self.api.http.post(f"/jobs/{job_id}/{what}")

    def _get(self, path: str) -> Json:
        response = self.api.http.get(path)
        assert response.status_code == 200, response.text
        answer: Json = response.json()
        return answer

    def query(self, sql: str, *values: Any) -> list[Row]:
        """Rows of the database, past every proxy. Writes are committed."""
        with psycopg.connect(self.postgres.url(), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.cursor(row_factory=dict_row)
            cursor.execute(sql.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def row(self, job_id: str) -> Row:
        (row,) = self.query("SELECT * FROM jobs WHERE id = %s", job_id)
        return row

    def wait(self, job_id: str, seen: Callable[[Row], bool], *, seconds: float = 60) -> Row:
        """The job's row as it was when the condition first held; also through outages.

        Fails at once where the job is over and the condition does not hold.
        """
        row: Row = {}

        def look() -> bool:
            try:
                row.update(self.row(job_id))
            except psycopg.OperationalError:
                return False
            has_seen = seen(row)
            assert has_seen or row["status"] not in TERMINAL, self._shown(row)
            return has_seen

        until(look, seconds=seconds, every=0.02)
        return row

    def finish(self, job_id: str, *, seconds: float = 60) -> Row:
        """Wait until it has succeeded."""
        return self.wait(job_id, lambda row: row["status"] == "succeeded", seconds=seconds)

    def settle(self, *, seconds: float = 120) -> list[Row]:
        """Wait until every accepted job is over; their rows."""
        accepted = list(self.accepted)

        def look() -> list[Row]:
            try:
                rows = self.query("SELECT * FROM jobs WHERE id = ANY(%s)", accepted)
            except psycopg.OperationalError:
                return []
            return rows if all(row["status"] in TERMINAL for row in rows) else []

        return until(look, seconds=seconds) if accepted else []

    def _shown(self, row: Row) -> str:
        told = ("id", "status", "reason", "message", "attempt", "fence", "step")
        return f"{ {name: row[name] for name in told} }\n{self.logs()}"

    def executions(self, job_id: str = "") -> list[Json]:
        """The execution log, of one job if it is named."""
        entries = journal.read_executions(self.execution_log)
        return [entry for entry in entries if job_id in ("", entry["job"])]

    def stories(self) -> list[Story]:
        """What is known of each accepted job."""
        rows = {row["id"]: row for row in self.query("SELECT * FROM jobs")}
        events = self.query("SELECT * FROM job_events ORDER BY job_id, seq")
        executions = self.executions()
        return [
            Story(
                job_id,
                self._with_trainer(rows.get(job_id)),
                digest,
                [entry for entry in executions if entry["job"] == job_id],
                [event for event in events if event["job_id"] == job_id],
                self.stored(job_id),
            )
            for job_id, digest in self.accepted.items()
        ]

    def _with_trainer(self, row: Row | None) -> Row | None:
        if row and self._is_real:
            row["spec"]["labels"]["real"] = "1"
        return row

    def stored(self, job_id: str) -> dict[str, str] | None:
        """Hashes of the bytes in the store under the names of the job's manifest, if it has one."""
        return hashes_in_store(self.store_url, self._more, job_id)

    def violations(self, *, tolerance_seconds: float = 0.5) -> list[Violation]:
        return journal.check(self.stories(), Tolerance(tolerance_seconds, self.thawed))

    def check(self, *, tolerance_seconds: float = 0.5) -> None:
        """That every accepted job is over, and every rule of the journal kept."""
        found = self.violations(tolerance_seconds=tolerance_seconds)
        assert not found, "\n".join(map(str, found)) + "\n" + self.logs()

    def logs(self, characters: int = 4000) -> str:
        """The ends of all logs, for a failure."""
        parts = [f"--- {node.name} ({node.log})\n{node.tail(characters)}" for node in self.nodes]
        return "\n".join(parts)
