"""Prometheus metrics of a worker: all its processes write, one of them serves.

The supervisors are children that come and go, so each keeps its numbers in files of its own below
``metrics`` in the data folder, and the parent adds them up when it is asked. Without a port nothing
is written and nothing is imported. What each metric means: docs/observability.md.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from app.devices import CPU, parts
from app.jobs.states import Reason
from app.settings import Settings
from app.storage import make_private

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

log = structlog.get_logger()

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's; inherited by every child
KINDS = ("counter", "histogram", "gauge_livemax")  # as the library names its files
FILE_BYTES = 1 << 16  # as large as it makes them; far more than these few series need

MINUTE, HOUR = 60, 3600
QUEUE_BUCKETS = (
    1, 2, 5, 10, 30, MINUTE, 2 * MINUTE, 5 * MINUTE, 15 * MINUTE, 30 * MINUTE, HOUR, 3 * HOUR,
    6 * HOUR, 12 * HOUR, 24 * HOUR,
)  # fmt: skip
RUN_BUCKETS = (
    10, 30, MINUTE, 5 * MINUTE, 15 * MINUTE, 30 * MINUTE, HOUR, 2 * HOUR, 4 * HOUR, 8 * HOUR,
    12 * HOUR, 24 * HOUR, 48 * HOUR,
)  # fmt: skip


def prepare_metrics(settings: Settings) -> None:
    """Begin with empty files. To be called once, before any child of this worker is started."""
    os.environ.pop(VARIABLE, None)
    if not settings.metrics_port:
        return
    folder = settings.data_dir / "metrics"
    shutil.rmtree(folder, ignore_errors=True)
    make_private(folder)
    os.environ[VARIABLE] = str(folder)


def attempt_began(queue_seconds: float | None) -> None:
    """A job was claimed; how long it had waited, if this is its first time."""
    if (numbers := _numbers()) and queue_seconds is not None:
        numbers.queue_seconds.observe(max(0.0, queue_seconds))


def attempt_ended(reason: str, run_seconds: float) -> None:
    """``reason``: one of ``OUTCOMES``."""
    if numbers := _numbers():
        numbers.attempts.labels(reason).inc()
        numbers.run_seconds.observe(run_seconds)


def attempts_killed(number: int) -> None:
    """Attempts of a dead process that have been put back by the next one in its slot."""
    if number and (numbers := _numbers()):
        numbers.attempts.labels("killed").inc(number)


def lease_expired(number: int) -> None:
    if number and (numbers := _numbers()):
        numbers.leases.inc(number)


def hear(message: Mapping[str, Any], device: str | None) -> None:
    """What a trainer says of a step."""
    if message["kind"] != "step":
        return
    said = message["metrics"]
    tokens(said.get("tokens", 0))
    if size := said.get("gpu_memory_bytes"):
        gpu_memory(device, size)


def tokens(number: int) -> None:
    """Trained on, without padding."""
    if numbers := _numbers():
        numbers.tokens.inc(number)


def gpu_memory(device: str | None, size: int) -> None:
    """The most that the trainer on this device has allocated; 0 when it has ended."""
    if CPU not in parts(device or "0") and (numbers := _numbers()):
        numbers.gpu_memory.labels(device or "0").set(size)


OUTCOMES = (
    "succeeded",
    "cancelled",
    "drained",
    "paused",
    "cut_off",
    "lease_lost",
    "killed",
    *Reason,
)


class Numbers:
    """What one process counts."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        # No registry: the parent reads the files.
        self.queue_seconds = Histogram(
            "flatlora_job_queue_seconds",
            "Seconds from a job's acceptance to its first claim.",
            buckets=QUEUE_BUCKETS,
            registry=None,
        )
        self.run_seconds = Histogram(
            "flatlora_job_run_seconds",
            "Seconds that an attempt has run.",
            buckets=RUN_BUCKETS,
            registry=None,
        )
        self.attempts = Counter(
            "flatlora_job_attempts_total",
            "Attempts that have ended, by how.",
            ["reason"],
            registry=None,
        )
        self.leases = Counter(
            "flatlora_lease_expired_total",
            "Leases that ran out: their worker was not heard any more.",
            registry=None,
        )
        self.tokens = Counter(
            "flatlora_tokens_total", "Tokens trained on, without padding.", registry=None
        )
        self.gpu_memory = Gauge(
            "flatlora_gpu_memory_bytes",
            "The most that the running trainer has allocated.",
            ["device"],
            multiprocess_mode="livemax",
            registry=None,
        )

    def begin_at_zero(self) -> None:
        """Prometheus sees no increase of a series that it has not seen before."""
        for outcome in OUTCOMES:
            self.attempts.labels(outcome)


def _numbers() -> Numbers | None:
    return _of_process(os.getpid()) if VARIABLE in os.environ else None


@cache
def _of_process(pid: int) -> Numbers | None:
    """Made in each process at its first use, also after a fork. A full disk costs the numbers."""
    folder = Path(os.environ[VARIABLE])
    try:
        for kind in KINDS:
            # Whole files: a hole in one that is mapped ends the process when the disk is full.
            with (folder / f"{kind}_{pid}.db").open("ab") as file:
                file.write(bytes(FILE_BYTES - file.tell()))
        return Numbers()
    except OSError as error:
        log.warning("this process counts nothing", exc_info=error)
        return None


class Files:
    """All processes' numbers, added up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator["Metric"]:
        from prometheus_client.multiprocess import MultiProcessCollector

        self._forget_dead()
        files = [str(path) for path in self._folder.glob("*.db") if _is_whole(path)]
        yield from MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]

    def _forget_dead(self) -> None:
        """What a dead process held in memory it holds no more; what it counted stays."""
        for path in self._folder.glob("gauge_live*_*.db"):
            if not _lives(int(path.stem.rpartition("_")[2])):
                path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """False for one that its process has just begun, or has died over."""
    from prometheus_client.mmap_dict import MmapedDict

    try:
        return len(list(MmapedDict.read_all_values_from_file(str(path)))) > 0  # type: ignore[no-untyped-call]
    except Exception:
        return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def serving_metrics(settings: Settings) -> Iterator[None]:
    """Answer Prometheus at ``metrics_port`` while the block lasts, if there is one."""
    if not settings.metrics_port:
        yield
        return
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    from app.metrics import Machine

    if numbers := _numbers():
        numbers.begin_at_zero()
    registry = CollectorRegistry()
    registry.register(Machine(settings))
    registry.register(Files(settings.data_dir / "metrics"))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(settings.metrics_port, settings.host, registry)
    except OSError as error:  # training matters more
        log.error("no metrics are served", port=settings.metrics_port, exc_info=error)
        yield
        return
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
