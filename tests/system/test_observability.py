"""What a whole service shows of one job: one trace, its numbers, and its lines in the log."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.migrate import upgrade
from tests.app.collector import Collector, collecting
from tests.faults.procs import reserve_port, spawn
from tests.faults.servers import RedisServer
from tests.system.service import EXAMPLES, ROOT, TERMINAL, Json, Service, until

STAGES = ("job.claim", "job.fetch", "job.train", "job.verify", "job.publish")
ANCHOR = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{ANCHOR}-b7ad6b7169203331-01"


def scrape(port: int) -> dict[str, float]:
    text = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=30).raise_for_status().text
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def check_trace(collector: Collector, job_id: str) -> None:
    """Everything that was done for the job is one trace, in order, below the request."""
    spans = collector.wait_for("POST /jobs", *STAGES)
    request = spans["POST /jobs"]
    assert {spans[name].trace_id for name in ("POST /jobs", *STAGES)} == {ANCHOR}
    assert request.service == "flatlora-api"
    begun = [spans[stage].begun_at for stage in STAGES]
    assert begun == sorted(begun)
    for stage in STAGES:
        assert spans[stage].service == "flatlora-worker"
        assert spans[stage].parent_id == request.span_id
        assert spans[stage].attributes["flatlora.job_id"] == job_id
        assert spans[stage].attributes["flatlora.attempt"] == 1
        assert spans[stage].status == "unset"


def check_numbers(worker: dict[str, float]) -> None:
    assert worker["flatlora_job_attempts_total[succeeded]"] == 1
    assert worker["flatlora_job_queue_seconds_count"] == 1
    assert worker["flatlora_job_run_seconds_count"] == 1
    assert worker["flatlora_job_run_seconds_sum"] > 0
    assert worker["flatlora_lease_expired_total"] == 0


def is_well(api: dict[str, float]) -> bool:
    """It tells less where its own questions are answered late."""
    return (
        api.get("flatlora_workers[active]") == 1
        and api.get("flatlora_broker_up") == 1
        and api.get("flatlora_outbox_lag_seconds", 5) < 5
    )


def check_lines(log: str, job_id: str, request_id: str) -> None:
    """One search for the request's id finds what was done for it, by whichever process."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    found = [line for line in lines if line.get("request_id") == request_id]
    events = [line["event"] for line in found]
    assert {"request", "job claimed", "attempt ended"} <= set(events)
    for line in found:
        if line["event"] in {"job claimed", "attempt ended"}:
            assert (line["job_id"], line["attempt"], line["fence"]) == (job_id, 1, 1)
    (request,) = [line for line in found if line["event"] == "request"]
    assert request["trace_id"] == ANCHOR


@pytest.mark.torture
class TestEmbedded:
    def test_one_job_from_the_request_to_the_published_adapter(
        self, tmp_path: Path, body: Json
    ) -> None:
        body["training"] |= {"max_steps": 6}
        service = Service(tmp_path)
        with collecting() as collector, reserve_port() as reserved:
            port = reserved.getsockname()[1]
            service.environment |= {
                "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
                "FLATLORA_METRICS_PORT": str(port),
            }
            service.start()
            try:
                headers = {"traceparent": CALLER, "X-Request-ID": "the-request"}
                with service.http as http:
                    answer = http.post("/jobs", json=body, headers=headers)
                    job_id = answer.raise_for_status().json()["id"]
                job = service.finish(job_id)
                # Counted when the row is written, a moment before or after we see it.
                until(lambda: scrape(port).get("flatlora_job_attempts_total[succeeded]"))
                worker, api = scrape(port), scrape(service.port)
            finally:
                service.stop()
            check_trace(collector, job_id)
        check_numbers(worker)
        assert worker["flatlora_tokens_total"] == job["result"]["train_tokens"]
        assert api["flatlora_http_request_seconds_count[POST][/jobs][202]"] == 1
        check_lines(service.log.read_text(), job_id, "the-request")


class Cluster:
    """An API and a worker with two slots, on a Postgres and a Redis."""

    def __init__(
        self, folder: Path, stack: ExitStack, database_url: str, redis: RedisServer, otlp: str
    ) -> None:
        self.folder = folder
        self._stack = stack
        self.port, self.worker_port = (
            stack.enter_context(reserve_port()).getsockname()[1] for _ in range(2)
        )
        self.environment = {
            **{name: value for name, value in os.environ.items() if "FLATLORA" not in name},
            "PYTHONPATH": str(ROOT),
            "FLATLORA_DATABASE_URL": database_url,
            "FLATLORA_BROKER_URL": redis.url(),
            "FLATLORA_STORE_URL": f"file://{folder / 'store'}",
            "FLATLORA_AUTH": "none",
            "FLATLORA_PORT": str(self.port),
            "FLATLORA_DATASET_ROOTS": str(EXAMPLES),
            "FLATLORA_MODEL_ROOTS": str(EXAMPLES),
            "FLATLORA_DEVICES": "cpu,cpu",
            "FLATLORA_TRAINER_MODULE": "tests.faults.tiny_trainer",
            "OTEL_EXPORTER_OTLP_ENDPOINT": otlp,
        }

    def spawn(self, module: str, **more: str) -> None:
        name = module.partition(".")[2]
        process = spawn(
            [sys.executable, "-m", module],
            log=self.folder / f"{name}.log",
            environment={
                **self.environment,
                "FLATLORA_DATA_DIR": str(self.folder / name),
                **more,
            },
            folder=self.folder,
        )

        def stop() -> None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

        self._stack.callback(stop)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    def get(self, path: str) -> Any:
        return httpx2.get(f"http://127.0.0.1:{self.port}{path}", timeout=30).json()


class TestCluster:
    @pytest.fixture
    def redis(self, tmp_path: Path) -> Iterator[RedisServer]:
        with RedisServer(tmp_path / "redis") as server:
            yield server

    def test_one_job_through_all_processes(
        self, tmp_path: Path, postgres_url: str, redis: RedisServer, body: Json
    ) -> None:
        upgrade(postgres_url)
        with collecting() as collector, ExitStack() as stack:
            cluster = Cluster(tmp_path, stack, postgres_url, redis, collector.url)
            cluster.spawn("app.serve")
            cluster.spawn("worker.main", FLATLORA_METRICS_PORT=str(cluster.worker_port))

            def is_ready() -> bool:
                try:
                    return bool(cluster.get("/readyz").get("broker") == "ok") and (
                        scrape(cluster.port).get("flatlora_slots[idle]") == 2
                    )
                except httpx2.TransportError:
                    return False

            until(is_ready, seconds=60)
            headers = {"traceparent": CALLER, "X-Request-ID": "the-request"}
            url = f"http://127.0.0.1:{cluster.port}/jobs"
            answer = httpx2.post(url, json=body, headers=headers, timeout=30)
            job_id = answer.raise_for_status().json()["id"]
            until(lambda: cluster.get(f"/jobs/{job_id}")["status"] in TERMINAL)
            job = cluster.get(f"/jobs/{job_id}")
            assert job["status"] == "succeeded", (job["failure"], cluster.log)
            check_trace(collector, job_id)
            # Counted and told when the row is written, a moment before or after we see it.
            until(lambda: scrape(cluster.worker_port).get("flatlora_job_attempts_total[succeeded]"))
            until(lambda: '"attempt ended"' in cluster.log)
            worker = scrape(cluster.worker_port)
            check_lines(cluster.log, job_id, "the-request")
            until(lambda: is_well(scrape(cluster.port)), seconds=30)
        check_numbers(worker)
