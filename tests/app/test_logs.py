"""No secret leaves through a log, whoever logs it; and lines say which attempt they belong to."""

import contextvars
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from app.logs import blot, configure_logs, job_context
from app.settings import Settings

CANARY = "c4n4ry"  # a part of every secret below
SECRETS = {
    "our key": "flk_" + CANARY * 6,
    "hub token": "hf_" + CANARY * 4,
    "webhook secret": "whsec_" + CANARY * 4 + "+/=",
    "AWS key id": "AKIA" + "C4N4RY" * 2 + "ABCD",
    "AWS secret key": "wJalr" + CANARY + "/K7MDENG/bPxRfiCYEXAMPLEKEY12"[:29],
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJ" + CANARY + ".sig-" + CANARY,
    "bearer": "Bearer " + CANARY * 3,
    "basic": "Authorization: Basic " + CANARY * 3,
    "URL": f"postgresql://me:{CANARY}@host/db",
    "URL with a slash": f"redis://:{CANARY}/{CANARY}@host:6379/0",
    "conninfo": f"host=h user=u password={CANARY} dbname=d",
    "quoted": f"password='{CANARY} {CANARY}' host=h",
    "JSON": json.dumps({"token": f"{CANARY} {CANARY}", "n": 1}),
    "JSON in JSON": json.dumps(json.dumps({"hf_token": CANARY})),
    "presigned URL": f"https://b.example/k?X-Amz-Signature={CANARY}&X-Amz-Security-Token={CANARY}",
    "private key": f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----",
    "of the settings": f"key {CANARY} of nobody's shape",
}


