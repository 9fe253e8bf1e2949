"""What a long queue costs: claims a second, and the latency of the API with none and many waiting.

    python -m benchmarks.queue [--queued 10000] [--requests 1000] [--projects 20]

Starts a throw-away Postgres, a Redis and the API. A request's time is measured by one client that
keeps its connection; the kinds and the two lengths of the queue take turns, so that a slow moment
of the machine meets all of them. The bare handlers are FastAPI routes that insert or select one row
through SQLAlchemy, on the same database. Ends with 1 if a job was claimed twice or a request
failed.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import httpx2
from rich.console import Console
from rich.table import Table
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.ids import new_id
from app.jobs.schemas import JobCreate
from app.jobs.states import Status
from app.migrate import upgrade
from app.tables import DEFAULT_PROJECT, JobRow
from tests.faults.procs import reserve_port
from tests.faults.servers import PostgresServer, RedisServer
from tests.system.service import EXAMPLES, until
from worker.claims import Claims

CLAIMERS = (1, 8)
ROUNDS = 4
PACED, PAUSE_SECONDS = 5, 0.1  # one in so many requests is sent once more, after a pause
KINDS = ("POST", "GET", "list", "bare POST", "bare GET", "POST, paced", "bare POST, paced")
KEY = "flk_benchmark"
BODY = {
    "base_model": f"file:{EXAMPLES / 'tiny-base'}",
    "dataset_uri": f"file:{EXAMPLES / 'data' / 'train.jsonl'}",
}

Times = dict[tuple[str, str], list[float]]
"""Milliseconds by kind of request and by length of the queue."""


def fill(url: str, number: int, projects: int) -> None:
    """Queue jobs of several projects, as the API does, without its checks."""
    spec = JobCreate.model_validate(BODY).resolved()
    engine = make_engine(url)
    values = {
        "base_model": spec.base_model, "dataset_uri": spec.dataset_uri, "labels": {},
        "spec": spec.model_dump(mode="json"), "status": Status.QUEUED, "priority": 5,
        "attempt": 0, "fence": 0, "runtime": 0.0, "recoveries": 0, "step": 0,
    }  # fmt: skip
    names = [DEFAULT_PROJECT, *(f"project-{number}" for number in range(1, projects))]
    rows = [
        {**values, "id": new_id("job"), "project": names[index % projects]}
        for index in range(number)
    ]
    with Session(engine) as session, session.begin():
        statement = insert(JobRow).values(created_at=now(), updated_at=now())
        session.execute(statement, rows)
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE jobs")
        connection.commit()
    engine.dispose()


def clear(url: str) -> None:
    engine = make_engine(url)
    with Session(engine) as session, session.begin():
        session.execute(delete(JobRow))
    engine.dispose()


def claim(url: str, name: str, seconds: float, claimed: "multiprocessing.Queue[list[str]]") -> None:
    """One worker: claims for a while, and never works."""
    claims = Claims(make_engine(url), worker=name, lease_seconds=600, max_attempts=3)
    claims.claim_next()  # the connection is made before the clock starts
    found, ends = [], time.monotonic() + seconds
    while time.monotonic() < ends and (lease := claims.claim_next()):
        found.append(lease.job_id)
    claimed.put(found)


def claims_per_second(url: str, claimers: int, seconds: float = 5) -> float:
    queue: multiprocessing.Queue[list[str]] = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(target=claim, args=(url, f"w{index}", seconds, queue))
        for index in range(claimers)
    ]
    for worker in workers:
        worker.start()
    found = [job_id for _ in workers for job_id in queue.get()]
    for worker in workers:
        worker.join()
    if len(found) != len(set(found)):
        raise SystemExit("a job was claimed twice")
    requeue(url)
    return len(found) / seconds


def requeue(url: str) -> None:
    engine = make_engine(url)
    with Session(engine) as session, session.begin():
        session.execute(update(JobRow).values(status=Status.QUEUED, worker=None, started_at=None))
    engine.dispose()


class Api:
    """A server process and a client that keeps its connection."""

    def __init__(self, application: str, port: int, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "uvicorn", "--factory", application, "--port", str(port)]
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [*command, "--log-level", "warning", "--no-access-log"],
            env={**os.environ, **environment},
            stderr=subprocess.DEVNULL,
        )
        self.http = httpx2.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
        )
        until(self._answers)

    def _answers(self) -> bool:
        try:
            return self.http.get("/healthz").is_success
        except httpx2.TransportError:
            return False

    def cpu_seconds(self) -> float:
        """What its process has computed so far."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, stat[11:13])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.http.close()
        self._process.terminate()
        self._process.wait()


def milliseconds(send: Callable[[], httpx2.Response]) -> float:
    started = time.perf_counter()
    response = send()
    taken = 1000 * (time.perf_counter() - started)
    if not response.is_success:
        raise SystemExit(f"{response.request.url}: {response.status_code} {response.text}")
    return taken


