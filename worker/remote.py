"""Datasets from elsewhere, each fetched by a process of its own, which can be killed.

The supervisor writes an ``Order`` into the job's folder; that the order's URI is allowed has been
checked. Which secrets the process gets depends on its task: none for ``web``, those of the clouds
for ``bucket``, the hub's token for ``hub``.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.datasets.uris import bucket_file, hub_file
from app.net.rules import Rules
from app.net.urls import bare, check_url
from app.settings import Settings
from worker.pipe import PipeReporter
from worker.process import Task
from worker.training.errors import DatasetUnavailable, JobError

TASKS: dict[str, Task] = {
    "https": "web", "http": "web", "s3": "bucket", "gs": "bucket", "az": "bucket", "hf": "hub",
}  # fmt: skip
BEAT_SECONDS = 5.0
PART = ".part"


@dataclass(frozen=True)
class Order:
    """What to bring where. ``parts`` are those of the URI, which are all that the process reads.

    ``uri`` is as people are told it: without a query, which may be a secret.
    """

    task: Task
    uri: str
    parts: Mapping[str, Any]
    target: str
    max_bytes: int
    seconds: float

    @contextmanager
    def written(self) -> Iterator[Path]:
        """In a file, as other users may read command lines."""
        path = Path(self.target + ".order")
        path.write_text(json.dumps(asdict(self)))
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> "Order":
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Arrived:
    """``revision``: the commit, of a file of the hub."""

    filename: str
    sha256: str
    revision: str | None = None


Bring = Callable[[Order], Arrived]


def order_for(uri: str, target: Path, settings: Settings) -> Order:
    """Raises ``UriError`` where the settings do not allow it (any more)."""
    scheme = uri.partition(":")[0]
    match TASKS[scheme]:
        case "web":
            rules = Rules.of(settings)
            check_url(uri, rules)
            parts = {"url": uri, "rules": rules.as_plain()}
        case "bucket":
            parts = asdict(bucket_file(uri, settings))
        case _:
            parts = asdict(hub_file(uri, settings))
    return Order(
        task=TASKS[scheme],
        uri=bare(uri) if TASKS[scheme] == "web" else uri,
        parts=parts,
        target=str(target),
        max_bytes=settings.max_dataset_bytes,
        seconds=settings.dataset_seconds,
    )


def bring(order: Order) -> Arrived:
    """Fetch it, in this process. Raises ``DatasetUnavailable``."""
    match order.task:
        case "web":
            from worker.web import bring_url

            return bring_url(order)
        case "bucket":
            from worker.bucket import bring_object

            return bring_object(order)
        case _:
            from worker.hub import bring_hub_file

            return bring_hub_file(order)


def took_too_long(order: Order) -> DatasetUnavailable:
    return DatasetUnavailable(
        f"{order.uri} could not be fetched within {order.seconds:g} seconds.",
        "Is the server fast enough? FLATLORA_DATASET_SECONDS is the limit.",
    )


def too_large(order: Order) -> DatasetUnavailable:
    return DatasetUnavailable(
        f"{order.uri} has more than {order.max_bytes:,} bytes.",
        "Compress it (.gz, .zst), or raise FLATLORA_MAX_DATASET_BYTES.",
    )


def write_hashed(order: Order, chunks: Iterable[bytes]) -> str:
    """The SHA-256 of what is then whole at the order's target. Raises ``DatasetUnavailable``."""
    partial = Path(order.target + PART)
    digest, size = hashlib.sha256(), 0
    with partial.open("wb") as file:
        for chunk in chunks:
            size += len(chunk)
            if size > order.max_bytes:
                raise too_large(order)
            digest.update(chunk)
            file.write(chunk)
    partial.rename(order.target)
    return digest.hexdigest()


def watch_the_clock(seconds: float, failure: JobError, reporter: PipeReporter) -> None:
    """Say now and then that this process lives, and end it with the failure after its time.

    From another thread, as libraries and the system's resolver cannot be interrupted.
    """

    def watch() -> None:
        left = seconds
        while left > 0:
            pause.wait(min(left, BEAT_SECONDS))
            left -= BEAT_SECONDS
            reporter.phase("fetching")
        reporter.failed(failure.reason, failure.message, failure.hint)
        os._exit(1)

    pause = threading.Event()
    threading.Thread(target=watch, name="clock", daemon=True).start()
