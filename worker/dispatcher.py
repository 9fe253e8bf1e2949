"""The embedded worker: one process that takes queued jobs from the table, one at a time.

    python -m worker.dispatcher

It is alone on its data folder (a file lock says so), so what the row of a dead dispatcher still
holds can be put back the moment the next one starts. SIGTERM and SIGINT drain: the running job
writes a checkpoint and goes back to the queue.
"""

import signal
import sys
import time
from types import FrameType

import structlog

from app.db import make_engine
from app.flag import SharedFlag
from app.logs import configure_logs
from app.parent import die_with_parent
from app.periodic import Periodic
from app.retention import Retention
from app.settings import Settings, get_settings
from app.storage import open_store
from app.tracing import configure_tracing
from worker.devices import one_slot
from worker.metrics import prepare_metrics, serving_metrics
from worker.reaper import Reaper
from worker.slot import Bench, Slot, SlotTaken, occupied

log = structlog.get_logger()

REAP_SECONDS = 10
RETRY_SECONDS = 2


class Dispatcher:
    def __init__(self, settings: Settings, slot: Slot, draining: SharedFlag) -> None:
        self._bench = Bench(settings, slot, draining)
        self._reaper = Reaper(
            self._bench.claims, every_seconds=REAP_SECONDS, lease_seconds=settings.lease_seconds
        )
        self._draining = draining
        self._poll_seconds = settings.poll_seconds
        self._reap_at = 0.0

    def clear(self) -> None:
        self._bench.folders.forget_gone()

    def run(self) -> None:
        self._bench.recover()
        log.info("dispatcher ready")
        while not self._draining.is_set():
            try:
                if not self._turn():
                    self._draining.wait(self._poll_seconds)
            except Exception:  # one job's trouble, or the database's, is not the others' end
                log.exception("this turn failed; trying again")
                self._draining.wait(RETRY_SECONDS)
        log.info("dispatcher drained")

    def _turn(self) -> bool:
        """Run one job if there is one."""
        if time.monotonic() > self._reap_at:
            self._reap_at = time.monotonic() + REAP_SECONDS
            self._reaper.reap()
        return self._bench.run_next()


def main() -> int:
    die_with_parent()
    settings = get_settings()
    configure_logs()
    draining = SharedFlag()

    def drain(_number: int, _frame: FrameType | None) -> None:
        draining.set()

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGINT, drain)
    device = one_slot(settings.devices)
    try:
        with occupied(settings.data_dir / "dispatcher.lock", device) as slot:
            prepare_metrics(settings)
            configure_tracing("flatlora-worker")
            cleaner = Retention(make_engine(settings.database), open_store(settings), settings)
            cleaning = Periodic("cleaner", settings.cleaning_seconds, cleaner.clean)
            dispatcher = Dispatcher(settings, slot, draining)
            clearing = Periodic("folders", settings.cleaning_seconds, dispatcher.clear)
            with serving_metrics(settings), cleaning, clearing:
                dispatcher.run()
    except SlotTaken as error:
        log.error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
