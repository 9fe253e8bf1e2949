"""``flatlora up``: a small parent that starts the API and the dispatcher, and stops both."""

import fcntl
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from sqlalchemy.exc import SQLAlchemyError

from app.access.shared_key import ensure_key
from app.cli.output import FAILED, OK, USAGE, err, fail
from app.flag import SharedFlag
from app.migrate import upgrade
from app.settings import Settings
from app.storage import make_private

API = ("api", "app.serve")
DISPATCHER = ("dispatcher", "worker.dispatcher")

ALREADY_RUNNING = 2  # exit code of a dispatcher that finds its data folder taken
TURN_SECONDS = 0.2
STEADY_SECONDS = 30  # a child that has lived so long starts its back-off anew
MAX_BACKOFF_SECONDS = 30
API_STOP_SECONDS = 15


@dataclass
class Child:
    """One process of the service, started again when it dies."""

    name: str
    module: str
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0
    backoff: float = 0.5
    start_at: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(  # noqa: S603 - our own module
            # -P: a folder called `app` where the service is started must not shadow ours.
            [sys.executable, "-P", "-m", self.module],
            stdin=subprocess.PIPE,  # never written to: its end tells the child to leave
            start_new_session=True,  # Ctrl-C reaches the parent alone, which stops both in order
        )

    def tend(self) -> int | None:
        """Start it if it is due. Its exit code, if it has just died."""
        if self.process is None:
            if time.monotonic() >= self.start_at:
                self.start()
            return None
        code = self.process.poll()
        if code is None:
            return None
        if time.monotonic() - self.started_at > STEADY_SECONDS:
            self.backoff = 0.5
        self.start_at = time.monotonic() + self.backoff
        self.backoff = min(2 * self.backoff, MAX_BACKOFF_SECONDS)
        self.process = None
        return code

    def stop(self, seconds: float) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()

    def kill(self) -> None:
        """Does not wait: a handler that interrupts a wait would do so for ever (its lock)."""
        if self.process:
            self.process.kill()


def run_up(settings: Settings) -> int:
    with alone(settings.data_dir):
        return _run(settings, [Child(*API), Child(*DISPATCHER)])


def check_cluster(settings: Settings) -> None:
    """What machines must share, before one of them works alone without knowing."""
    if not settings.is_cluster:
        return
    if not settings.store_url:
        fail(
            "the machines of a cluster share a store, and FLATLORA_STORE_URL is not set",
            "Name a bucket (s3://…, gs://…, az://…), or a folder that all mount (file:///…).",
            code=USAGE,
        )
    if settings.auth == "key" and settings.api_key is None:
        fail(
            "the APIs of a cluster share a key, and FLATLORA_API_KEY is not set",
            "Set it to a long random string, such as flk_ and the output of openssl rand -hex 24.",
            code=USAGE,
        )


def run_api(settings: Settings) -> int:
    check_cluster(settings)
    return _run(settings, [Child(*API)])


@contextmanager
def alone(data_dir: Path) -> Iterator[None]:
    """Be the only ``up`` of a data folder, before anything is started in it."""
    with explained("FLATLORA_DATA_DIR"):
        make_private(data_dir)
        file = (data_dir / "service.lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(
                f"another flatlora service works in {data_dir}",
                "Stop it, or choose another folder with FLATLORA_DATA_DIR.",
            )
        yield


@contextmanager
def explained(setting: str) -> Iterator[None]:
    """What goes wrong before the service stands is mostly a setting."""
    try:
        yield
    except (OSError, SQLAlchemyError, ValueError) as error:
        fail(str(error).splitlines()[0], f"Check {setting}.")


def _run(settings: Settings, children: list[Child]) -> int:
    check_port(settings)
    with explained("FLATLORA_DATA_DIR"):
        make_private(settings.data_dir)
        announce(settings)
    if not settings.is_cluster:  # there `flatlora migrate` does it, once and not in each process
        with explained("FLATLORA_DATABASE_URL"):
            upgrade(settings.database)
    settings.url_file.write_text(settings.base_url)
    try:
        return _serve(settings, children)
    finally:
        settings.url_file.unlink(missing_ok=True)


def _serve(settings: Settings, children: list[Child]) -> int:
    stopping = SharedFlag()

    def stop(_number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():  # asked twice: do not wait for a checkpoint
            for child in children:
                child.kill()
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    code = _tend(children, stopping)
    _stop(children, settings)
    return code


def _tend(children: list[Child], stopping: SharedFlag) -> int:
    while not stopping.wait(TURN_SECONDS):
        for child in children:
            code = child.tend()
            if code is None:
                continue
            if child.name == "dispatcher" and code == ALREADY_RUNNING:
                return FAILED
            err.print(f"the {child.name} ended with {code}; starting it again", highlight=False)
    return OK


def _stop(children: list[Child], settings: Settings) -> None:
    """The dispatcher first: its job writes a checkpoint while the API still answers."""
    if any(child.process for child in children):
        err.print("stopping; a running job is brought to a checkpoint (Ctrl-C again: at once)")
    for child in reversed(children):
        is_api = child.name == "api"
        child.stop(API_STOP_SECONDS if is_api else settings.drain_grace_seconds + 10)


def check_port(settings: Settings) -> None:
    """Say that the port is taken before anything is started."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            fail(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
                "Is the service running already? Choose another port with FLATLORA_PORT.",
            )


def announce(settings: Settings) -> None:
    err.print(f"[bold]flatlora[/] on {settings.base_url}  (API pages: {settings.base_url}/docs)")
    say = partial(err.print, markup=False, highlight=False)  # a folder's name is not markup
    say(f"data folder    {settings.data_dir}")
    say(f"datasets below {_folders(settings.dataset_roots)}")
    say(f"models below   {_folders(settings.model_roots)}")
    if settings.auth == "none":
        err.print("[yellow]no key is asked for (FLATLORA_AUTH=none)[/]")
        return
    key, is_new = ensure_key(settings)
    if is_new:
        say(f"API key        {key}   (made now, kept in {settings.key_file})")
    else:
        where = "FLATLORA_API_KEY" if settings.api_key else settings.key_file
        say(f"API key        in {where}")


def _folders(roots: list[Path]) -> str:
    return ", ".join(str(root) for root in roots)
