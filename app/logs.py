"""Logs: JSON for machines, colours on a terminal, and one place where secrets are blotted out.

Whatever leaves through a log passes ``blot``: our own lines, those of libraries that log in the
standard way (celery, kombu, sqlalchemy, uvicorn), and errors that nobody caught.
"""

import logging
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import structlog

from app.settings import Settings, get_settings

BLOT = "[secret]"
NAMES = (
    r"password|passwd|pwd|passphrase|secret|token|authorization|credentials?|cookie|signature|sig"
    r"|(?:api|access|account|private|secret|encryption)[_-]?key(?:[_-]id)?"
)
SECRET_NAME = re.compile(rf"(?:.*[_.\s-])?(?:{NAMES})", re.IGNORECASE)
"""Keys whose value is blotted out, whatever it is. ``train_tokens`` is none of them."""

END = r"\s\"'\\,;&<>(){}\[\]"  # what ends a value in a text
ASSIGNED = re.compile(
    rf"""(?ix)
    (\b (?:[\w-]{{0,40}}[_-])? (?:{NAMES}) (?:\\*["'])? \s* [:=] \s*)
    (?: \\*"[^"\\]*(?:\\*")? | \\*'[^'\\]*(?:\\*')?
    | (?:(?:basic|bearer|aws4-hmac-sha256)\s+)? [^{END}]+ )
    """
)
"""``password=…``, ``"token": "…"`` and their like inside a text."""

KEY = "[A-Za-z0-9/+]"  # signs of an AWS secret key
SECRET = re.compile(
    rf"""(?x)
    -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----(?s:.*?)(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    | \b(?:flk_|hf_|sk-|whsec_|github_pat_|gh[oprsu]_)[A-Za-z0-9+/=_-]{{8,}}
    | \beyJ[A-Za-z0-9_-]{{8,}}\.[A-Za-z0-9_-]{{4,}}\.[A-Za-z0-9_-]*  # JWT
    | \b(?:AKIA|ASIA)[A-Z0-9]{{16}}\b
    # An AWS secret key has no mark of its own: 40 signs of all kinds, so no hash and no path.
    | (?<![\w/+=.-]) (?={KEY}*[0-9]) (?={KEY}*[a-z]) (?={KEY}*[A-Z]) (?!/){KEY}{{40}} (?![\w/+=.-])
    | \b(?i:bearer)\s+[^{END}]+
    # What stands before the @ of a URL, also with a / in it that should have been quoted.
    | (?<=://) (?: [^\s/@"'\\<>]{{0,300}} | [^\s/@:"'\\<>]{{0,60}}:[^\s@"'\\<>]{{0,300}} ) @
    """
)

WORTH_HIDING = 6  # signs: a shorter secret would take ordinary words with it
FROM_ENVIRONMENT = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_TOKEN", "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_FABRIC_SESSION_TOKEN",
    "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY", "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_TOKEN", "IDENTITY_HEADER", "GOOGLE_BEARER_TOKEN", "GOOGLE_SERVICE_ACCOUNT_KEY",
    "HF_TOKEN", "FLATLORA_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS",
)  # fmt: skip

_known: set[str] = set()


def hide(*secrets: str | None) -> None:
    """From now on these very texts are blotted out too, whatever they look like."""
    _known.update(secret for secret in secrets if secret and len(secret) >= WORTH_HIDING)


def blot(text: str) -> str:
    """A text without its secrets."""
    for secret in sorted(_known, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, BLOT)
    return ASSIGNED.sub(rf"\1{BLOT}", SECRET.sub(BLOT, text))


def blot_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """The processor that no line gets around."""
    return {
        # Of structlog's own, and gone before the line is written.
        name: value if name.startswith("_") else _blot(value, name)
        for name, value in event.items()
    }


def _blot(value: Any, name: str = "") -> Any:
    if value is None or isinstance(value, bool):
        return value
    if SECRET_NAME.fullmatch(name):
        return BLOT
    match value:
        case str():
            return blot(value)
        case int() | float():
            return value
        case bytes():
            return blot(value.decode(errors="backslashreplace"))
        case Mapping():
            return {blot(str(key)): _blot(part, str(key)) for key, part in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_blot(part) for part in value]
    return blot(repr(value))


@contextmanager
def job_context(
    *, job_id: str, attempt: int, fence: int, request_id: str | None = None
) -> Iterator[None]:
    """Every line that is logged inside says which attempt it belongs to.

    A thread that is started inside has a context of its own: run it in
    ``contextvars.copy_context()``.
    """
    ids = {"job_id": job_id, "attempt": attempt, "fence": fence, "request_id": request_id}
    given = {name: value for name, value in ids.items() if value is not None}
    with structlog.contextvars.bound_contextvars(**given):
        yield


def configure_logs(settings: Settings | None = None) -> None:
    """Called once by each process. Libraries that log in the standard way come out alike."""
    settings = settings or get_settings()
    hide(*_secrets_of(settings))
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,  # to text first: a traceback may hold a secret too
        structlog.processors.StackInfoRenderer(),
        blot_secrets,
    ]
    renderer = _renderer(settings.log_format)
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
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
    # Libraries talk a lot: what they say below a warning is for those who look for a fault.
    theirs = logging.INFO if level == logging.DEBUG else max(level, logging.WARNING)
    logging.basicConfig(level=theirs, handlers=[handler], force=True)
    _log_what_nobody_caught()


def _renderer(log_format: str) -> Any:
    if log_format == "console" or (log_format == "auto" and sys.stderr.isatty()):
        return structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    return structlog.processors.JSONRenderer(ensure_ascii=False)


def _secrets_of(settings: Settings) -> Iterable[str | None]:
    for secret in (settings.api_key, settings.secret_key):
        if secret:
            yield secret.get_secret_value()
    for url in (settings.database_url, settings.broker_url, settings.store_url):
        with_password = _password(url)
        yield with_password
        yield unquote(with_password) if with_password else None
    yield from map(os.environ.get, FROM_ENVIRONMENT)


def _password(url: str) -> str | None:
    try:
        return urlsplit(url).password
    except ValueError:  # no URL: who uses it says so
        return None


def _log_what_nobody_caught() -> None:
    """Python prints such an error as it is; hooks that somebody else has set stay."""
    log = structlog.get_logger()

    def of_process(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, traceback)
        else:
            log.critical("uncaught error", exc_info=(kind, error, traceback))

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not SystemExit:
            name = arguments.thread.name if arguments.thread else None
            log.error("uncaught error", thread=name, exc_info=arguments.exc_value)

    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = of_process
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = of_thread
