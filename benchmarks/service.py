"""What a user waits for: the API's start, a job's start on an idle worker, an adapter's download.

    python -m benchmarks.service [--jobs 40] [--gib 1] [--downloads 5] [--json PATH]

The download is of one file of an adapter from a local store, through the API, alone and as the tar
of all files, and from a plain static file server (Starlette's ``StaticFiles`` under the same
uvicorn), by the same client, in turns; it ends with 1 if the bytes differ. Once more it comes from
a bucket, through the API: there the static file server stands in for S3, of which a download needs
no more than GET with Range, so it competes for the processors that in earnest are the store's; what
tells is the processor time of the API. The job's start is the
time from its ``created_at`` to its ``started_at``, both by the database's clock: embedded, where
the dispatcher polls, and in a cluster, where Celery wakes the worker.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.ids import new_id
from app.jobs.schemas import JobCreate
from app.jobs.states import Status
from app.settings import Settings
from app.storage import open_store
from app.tables import JobRow
from benchmarks.queue import BODY, Api
from tests.faults.cluster import Cluster
from tests.faults.procs import reserve_port
from tests.system.service import Service

CHUNK = 1 << 20
STARTS = 5
FILE = "adapter_model.safetensors"


def starts_of_the_api() -> dict[str, list[float]]:
    """Seconds to the first answer of the API's process, and of ``flatlora api``, its parent.

    Migrations were done before. The parent looks at the database first, and restarts what dies.
    """
    commands = {"its process alone": ["app.serve"], "with its parent": ["app.cli.main", "api"]}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder))
        service.start()
        service.stop()
        environment = service.environment | {"FLATLORA_LOG_LEVEL": "error"}
        for name, command in [*commands.items()] * STARTS:
            started = time.perf_counter()
            api = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", *command],
                env=environment,
                stdin=subprocess.PIPE,  # its end would end the process
                stderr=subprocess.DEVNULL,
            )
            until_it_answers(f"http://127.0.0.1:{service.port}/healthz")
            taken[name].append(time.perf_counter() - started)
            api.terminate()
            api.wait()
    return taken


def until_it_answers(url: str) -> None:
    while True:
        try:
            if httpx2.get(url, timeout=1).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.01)


def waits(job: dict[str, Any]) -> float:
    created, started = job["created_at"], job["started_at"]
    return (datetime.fromisoformat(started) - datetime.fromisoformat(created)).total_seconds()


def embedded_starts(jobs: int) -> list[float]:
    """One job after another, each ended before the next is sent."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder))
        del service.environment["FLATLORA_POLL_SECONDS"]  # as a user has it
        service.start()
        try:
            return [
                waits(service.finish(service.submit({**BODY, "rank": 4, "dry_run": True})))
                for _ in range(jobs)
            ]
        finally:
            service.stop()