def measure(ours: Api, bare: Api, length: str, number: int, times: Times) -> None:
    """Each kind back to back, and those that write once more with a pause before each request.

    Back to back, the relay sends the wake-ups of the jobs before in the same process meanwhile.
    """
    newest = ours.http.get("/jobs", params={"limit": 1}).json()["items"][0]["id"]
    bare_id = bare.http.post("/rows", json=BODY).json()["id"]
    requests: dict[str, Callable[[], httpx2.Response]] = {
        "POST": lambda: ours.http.post("/jobs", json=BODY),
        "GET": lambda: ours.http.get(f"/jobs/{newest}"),
        "list": lambda: ours.http.get("/jobs"),
        "bare POST": lambda: bare.http.post("/rows", json=BODY),
        "bare GET": lambda: bare.http.get(f"/rows/{bare_id}"),
    }
    for kind, send in requests.items():
        milliseconds(send)  # warm
        times.setdefault((kind, length), []).extend(milliseconds(send) for _ in range(number))
    for _ in range(number // PACED):
        for kind in ("POST", "bare POST"):
            time.sleep(PAUSE_SECONDS)
            times.setdefault((f"{kind}, paced", length), []).append(milliseconds(requests[kind]))


def make_bare() -> Any:
    """FastAPI with two routes that insert and select one row: what any such service costs."""
    from fastapi import Depends, FastAPI
    from pydantic import BaseModel

    from app.db import make_async_engine

    class Row(BaseModel):
        base_model: str
        dataset_uri: str

    url = os.environ["FLATLORA_DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:")
    sessions = async_sessionmaker(make_async_engine(url), expire_on_commit=False)

    async def transaction() -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as session:
            yield session

    session_of_a_request = Annotated[AsyncSession, Depends(transaction, scope="function")]
    app = FastAPI()

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {}

    @app.post("/rows", status_code=202)
    async def create(row: Row, session: session_of_a_request) -> dict[str, Any]:
        made = await session.execute(
            insert(JobRow)
            .values(
                id=new_id("job"), labels={}, spec=row.model_dump(), status=Status.SUCCEEDED,
                attempt=0, fence=0, runtime=0.0, recoveries=0, step=0,
                created_at=now(), updated_at=now(), **row.model_dump(),
            )
            .returning(JobRow.id)
        )  # fmt: skip
        return {"id": made.scalar_one()}

    @app.get("/rows/{row_id}")
    async def read(row_id: str, session: session_of_a_request) -> dict[str, Any]:
        row = (await session.scalars(select(JobRow).where(JobRow.id == row_id))).one()
        return {"id": row.id, "status": row.status, "spec": row.spec}

    return app


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def show(times: Times, rates: dict[int, float], queued: int) -> dict[str, Any]:
    table = Table(title=f"milliseconds of a request, Postgres, {queued} jobs queued against none")
    for column in (
        "",
        "p50",
        "p99",
        f"p50, {queued}",
        f"p99, {queued}",
        "growth p50",
        "growth p99",
    ):
        table.add_column(column, justify="right")
    record: dict[str, Any] = {"claims_per_second": rates}
    for kind in KINDS:
        none, many = times[kind, "none"], times[kind, "many"]
        found = [percentile(values, share) for values in (none, many) for share in (0.5, 0.99)]
        growth = [found[2] / found[0], found[3] / found[1]]
        record[kind] = {"none": found[:2], "many": found[2:], "growth": growth}
        table.add_row(kind, *(f"{value:.2f}" for value in (*found, *growth)))
    Console().print(table)
    for kind in ("POST", "GET", "POST, paced"):
        bare = record[f"bare {kind}"]
        ratios = {length: record[kind][length][0] / bare[length][0] for length in ("none", "many")}
        record[f"{kind} ÷ bare"] = ratios
        sys.stdout.write(
            f"{kind} ÷ bare handler, medians: {ratios['none']:.2f}; "
            f"with {queued} queued {ratios['many']:.2f}\n"
        )
    for claimers, rate in rates.items():
        sys.stdout.write(f"claims a second, {claimers} claimers, {queued} queued: {rate:.0f}\n")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=1000, help="of each kind and length")
    parser.add_argument("--projects", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer(Path(folder) / "pg") as postgres,
        RedisServer(Path(folder)) as redis,
    ):
        Path(folder).chmod(0o755)
        url = postgres.url().replace("postgresql:", "postgresql+psycopg:")
        upgrade(url)
        ports = [reserve_port() for _ in range(2)]
        environment = {
            "FLATLORA_DATABASE_URL": postgres.url(),
            "FLATLORA_DATA_DIR": f"{folder}/data",
            "FLATLORA_API_KEY": KEY,
            "FLATLORA_DATASET_ROOTS": str(EXAMPLES),
            "FLATLORA_MODEL_ROOTS": str(EXAMPLES),
            # Wake-ups are written and sent, as in a cluster; no worker hears them.
            "FLATLORA_BROKER_URL": redis.url(),
            "FLATLORA_LOG_LEVEL": "warning",
        }
        ours = Api("app.main:make_app", ports[0].getsockname()[1], environment)
        bare = Api("benchmarks.queue:make_bare", ports[1].getsockname()[1], environment)
        times: Times = {}
        try:
            for _ in range(ROUNDS):
                clear(url)
                fill(url, 1, 1)
                measure(ours, bare, "none", options.requests // ROUNDS, times)
                clear(url)
                fill(url, options.queued, options.projects)
                measure(ours, bare, "many", options.requests // ROUNDS, times)
            rates = {number: claims_per_second(url, number) for number in CLAIMERS}
        finally:
            ours.stop()
            bare.stop()
        record = show(times, rates, options.queued)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
