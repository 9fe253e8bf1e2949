"""Traces from the request to the published adapter (OpenTelemetry), where somebody collects them.

Nothing happens unless OTEL_EXPORTER_OTLP_ENDPOINT is set; OpenTelemetry's other standard variables
hold too. The request's trace context is kept in the job's row, and the worker's spans join it.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import structlog
from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app import __version__

log = structlog.get_logger()

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
HTTP = "http/protobuf"
FLUSH_SECONDS = 2
PROBES = {"/healthz", "/readyz", "/metrics"}

w3c = TraceContextTextMapPropagator()


def is_wanted() -> bool:
    """Whether the environment names a collector for traces."""
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    is_elsewhere = _first("OTEL_TRACES_EXPORTER") not in {None, "otlp"}
    return not is_off and not is_elsewhere and _first(*ENDPOINTS) is not None


@cache
def configure_tracing(service: str) -> bool:
    """Export what ``span`` makes, once for each process; a forked one goes on by itself.

    Returns:
        Whether spans are exported.
    """
    if not is_wanted():
        return False
    protocol = _first(*PROTOCOLS) or HTTP
    if protocol != HTTP:
        log.warning("no traces: this protocol is not spoken", found=protocol, expected=HTTP)
        return False
    try:
        _export(service)
    except ImportError:
        log.warning(
            "no traces: OTEL_EXPORTER_OTLP_ENDPOINT is set, but the OpenTelemetry SDK is missing",
            hint="Install flatlora-service[telemetry].",
        )
        return False
    return True


def _export(service: str) -> None:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = _first("OTEL_SERVICE_NAME") or service
    resource = Resource.create({"service.name": name, "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def flush() -> None:
    """Send what has gathered, as this process may be gone soon."""
    force = getattr(trace.get_tracer_provider(), "force_flush", None)
    if force:
        # In a thread that may be left behind: the SDK waits for a collector that is away.
        sending = threading.Thread(target=force, name="flush traces", daemon=True)
        sending.start()
        sending.join(FLUSH_SECONDS)


def inject() -> str | None:
    """The W3C ``traceparent`` of the current span; none where nothing is traced."""
    carrier: dict[str, str] = {}
    w3c.inject(carrier)
    return carrier.get("traceparent")


def trace_id() -> str | None:
    """For log lines."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None


@contextmanager
def span(
    name: str, parent: str | None, *, started_at: int | None = None, **attributes: Any
) -> Iterator[None]:
    """A span of the trace that ``parent``, a ``traceparent``, belongs to; of a new one for none.

    ``job_id=…`` becomes the attribute ``flatlora.job_id``. An error that passes is named by its
    type alone: its text may hold anything.

    Args:
        name: Such as ``job.train``.
        parent: As ``inject`` gave it.
        started_at: Nanoseconds of ``time.time_ns``, for what has begun before.
        **attributes: What it is about; without those that are None.
    """
    context = w3c.extract({"traceparent": parent}) if parent else None
    named = {f"flatlora.{key}": value for key, value in attributes.items() if value is not None}
    tracer = trace.get_tracer("flatlora", __version__)
    with tracer.start_as_current_span(
        name,
        context=context,
        kind=SpanKind.CONSUMER if name == "job.claim" else SpanKind.INTERNAL,
        attributes=named,
        start_time=started_at,
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield
        except BaseException as error:
            current.set_attribute("error.type", type(error).__name__)
            current.set_status(StatusCode.ERROR)
            raise


def telemetry() -> TelemetryConfig:
    """What FastAPI's own instrumentation does: a span for each request that is no probe."""
    return {
        "tracing": True,
        "metrics": False,  # app/metrics.py
        "logs": False,  # app/logs.py
        "operation_spans": False,
        "auto_configure": False,  # ``configure_tracing``, so that both sides do the same
        "exclude": lambda scope: scope.get("path") in PROBES,
    }


def _first(*names: str) -> str | None:
    """The first of these variables that says something."""
    return next((value for name in names if (value := os.environ.get(name, "").strip())), None)