def cluster_starts(jobs: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with Cluster(Path(folder) / "c", workers=1, slots=1) as cluster:
            found = []
            for number in range(jobs):
                job_id = cluster.submit(steps=1, checkpoint_steps=1, step_ms=0, seed=number)
                cluster.settle(seconds=60)
                found.append(waits(cluster.job(job_id)))
            return found


def make_static() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    async def healthz(_request: Any) -> JSONResponse:
        return JSONResponse({})

    files = StaticFiles(directory=os.environ["STATIC_FOLDER"])
    bucket = StaticFiles(directory=os.environ["STATIC_BUCKET"])
    return Starlette(
        routes=[Route("/healthz", healthz), Mount("/files", files), Mount("/bucket", bucket)]
    )


def add_adapter(settings: Settings, file: Path) -> str:
    """A finished job whose adapter is one large file."""
    sha256 = open_store(settings).put_file(file)
    listed = [{"name": FILE, "size": file.stat().st_size, "sha256": sha256}]
    spec = JobCreate.model_validate(BODY).resolved()
    row = JobRow(
        id=new_id("job"), base_model=spec.base_model, dataset_uri=spec.dataset_uri,
        spec=spec.stored(), status=Status.SUCCEEDED, created_at=now(), updated_at=now(),
        finished_at=now(), adapter={"files": listed, "size": listed[0]["size"]},
    )  # fmt: skip
    engine = make_engine(settings.database).execution_options(writes=True)
    with Session(engine) as session, session.begin():
        session.add(row)
        session.flush()
        return row.id


@dataclass
class Downloads:
    """Of one kind: seconds of each, and what it took of its server's processor."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    hashes: set[str] = field(default_factory=set)

    def add(self, api: Api, path: str) -> None:
        cpu, started = api.cpu_seconds(), time.perf_counter()
        with api.http.stream("GET", path) as response:
            response.raise_for_status()
            body = b"".join(response.iter_raw(CHUNK))
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(api.cpu_seconds() - cpu)
        self.hashes.add(hashlib.sha256(body).hexdigest())

    def rates(self, size: int) -> dict[str, float]:
        """Medians."""
        cpu = statistics.median(self.cpu_seconds) * (1 << 30) / size
        return {"bytes_per_second": size / statistics.median(self.seconds), "cpu_per_gib": cpu}


def downloads(gib: float, times: int) -> dict[str, dict[str, float]]:
    """Bytes a second of each, and seconds of its server's processor for a GiB, by the median."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = round(gib * (1 << 30))
        with (folder / FILE).open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(CHUNK))
        service = Service(folder)
        service.start()
        service.stop()  # its database is there now
        settings = Settings(data_dir=service.data_dir, api_key=None)
        job_id = add_adapter(settings, folder / FILE)
        at, static_at, bucket_at = (reserve_port().getsockname()[1] for _ in range(3))
        environment = {
            "FLATLORA_DATA_DIR": str(service.data_dir),
            "FLATLORA_API_KEY": "flk_benchmark",
            "FLATLORA_LOG_LEVEL": "warning",
            "STATIC_FOLDER": name,
            "STATIC_BUCKET": str(settings.store_folder),
        }
        s3 = {
            "FLATLORA_STORE_URL": "s3://bucket",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{static_at}",
            "AWS_REGION": "here",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }
        ours = Api("app.main:make_app", at, environment)
        static = Api("benchmarks.service:make_static", static_at, environment)
        bucket = Api("app.main:make_app", bucket_at, environment | s3)
        adapter = f"/jobs/{job_id}/adapter"
        kinds = {
            "ours": (ours, f"{adapter}/{FILE}"),
            "ours, as a tar": (ours, adapter),
            "ours, from a bucket": (bucket, f"{adapter}/{FILE}"),
            "static": (static, f"/files/{FILE}"),
        }
        taken = {kind: Downloads() for kind in kinds}
        try:
            for kind, (api, path) in [*kinds.items()] * times:
                taken[kind].add(api, path)
        finally:
            for api in (ours, static, bucket):
                api.stop()
    if len(set().union(*(found.hashes for kind, found in taken.items() if "tar" not in kind))) > 1:
        raise SystemExit("the downloads differ")
    return {kind: found.rates(size) for kind, found in taken.items()}


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[18]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--downloads", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    api, rates = starts_of_the_api(), downloads(options.gib, options.downloads)
    starts = {
        "embedded": embedded_starts(options.jobs),
        "cluster": cluster_starts(options.jobs),
    }
    table = Table("", "", title="what a user waits for")
    for name, found in api.items():
        table.add_row(f"start of the API, {name}, median of 5", f"{statistics.median(found):.2f} s")
    for name, found in starts.items():
        half = statistics.median(found)
        table.add_row(f"start of a job, {name}: p50, p95", f"{half:.2f} s, {p95(found):.2f} s")
    for name, rate in rates.items():
        what = f"download of {options.gib:g} GiB, {name}; processor time for a GiB"
        per_second = rate["bytes_per_second"] / (1 << 20)
        table.add_row(what, f"{per_second:.0f} MiB/s; {rate['cpu_per_gib']:.2f} s")
    static = rates["static"]["bytes_per_second"]
    ratios = {
        name: rate["bytes_per_second"] / static for name, rate in rates.items() if name != "static"
    }
    for name, ratio in ratios.items():
        table.add_row(f"{name} ÷ static file server", f"{ratio:.2f}")
    Console().print(table)
    if options.json:
        record = {"api": api, "starts": starts, "downloads": rates, "ratios": ratios}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