class Holder:
    """Something with a secret in its repr."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def __repr__(self) -> str:
        return f"Holder({self._secret})"


def raise_it(secret: str) -> None:
    try:
        raise KeyError(secret)
    except KeyError as error:
        raise RuntimeError(f"while using {secret}") from error


def by_exception(secret: str) -> None:
    try:
        raise_it(secret)
    except RuntimeError:
        structlog.get_logger().exception("failed")


def by_library_exception(secret: str) -> None:
    try:
        raise_it(secret)
    except RuntimeError:
        logging.getLogger("kombu.connection").exception("failed")


def by_thread(secret: str) -> None:
    thread = threading.Thread(
        target=contextvars.copy_context().run,
        args=(structlog.get_logger().error, f"in a thread {secret}"),
    )
    thread.start()
    thread.join()


def by_context(secret: str) -> None:
    with structlog.contextvars.bound_contextvars(about=secret):
        structlog.get_logger().info("bound")


PATHS: dict[str, Callable[[str], Any]] = {
    "event": lambda secret: structlog.get_logger().info(f"found {secret}"),
    "value": lambda secret: structlog.get_logger().info("found", url=secret),
    "key": lambda secret: structlog.get_logger().info("found", headers={secret: 1}),
    "nested": lambda secret: structlog.get_logger().info(
        "found", deep={"a": [(secret,), {secret}]}
    ),
    "bytes": lambda secret: structlog.get_logger().info("found", body=secret.encode()),
    "object": lambda secret: structlog.get_logger().info("found", holder=Holder(secret)),
    "error as value": lambda secret: structlog.get_logger().info("found", error=ValueError(secret)),
    "exception": by_exception,
    "thread": by_thread,
    "context": by_context,
    "celery": lambda secret: logging.getLogger("celery.worker").warning("lost %s", secret),
    "sqlalchemy": lambda secret: logging.getLogger("sqlalchemy.pool").error(f"no {secret}"),
    "uvicorn": lambda secret: logging.getLogger("uvicorn.error").critical("%r", Holder(secret)),
    "library's exception": by_library_exception,
}


def settings(**values: Any) -> Settings:
    return Settings.model_validate({"api_key": CANARY, **values})


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("app.logs._known", set())
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


class TestSecrets:
    @pytest.mark.parametrize("log_format", ["json", "console"])
    @pytest.mark.parametrize("path", PATHS)
    def test_none_comes_out_of_any_path(
        self, path: str, log_format: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for secret in SECRETS.values():
            configure_logs(settings(log_format=log_format))
            PATHS[path](secret)
            written = capsys.readouterr().err
            assert written.count("\n") >= 1
            assert CANARY not in written.lower()
            assert "[secret]" in written

    @pytest.mark.parametrize("name", SECRETS)
    def test_each_is_known_by_its_shape(self, name: str) -> None:
        if name == "of the settings":
            assert CANARY in blot(SECRETS[name])
        else:
            assert CANARY not in blot(SECRETS[name]).lower()

    @pytest.mark.parametrize("name", [
        "password", "token", "HF_TOKEN", "api_key", "apiKey", "Authorization", "X-Api-Key",
        "secret", "AWS_SECRET_ACCESS_KEY", "client.secret", "Set-Cookie",
    ])  # fmt: skip
    def test_a_value_whose_name_says_so_is_none_of_anybodys_business(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        configure_logs(settings(log_format="json"))
        structlog.get_logger().info("found", **{name: "hunter2"}, deep={name: ["hunter2"]})
        line = json.loads(capsys.readouterr().err)
        assert (line[name], line["deep"][name]) == ("[secret]", "[secret]")

    def test_those_of_the_settings_and_the_environment_are_known_by_themselves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "without-any-shape")
        configure_logs(settings(database_url="postgresql://me:p%40ssw0rd@host/0"))
        for secret in ("p%40ssw0rd", "p@ssw0rd", "without-any-shape", CANARY):
            assert blot(f"a {secret} b") == "a [secret] b"

    @pytest.mark.parametrize("text", [
        "hf_hub flk_ sk-", "train_tokens=500 tokens: 5", "http://127.0.0.1:8321/jobs/job_019aa",
        "0123456789abcdef" * 2 + "01234567", 'File "/usr/lib/python3.11/site-packages/a/B.py"',
        "org/Model-7B at 1234567890abcdef1234567890abcdef12345678", "a@b.example", "max_tokens=4",
    ])  # fmt: skip
    def test_ordinary_text_stays(self, text: str) -> None:
        assert blot(text) == text

    @pytest.mark.parametrize("piece", ["a-", "A1b/", "://a:", "token:", "'", "x", "-----BEGIN "])
    def test_no_text_takes_long(self, piece: str) -> None:
        text = piece * (200_000 // len(piece))
        started = time.process_time()
        blot(text)
        assert time.process_time() - started < 5

    def test_nothing_gets_around_it_uncaught(self) -> None:
        code = (
            "import threading; from app.logs import configure_logs; configure_logs()\n"
            f"def die(): raise RuntimeError('{SECRETS['URL']}')\n"
            "thread = threading.Thread(target=die, name='T'); thread.start(); thread.join()\n"
            "die()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert CANARY not in done.stderr
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert [line["event"] for line in lines] == ["uncaught error", "uncaught error"]
        assert lines[0]["thread"] == "T"
        assert all("RuntimeError: postgresql://[secret]host" in line["exception"] for line in lines)


class TestAttempt:
    def test_every_line_says_which_it_belongs_to(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logs(settings(log_format="json"))
        with job_context(job_id="job_1", attempt=2, fence=7, request_id="r"):
            structlog.get_logger().info("ours")
            logging.getLogger("celery").warning("theirs")
        structlog.get_logger().info("after")
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        ids = {"job_id": "job_1", "attempt": 2, "fence": 7, "request_id": "r"}
        for line in lines[:2]:
            assert ids.items() <= line.items()
        assert not ids.keys() & lines[2].keys()

    def test_a_job_that_no_request_has_made_has_no_request_id(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        configure_logs(settings(log_format="json"))
        with job_context(job_id="job_1", attempt=1, fence=1):
            structlog.get_logger().info("ours")
        assert "request_id" not in json.loads(capsys.readouterr().err)


class TestLevel:
    @pytest.mark.parametrize(
        ("level", "ours", "theirs"),
        [
            ("debug", "debug info warning error", "info warning error"),
            ("info", "info warning error", "warning error"),
            ("warning", "warning error", "warning error"),
            ("error", "error", "error"),
        ],
    )
    def test_it_is_that_of_the_settings(
        self, level: str, ours: str, theirs: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        configure_logs(settings(log_level=level, log_format="json"))
        for name in ("debug", "info", "warning", "error"):
            getattr(structlog.get_logger(), name)(f"our {name}")
            getattr(logging.getLogger("celery"), name)(f"their {name}")
        events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
        found = {
            whose: " ".join(event.split()[1] for event in events if event.startswith(whose))
            for whose in ("our", "their")
        }
        assert found == {"our": ours, "their": theirs}

    def test_a_console_is_for_people(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure_logs(settings(log_format="console"))
        by_exception("plain")
        written = capsys.readouterr().err
        assert re.search(r"^\S+ \[error +\] failed", written, re.MULTILINE)
        assert "RuntimeError: while using plain" in written
