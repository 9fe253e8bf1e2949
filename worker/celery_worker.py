"""The Celery process of a worker: it waits for wake-ups and has one child for each slot.

    python -m worker.celery_worker [<size>]      (started by worker.main)

Slots of different sizes have a process each: a wake-up goes to slots that the job fits into
(``app.broker``), and Celery cannot choose among the children of one process.

A wake-up says that there is something to do; its child takes the jobs whose turn it is until none
is left. The children import no torch, so they are forked; a child that dies is forked anew and puts
back what its slot held.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import structlog
from billiard import current_process
from celery import Celery, bootsteps, signals
from celery.exceptions import InvalidTaskError
from celery.worker.request import Request

from app.broker import WAKE, make_celery, queues_of
from app.devices import count
from app.flag import SharedFlag
from app.ids import is_id
from app.logs import configure_logs
from app.parent import die_with_parent, follow
from app.settings import Settings, get_settings
from app.tracing import configure_tracing
from worker.devices import slots
from worker.slot import LOCK_SECONDS, Bench, occupied

log = structlog.get_logger()

RETRY_SECONDS = 2.0


class Child:
    """A pool child: it is in one slot for all its life."""

    def __init__(self, settings: Settings, draining: SharedFlag, size: int) -> None:
        self._settings = settings
        self._size = size
        self._draining = draining
        self._stack = ExitStack()
        self._bench: Bench | None = None
        self._parent = os.getpid()

    def start(self, **_: Any) -> None:
        """In the child, right after the fork. One that cannot work ends, and another is forked."""
        try:
            self._start()
        except Exception as error:  # Celery would go on with a child that eats wake-ups
            log.error("this slot cannot start; trying again", exc_info=error)
            time.sleep(RETRY_SECONDS)
            os._exit(1)

    def _start(self) -> None:
        follow(self._parent)
        configure_tracing("flatlora-worker")  # not before the fork: it has a thread
        settings = self._settings
        index, device = _slots_of(settings, self._size)[current_process().index]
        path = settings.slots_dir / f"{index}.lock"
        slot = self._stack.enter_context(occupied(path, device, wait_seconds=LOCK_SECONDS))
        structlog.contextvars.bind_contextvars(slot=slot.name)
        self._bench = Bench(settings, slot, self._draining)
        try:
            self._bench.recover()
        except Exception as error:  # the first wake-up tries again
            log.warning("what this slot held is not put back yet", exc_info=error)

    def work(self, *about: Any) -> None:
        """Run jobs until none waits."""
        if len(about) > 1 or not all(is_id(str(job_id), "job") for job_id in about):
            log.warning(
                "a wake-up with other arguments than one job id", arguments=str(about)[:200]
            )
        assert self._bench is not None
        # A service manager may tell all processes. Not before: billiard sets its own at the start.
        signal.signal(signal.SIGTERM, self._drain)
        while not self._draining.is_set():
            try:
                if not self._bench.run_next():
                    return
            except Exception:  # one job's trouble, or the database's, is not the others' end
                log.exception("this turn failed; trying again")
                self._draining.wait(RETRY_SECONDS)

    def _drain(self, _number: int, _frame: FrameType | None) -> None:
        self._draining.set()


class WakeUp(Request):  # type: ignore[misc] # Celery ships no types
    """A message for the task. Whoever can write to the broker can do no more than wake."""

    def __init__(self, message: Any, *arguments: Any, **options: Any) -> None:
        try:
            _, keywords, more = message.payload
            if keywords or any(more.values()):
                raise ValueError(f"found {keywords} and {more}, expected a job id alone")
            super().__init__(message, *arguments, **options)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidTaskError(f"not a wake-up: {error}") from error  # else Celery would end
        self.time_limits = (None, None)

    def acknowledge(self) -> None:
        """It was taken from Redis when it came (``app.broker``): there is nothing to tell."""
        self.acknowledged = True


def _slots_of(settings: Settings, size: int) -> list[tuple[int, str]]:
    """Number and devices of each slot of a size."""
    numbered = enumerate(slots(settings.devices))
    return [(index, device) for index, device in numbered if count(device) == size]


def prepare(settings: Settings, draining: SharedFlag, size: int = 1) -> Celery:
    """The Celery app with its one task."""
    app = make_celery(settings.broker_url)
    child = Child(settings, draining, size)
    app.conf.worker_proc_alive_timeout = LOCK_SECONDS + 30
    app.task(name=WAKE, ignore_result=True, Request=WakeUp)(child.work)
    app.steps["worker"].add(_draining_step(draining))
    _connect(signals.worker_process_init, child.start)
    _connect(signals.worker_shutting_down, lambda **_: draining.set())
    _connect(signals.setup_logging, lambda **_: None)  # ours stands already
    return app


def _draining_step(draining: SharedFlag) -> type:
    """Drain also where Celery stops for an error of its own: it waits until its slots are free."""

    class Drain(bootsteps.StartStopStep):  # type: ignore[misc] # Celery ships no types
        requires = {"celery.worker.components:Pool"}  # so it is stopped before

        def start(self, _worker: Any) -> None:
            pass

        def stop(self, _worker: Any) -> None:
            draining.set()

    return Drain


def _connect(signal_: Any, receiver: Callable[..., Any]) -> None:
    signal_.connect(receiver, weak=False)


def main() -> int:
    die_with_parent()
    configure_logs()
    settings, size = get_settings(), int(sys.argv[1]) if sys.argv[1:] else 1
    app = prepare(settings, SharedFlag(), size)
    worker = app.Worker(
        concurrency=len(_slots_of(settings, size)),
        queues=queues_of(size),
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main())
