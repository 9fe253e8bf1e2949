"""Logs: JSON for machines, colours on a terminal, and one place where secrets are blotted out."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

SECRET = re.compile(r"\b(?:flk_|hf_|sk-)[A-Za-z0-9_-]{8,}|(?i:\bbearer)\s+\S+|(?<=://)[^/\s@]+@")
"""Keys, tokens, and what stands before the @ of a URL."""


def blot_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    return {name: _blot(value) for name, value in event.items()}


def _blot(value: Any) -> Any:
    match value:
        case str():
            return SECRET.sub("[secret]", value)
        case dict():
            return {name: _blot(part) for name, part in value.items()}
        case list() | tuple():
            return [_blot(part) for part in value]
    return value


def configure_logs() -> None:
    """Called once by each process. Libraries that log in the standard way come out alike."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # to text first: a traceback may hold a secret too
        blot_secrets,
    ]
    renderer: Any = structlog.processors.JSONRenderer(ensure_ascii=False)
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
