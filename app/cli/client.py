"""The service, as commands talk to it: what goes wrong there ends the command."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NoReturn

from app.cli.output import FAILED, UNREACHABLE, USAGE, fail, fail_with_problem
from app.cli.profile import Profile
from app.settings import get_settings
from flatlora_client import (
    APIError,
    ConfigurationError,
    ConnectionFailed,
    FlatLora,
    HashMismatch,
    UnexpectedAnswer,
)

Json = dict[str, Any]

# Somebody waits before a terminal: they are told soon. Commands that follow a job have patience.
MAX_RETRIES = 2
RETRY_SECONDS = 10


@contextmanager
def connected(*, as_json: bool = False, profile: Profile | None = None) -> Iterator[FlatLora]:
    """The service that the environment, or the data folder here, names."""
    profile = profile or Profile.load(get_settings())
    with explained(as_json=as_json), connect(profile) as client:
        yield client


def connect(profile: Profile) -> FlatLora:
    try:
        return FlatLora(
            profile.url,
            profile.key,
            data_dir=get_settings().data_dir,
            max_retries=MAX_RETRIES,
            retry_seconds=RETRY_SECONDS,
        )
    except ConfigurationError as error:
        fail(f"FLATLORA_URL: {error}", code=USAGE)


@contextmanager
def explained(*, as_json: bool) -> Iterator[None]:
    """A refusal is told with all that its problem says; no answer with how to get one."""
    try:
        yield
    except APIError as error:
        if error.problem:
            fail_with_problem(error.problem, as_json=as_json)
        _give_up(f"{status_line(error)} without JSON, which is no answer of flatlora", as_json)
    except (ConnectionFailed, UnexpectedAnswer) as error:
        _give_up(str(error), as_json)
    except HashMismatch as error:
        problem = {"code": "hash_mismatch", "detail": str(error)}
        fail_with_problem(problem, as_json=as_json, code=FAILED)


def _give_up(trouble: str, as_json: bool) -> NoReturn:
    problem = {
        "code": "unreachable",
        "detail": trouble,
        "hint": "Start the service with `flatlora up`, or set FLATLORA_URL.",
    }
    fail_with_problem(problem, as_json=as_json, code=UNREACHABLE)


def status_line(error: APIError) -> str:
    try:
        return f"HTTP {error.status} {HTTPStatus(error.status).phrase}"
    except ValueError:
        return f"HTTP {error.status}"
