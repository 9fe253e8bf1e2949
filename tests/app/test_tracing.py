"""One trace from the request to whatever is done for it, and nothing where nobody collects it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import text

from app.tracing import inject, trace_id
from tests.app.collector import Collector, collecting
from tests.app.conftest import make_settings
from tests.app.service import Service, running

TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-0[13]")  # sampled; of a random id
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "50"}  # milliseconds until a batch is sent

# What a worker does, in a process of its own: <parent>
WORKER = """
import sys, time
from app.logs import configure_logs
from app.tracing import configure_tracing, flush, span
configure_logs()
assert configure_tracing("flatlora-worker")
parent = sys.argv[1]
begun = time.time_ns() - 5_000_000_000
with span("job.claim", parent, started_at=begun, job_id="job_1", attempt=2, none=None):
    pass
try:
    with span("job.train", parent, job_id="job_1", attempt=2):
        raise ValueError("the secret of c4n4ry")
except ValueError:
    pass
with span("job.publish", None, job_id="job_1", attempt=2):
    pass
flush()
"""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        for name, value in QUICK.items():
            monkeypatch.setenv(name, value)
        yield collector


@pytest.fixture
def live(tmp_path: Path, migrated_sqlite_url: str, collector: Collector) -> Iterator[Service]:
    """Started after the collector, so that its environment names it."""
    settings = make_settings(tmp_path, migrated_sqlite_url)
    with running(settings) as url, httpx2.Client(base_url=url, timeout=30) as http:
        service = Service(http, settings)
        yield service
        service.engine.dispose()


def python(code: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def row(service: Service, job_id: str) -> Any:
    with service.engine.connect() as connection:
        query = text("SELECT request_id, traceparent FROM jobs WHERE id = :id")
        return connection.execute(query, {"id": job_id}).one()


class TestRequest:
    def test_the_job_keeps_its_trace_and_its_request(
        self, live: Service, collector: Collector
    ) -> None:
        response = live.post(live.body, X_Request_ID="mine")
        kept = row(live, response.json()["id"])
        span = collector.wait_for("POST /jobs")["POST /jobs"]
        found = TRACEPARENT.fullmatch(kept.traceparent)
        assert found
        assert found.groups() == (span.trace_id, span.span_id)
        assert kept.request_id == "mine"
        assert span.service == "flatlora-api"
        assert span.attributes["http.route"] == "/jobs"
        assert span.attributes["http.response.status_code"] == 202

    def test_it_joins_the_trace_of_the_caller(self, live: Service, collector: Collector) -> None:
        response = live.post(live.body, traceparent=CALLER)
        span = collector.wait_for("POST /jobs")["POST /jobs"]
        assert f"00-{span.trace_id}-{span.parent_id}-01" == CALLER
        assert span.trace_id in row(live, response.json()["id"]).traceparent

    def test_probes_make_none(self, live: Service, collector: Collector) -> None:
        for path in ("/healthz", "/readyz", "/metrics", "/version"):
            live.http.get(path)
        collector.wait_for("GET /version")
        assert {span.name for span in collector.spans} == {"GET /version"}

    def test_what_was_not_sent_yet_is_sent_when_the_service_stops(
        self, tmp_path: Path, migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with collecting() as collector:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
            with running(make_settings(tmp_path, migrated_sqlite_url)) as url:
                assert httpx2.get(f"{url}/version", timeout=30).is_success
            assert [span.name for span in collector.spans] == ["GET /version"]

    def test_its_log_lines_name_the_trace(
        self,
        tmp_path: Path,
        migrated_sqlite_url: str,
        collector: Collector,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        with running(make_settings(tmp_path, migrated_sqlite_url)) as url:
            assert httpx2.get(f"{url}/version", timeout=30).is_success
        span = collector.wait_for("GET /version")["GET /version"]
        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        (line,) = [line for line in lines if line.get("path") == "/version"]
        assert line["trace_id"] == span.trace_id


class TestWorker:
    def test_its_spans_join_the_trace_of_the_request(self, collector: Collector) -> None:
        python(WORKER, CALLER)
        spans = collector.wait_for("job.claim", "job.train", "job.publish")
        claim, train = spans["job.claim"], spans["job.train"]
        _, trace, parent, _ = CALLER.split("-")
        for span in (claim, train):
            assert (span.trace_id, span.parent_id) == (trace, parent)
            assert span.service == "flatlora-worker"
            assert span.attributes["flatlora.job_id"] == "job_1"
            assert span.attributes["flatlora.attempt"] == 2
        assert "flatlora.none" not in claim.attributes
        assert claim.ended_at - claim.begun_at >= 5e9
        assert spans["job.publish"].trace_id != trace, "without a parent it is a trace of its own"

    def test_an_error_is_named_by_its_type_alone(self, collector: Collector) -> None:
        python(WORKER, CALLER)
        train = collector.wait_for("job.train")["job.train"]
        assert (train.status, train.attributes["error.type"]) == ("error", "ValueError")
        assert train.events == []
        assert b"c4n4ry" not in collector.raw

    def test_the_standard_variables_hold(self, collector: Collector) -> None:
        python(WORKER, CALLER, OTEL_SERVICE_NAME="trainers-of-team-x")
        assert collector.wait_for("job.claim")["job.claim"].service == "trainers-of-team-x"

    def test_a_forked_child_sends_its_own(self, collector: Collector) -> None:
        code = """
