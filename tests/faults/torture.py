"""Breaks a cluster at random for a while, lets it settle, and asks the oracle what it has kept.

    python -m tests.faults.torture [--seconds 600] [--seed N] [--json FILE]

The seed determines which faults come in which order, and which jobs; not the moments at which they
meet. Ends with 1, and keeps the logs, if a job was lost, run twice to an end, failed without being
made to, or given other bytes than an unbroken run gives.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from app.failpoints import Point
from tests.faults.cluster import Cluster, Row
from tests.faults.failpoints import Failpoints
from tests.faults.journal import Violation
from tests.faults.nodes import Worker
from tests.faults.summary import FAULTS, count
from tests.system.service import EXAMPLES, until

WORKERS, SLOTS = 3, 2
WAITING = 12  # jobs that the client keeps under way
REAL_EVERY = 40  # jobs, one of which is trained for real
SETTLE_SECONDS = 180
ENVIRONMENT = {
    "FLATLORA_MAX_ATTEMPTS": "1000",  # however often its trainer is killed, a job is not to blame
    "FLATLORA_RETRY_SECONDS": "0",
    "FLATLORA_STALL_SECONDS": "60",
    "OMP_NUM_THREADS": "1",  # threads of several trainers would wait for each other
}


@dataclass
class Asked:
    """What the client has wanted."""

    keys: dict[str, str] = field(default_factory=dict)
    """Idempotency keys, and the jobs that they made."""
    cancelled: set[str] = field(default_factory=set)
    poisoned: set[str] = field(default_factory=set)
    real: set[str] = field(default_factory=set)
    faults: list[Violation] = field(default_factory=list)
    refused: int = 0


class Client:
    """Submits jobs, repeats itself until it is answered, cancels some, and asks again."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.asked = Asked()
        self._cluster = cluster
        self._random = random.Random(seed + 1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)

    def __enter__(self) -> "Client":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(120)

    def _run(self) -> None:
        while not self._over.wait(self._random.uniform(0.02, 0.4)):
            if self._under_way() < WAITING:
                self._submit()
            if self.asked.keys and self._random.random() < 0.05:
                self._again()
            if self.asked.keys and self._random.random() < 0.08:
                self._cancel()

    def _under_way(self) -> int:
        try:
            listed = self._cluster.api.http.get(
                "/jobs", params={"status": ["queued", "running"], "limit": 100}
            )
        except httpx2.HTTPError:
            return WAITING
        return len(listed.json()["items"]) if listed.is_success else WAITING

    def _submit(self) -> None:
        number = len(self.asked.keys)
        key, body = f"key-{number}", self._body(number)
        while not self._over.is_set():
            if job_id := self._post(body, key):
                self.asked.keys[key] = job_id
                if "real" in body["labels"]:
                    self.asked.real.add(job_id)
                if {"full_at", "memory_at"} & body["labels"].keys():
                    self.asked.poisoned.add(job_id)
                return
            self.asked.refused += 1
            self._over.wait(0.3)

    def _post(self, body: dict[str, Any], key: str) -> str | None:
        try:
            response = self._cluster.post(body, key=key)
        except httpx2.HTTPError:
            return None
        if response.status_code == 202:
            return str(response.json()["id"])
        if response.status_code != 503:
            self._complain(key, f"POST gave {response.status_code}: {response.text}")
        return None

    def _body(self, number: int) -> dict[str, Any]:
        draw = self._random
        if number % REAL_EVERY == REAL_EVERY // 4:
            return real_body()
        labels: dict[str, str] = {}
        if draw.random() < 0.04:
            labels[draw.choice(["full_at", "memory_at"])] = "3"
        return self._cluster.body(
            steps=draw.randrange(5, 80),
            checkpoint_steps=draw.randrange(2, 12),
            step_ms=draw.choice([2, 10, 30, 60]),
            labels=labels,
            seed=draw.randrange(1000),
            priority=draw.randrange(10),
            dry_run=draw.random() < 0.05,
        )

    def _again(self) -> None:
        """A client that did not hear the answer."""
        key, job_id = self._random.choice(list(self.asked.keys.items()))
        try:
            body = self._cluster.api.http.get(f"/jobs/{job_id}").json().get("spec")
            found = self._post(body, key) if body else None
        except httpx2.HTTPError:
            return
        if found not in {None, job_id}:
            self._complain(job_id, f"its key made a second job, {found}")

    def _cancel(self) -> None:
        job_id = self._random.choice(list(self.asked.keys.values())[-WAITING:])
        self.asked.cancelled.add(job_id)  # before: the answer may be lost
        try:
            answer = self._cluster.cancel(job_id).status_code
        except httpx2.HTTPError:
            return
        if answer not in {202, 409, 503}:
            self._complain(job_id, f"cancel gave {answer}")

    def _complain(self, job: str, what: str) -> None:
        self.asked.faults.append(Violation(job, "client", what))


