"""Logs: JSON for machines, colours on a terminal, and one place where secrets are blotted out."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

SECRET = re.compile(r"(flk_|hf_)[A-Za-z0-9_]+|(?i:bearer)\s+\S+")


def blot_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    return {
        name: SECRET.sub("[secret]", value) if isinstance(value, str) else value
        for name, value in event.items()
    }


def configure_logs() -> None:
    """Called once by each process."""
    is_terminal = sys.stderr.isatty()
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer()]
        if is_terminal
        else [
            structlog.processors.format_exc_info,
            blot_secrets,
            structlog.processors.JSONRenderer(),
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            blot_secrets,
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s"
    )
