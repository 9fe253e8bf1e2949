"""Prometheus metrics of the service: GET /metrics. What each means: docs/observability.md.

Requests are counted as they pass. The rest is read from the database when somebody asks, so that
it is right whoever has changed it; a database that is away costs its numbers, not the answer. No
label names a job or a tenant, and no key is asked for.
"""

import asyncio
import platform
import shutil
from collections.abc import Iterator
from functools import partial
from typing import get_args

import structlog
from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from app import __version__
from app.broker_health import BrokerHealth, BrokerState
from app.census import Census, take_census
from app.db import Database
from app.probe import Probe
from app.settings import Settings
from app.webhooks.sending import Kind

log = structlog.get_logger()
router = APIRouter()
# Else a second series beside each of ours, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Long-polls and the starts of large downloads included.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WEBHOOK_OUTCOMES = get_args(Kind)
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Machine(Collector):
    """What API and worker tell alike: the program, and the disk below its data folder."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.data_dir

    def collect(self) -> Iterator[Metric]:
        labels = {"version": __version__, "python": platform.python_version()}
        yield InfoMetricFamily("flatlora_build", "What runs here.", value=labels)
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError as error:  # not there yet, or no longer
            log.warning("no free space known", exc_info=error)
            return
        yield gauge("flatlora_disk_free_bytes", "Free space below the data folder.", free)


class Metrics(Collector):
    """All that one app tells, in a registry of its own."""

    def __init__(self, settings: Settings, broker: BrokerHealth) -> None:
        self._settings = settings
        self._broker = broker
        self._broker_state: BrokerState | None = None
        self._database: Probe[Census | None] | None = None
        self._census: Census | None = None
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "flatlora_http_request_seconds",
            "Seconds from a request to the beginning of its answer.",
            ["method", "route", "status"],
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._webhooks = Counter(
            "flatlora_webhook_attempts_total",
            "Attempts to deliver a webhook, by what came of them.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in WEBHOOK_OUTCOMES:
            self._webhooks.labels(outcome)
        self.registry.register(Machine(settings))
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def request_answered(self, method: str, route: str, status: int, seconds: float) -> None:
        known = method if method in METHODS else "OTHER"
        self._requests.labels(known, route, str(status)).observe(seconds)

    def webhook_attempted(self, outcome: str) -> None:
        self._webhooks.labels(outcome).inc()

    def read_from(self, database: Database) -> None:
        self._database = Probe(partial(_read, database))

    async def refresh(self) -> None:
        """Look at the database and the broker, unless that has just been done."""
        assert self._database is not None
        self._census, self._broker_state = await asyncio.gather(
            self._database.answer(), self._broker.state()
        )

    def collect(self) -> Iterator[Metric]:
        yield gauge("flatlora_database_up", "1 if the database answers.", self._census is not None)
        if self._broker_state:
            is_up = self._broker_state == "ok"
            yield gauge("flatlora_broker_up", "1 if the broker answers.", is_up)
        if self._census:
            yield from _of_queue(self._census)
            yield from _of_webhooks(self._census)
            if self._settings.is_cluster:
                yield from _of_cluster(self._census)


async def _read(database: Database) -> Census | None:
    try:
        async with database.engine.connect() as connection:
            return await connection.run_sync(take_census)
    except (SQLAlchemyError, OSError) as error:
        log.warning("no numbers: the database does not answer", error=str(error).partition("\n")[0])
        return None


def _of_queue(census: Census) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("flatlora_jobs", "Jobs by their state.", labels=["state"])
    for status, number in census.jobs.items():
        jobs.add_metric([status], number)
    yield jobs
    yield gauge(
        "flatlora_oldest_queued_seconds",
        "How long the job has waited that could have started first; 0 if none waits.",
        census.oldest_queued_seconds,
    )


def _of_webhooks(census: Census) -> Iterator[Metric]:
    yield gauge(
        "flatlora_webhooks_pending",
        "Webhooks that have not arrived, and are not given up.",
        census.webhooks_pending,
    )
    yield gauge(
        "flatlora_webhook_oldest_pending_seconds",
        "How long ago the oldest of them was made; 0 if there is none.",
        census.webhook_oldest_seconds,
    )
    yield gauge(
        "flatlora_webhook_lag_seconds",
        "For how long the oldest attempt has been due; 0 if none is.",
        census.webhook_lag_seconds,
    )


def _of_cluster(census: Census) -> Iterator[Metric]:
    yield gauge(
        "flatlora_outbox_lag_seconds",
        "For how long the oldest unsent wake-up has been due; 0 if none is.",
        census.outbox_lag_seconds,
    )
    workers = GaugeMetricFamily(
        "flatlora_workers", "Workers by their state; silent: no heartbeat.", labels=["state"]
    )
    for state in ("active", "draining", "silent"):
        workers.add_metric([state], census.count(state))
    yield workers
    ages = GaugeMetricFamily(
        "flatlora_worker_heartbeat_age_seconds",
        "How long ago a worker was last heard.",
        labels=["worker"],
    )
    for name, worker in census.workers.items():
        ages.add_metric([name], worker.age_seconds)
    yield ages
    slots = GaugeMetricFamily(
        "flatlora_slots", "Slots of the workers that are heard.", labels=["state"]
    )
    busy = min(census.held, census.slots)
    slots.add_metric(["busy"], busy)
    slots.add_metric(["idle"], census.slots - busy)
    yield slots


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    told: Metrics = request.state.metrics
    await told.refresh()
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    # In a thread: it looks at the disk.
    text = await asyncio.to_thread(encode, told.registry)
    return Response(text, headers={"Content-Type": content_type})