import os
from app.tracing import configure_tracing, flush, span
configure_tracing("flatlora-worker")
if os.fork() == 0:
    with span("in the child", None):
        pass
    flush()
    os._exit(0)
os.wait()
"""
        python(code)
        collector.wait_for("in the child")

    def test_a_collector_that_is_away_holds_nobody_up(self) -> None:
        code = """
import time
from app.tracing import configure_tracing, flush, span
assert configure_tracing("flatlora-worker")
started = time.monotonic()
with span("job.train", None):
    pass
flush()
print(time.monotonic() - started)
import os; os._exit(0)
"""
        done = python(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
        assert float(done.stdout) < 4


class TestNobodyCollects:
    def test_nothing_is_made_or_imported(self) -> None:
        code = """
import sys
from app.tracing import configure_tracing, flush, inject, span
assert not configure_tracing("flatlora-api")
with span("job.train", None):
    assert inject() is None
flush()
print("opentelemetry.sdk.trace" in sys.modules)
"""
        assert python(code).stdout == "False\n"

    def test_a_job_keeps_no_trace(self, service: Service) -> None:
        kept = row(service, service.submit()["id"])
        assert kept.traceparent is None
        assert kept.request_id
        assert inject() is None
        assert trace_id() is None

    @pytest.mark.parametrize("variables", [
        {"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "console"},
    ])  # fmt: skip
    def test_the_standard_variables_switch_it_off(self, variables: dict[str, str]) -> None:
        code = "from app.tracing import configure_tracing; print(configure_tracing('x'))"
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
        assert python(code, **endpoint, **variables).stdout == "False\n"

    @pytest.mark.parametrize(
        ("code", "variables", "said"),
        [
            ("import sys; sys.modules['opentelemetry.sdk'] = None", {}, "service[telemetry]"),
            ("", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf"),
        ],
    )
    def test_what_is_asked_for_and_cannot_be_is_told_once(
        self, code: str, variables: dict[str, str], said: str
    ) -> None:
        code += """
from app.logs import configure_logs
from app.tracing import configure_tracing, span
configure_logs()
for _ in range(2):
    print(configure_tracing("flatlora-api"))
with span("job.train", None):
    pass
"""
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
        done = python(code, **endpoint, **variables)
        assert done.stdout == "False\nFalse\n"
        (line,) = done.stderr.splitlines()
        assert json.loads(line)["level"] == "warning"
        assert said in line


def test_tracing_costs_a_request_next_to_nothing(service: Service) -> None:
    """Without a collector a span is a context that does nothing."""
    from app.tracing import span

    started = time.perf_counter()
    for _ in range(1000):
        with span("job.train", CALLER, job_id="job_1"):
            pass
    assert time.perf_counter() - started < 1