def real_body() -> dict[str, Any]:
    """Always the same, so that one unbroken run is the twin of all."""
    return {
        "base_model": f"file:{EXAMPLES / 'tiny-base'}",
        "dataset_uri": f"file:{EXAMPLES / 'data' / 'train.jsonl'}",
        "rank": 4,
        "labels": {"real": "1"},
        "lora": {"dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "data": {"max_length": 128},
        "training": {"max_steps": 30, "batch_size": 4, "checkpoint_steps": 3},
        "evaluation": {"max_rows": 8, "every_steps": 15},
    }


class Chaos:
    """One fault after the other, on whatever is there."""

    def __init__(self, cluster: Cluster, failpoints: Failpoints, seed: int) -> None:
        self._cluster = cluster
        self._failpoints = failpoints
        self._random = random.Random(seed)
        often, rare = 3, 1
        self._faults: dict[Callable[[], None], int] = {
            self.kill_trainer: 5,
            self.kill_pool_child: often,
            self.kill_celery: rare,
            self.kill_worker: rare,
            self.kill_api: rare,
            self.drain_worker: rare,
            self.freeze_worker: 2,
            self.kill_postgres: rare,
            self.stop_postgres: rare,
            self.kill_redis: rare,
            self.wipe_redis: rare,
            self.cut: 2,
            self.stall: 2,
            self.half_open: rare,
            self.slow: rare,
            self.cut_commit: 5,
            self.fire: 5,
            self.spoil_checkpoint: 2,
        }

    def run(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            (fault,) = self._random.choices(list(self._faults), weights=list(self._faults.values()))
            fault()
            self._mend()
            time.sleep(min(left, self._random.uniform(0.05, 0.5)))

    def calm(self) -> None:
        """No faults any more; everything that was stopped is started."""
        for point in Point:
            self._failpoints.disarm(point)
        for proxy in [*self._cluster.proxies("postgres"), *self._cluster.proxies("redis")]:
            proxy.pass_through()
        self._mend()

    def _mend(self) -> None:
        """What a service manager does."""
        for server in (self._cluster.postgres, self._cluster.redis):
            if not server.is_running:
                server.start()
        for node in self._cluster.nodes:
            if not node.is_running:
                node.launch()

    def _worker(self) -> Worker:
        return self._random.choice(self._cluster.workers)

    def kill_trainer(self) -> None:
        if any(worker.trainers() for worker in self._cluster.workers):
            self._cluster.kill("trainer")

    def kill_pool_child(self) -> None:
        if any(worker.pool_children(busy=True) for worker in self._cluster.workers):
            self._cluster.kill("pool child")

    def kill_celery(self) -> None:
        worker = self._worker()
        if worker.celery():
            self._cluster.kill("celery main", worker=self._cluster.workers.index(worker))

    def kill_worker(self) -> None:
        self._worker().kill()

    def kill_api(self) -> None:
        if self._random.random() < 0.5 and self._cluster.api.servers():
            self._cluster.kill("api server")
        else:
            self._cluster.kill("api")

    def drain_worker(self) -> None:
        worker = self._worker()
        code = worker.stop()
        count("worker stopped")
        if code:
            raise AssertionError(f"{worker.name} ended with {code} when it was stopped")

    def freeze_worker(self) -> None:
        index = self._random.randrange(WORKERS)
        self._cluster.freeze(index)
        time.sleep(self._random.choice([0.5, 2, 4, 9]))
        self._cluster.thaw(index)

    def kill_postgres(self) -> None:
        self._cluster.kill("postgres")
        time.sleep(self._random.choice([0, 0.5, 2, 6]))

    def stop_postgres(self) -> None:
        self._cluster.stop_postgres()
        time.sleep(self._random.choice([0, 0.5, 2, 6]))

    def kill_redis(self) -> None:
        self._cluster.kill("redis")
        time.sleep(self._random.choice([0, 0.5, 2]))

    def wipe_redis(self) -> None:
        self._cluster.wipe_redis()

    def cut(self) -> None:
        self._on_a_proxy("cut")

    def stall(self) -> None:
        self._on_a_proxy("stall")

    def half_open(self) -> None:
        self._on_a_proxy("half_open")

    def _on_a_proxy(self, what: str) -> None:
        proxies = self._cluster.proxies(self._random.choice(["postgres", "redis"]))
        proxy = self._random.choice(proxies)
        getattr(proxy, what)()
        time.sleep(self._random.choice([0.2, 0.5, 1, 4]))
        proxy.pass_through()

    def slow(self) -> None:
        proxy = self._random.choice(self._cluster.proxies("postgres"))
        proxy.slow(self._random.choice([20_000, 100_000]))
        time.sleep(2)
        proxy.pass_through()

    def cut_commit(self) -> None:
        self._random.choice(self._cluster.proxies("postgres")).cut_after(b"COMMIT")

    def fire(self) -> None:
        """Whoever comes by a point next is killed there."""
        point = self._random.choice(list(Point))
        self._failpoints.arm(point)
        try:
            self._failpoints.wait(point, seconds=1)
        except AssertionError:
            self._failpoints.disarm(point)

    def spoil_checkpoint(self) -> None:
        """A byte of one, here or in the store."""
        found = sorted(self._checkpoints())
        if found:
            with suppress_gone(), self._random.choice(found).open("r+b") as file:
                size = file.seek(0, 2)
                if size:
                    file.seek(self._random.randrange(size))
                    file.write(b"\xaa")
                    count("checkpoint spoiled")

    def _checkpoints(self) -> Iterator[Path]:
        yield from (self._cluster.folder / "store").glob("jobs/*/checkpoints/*/*/*")
        for worker in self._cluster.workers:
            yield from worker.data_dir.glob("work/*/checkpoints/ckpt-*/*")


class suppress_gone:  # noqa: N801 - reads as contextlib.suppress does
    """A checkpoint that is spoiled may be deleted meanwhile."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, FileNotFoundError)


def unexpected(rows: list[Row], asked: Asked, twin: dict[str, str]) -> Iterator[Violation]:
    """Ends that nobody asked for, and real adapters that are not their twin."""
    for row in rows:
        job_id, status = row["id"], row["status"]
        if status == "failed" and job_id not in asked.poisoned:
            yield Violation(job_id, "failed", f"{row['reason']}: {row['message']}")
        if status == "cancelled" and job_id not in asked.cancelled:
            yield Violation(job_id, "cancelled", "nobody has asked for that")
        if status == "succeeded" and job_id in asked.poisoned and not row["spec"]["dry_run"]:
            yield Violation(job_id, "poison", "it was to fail and has succeeded")
        if status == "succeeded" and job_id in asked.real:
            found = {file["name"]: file["sha256"] for file in row["adapter"]["files"]}
            if found != twin:
                yield Violation(job_id, "twin", "its adapter is not that of the unbroken run")


def torture(folder: Path, seed: int, seconds: float) -> dict[str, Any]:
    """Break a cluster for so many seconds; what came of it."""
    before = FAULTS.copy()
    failpoints = Failpoints(folder / "failpoints")
    environment = {**ENVIRONMENT, **failpoints.environment}
    with Cluster(folder / "cluster", workers=WORKERS, slots=SLOTS, environment=environment) as it:
        unbroken = it.finish(it.post(real_body()).json()["id"], seconds=120)
        twin = {file["name"]: file["sha256"] for file in unbroken["adapter"]["files"]}
        chaos = Chaos(it, failpoints, seed)
        with Client(it, seed) as client:
            chaos.run(seconds)
            chaos.calm()
        rows = it.settle(seconds=SETTLE_SECONDS)
        until(lambda: not it.query("SELECT 1 FROM outbox"), seconds=30)
        found = [*it.violations(), *unexpected(rows, client.asked, twin), *client.asked.faults]
        found += [Violation("", "orphan", str(process)) for process in it.orphans()]
        executions, faults = it.executions(), FAULTS - before
        return {
            "seed": seed,
            "seconds": seconds,
            "jobs": dict(Counter(row["status"] for row in rows)),
            "trained for real": len(client.asked.real) + 1,
            "claims": sum(row["fence"] for row in rows),
            "steps": sum(entry["event"] == "step" for entry in executions),
            "resumes": sum(entry["event"] == "resume" for entry in executions),
            "requests refused": client.asked.refused,
            "faults": dict(faults.most_common()),
            "faults injected": faults.total(),
            "violations": [violation._asdict() for violation in found],
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="default: another each time")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="flatlora-torture-"))
    sys.stdout.write(f"seed {seed}, {options.seconds:g} s, logs in {folder}\n")
    sys.stdout.flush()
    result = torture(folder, seed, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.items():
        if name == "violations":
            continue
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{kind} {number}" for kind, number in value.items())
        sys.stdout.write(f"{name}: {shown}\n")
    for violation in result["violations"]:
        sys.stdout.write("VIOLATION {job} {rule}: {detail}\n".format(**violation))
    sys.stdout.write(f"violations: {len(result['violations'])}\n")
    if result["violations"]:
        sys.stdout.write(f"the logs are in {folder}\n")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
