"""The trainer process: one job, then the end. It holds no key to the database or the broker.

    python -m worker.trainer train  <job folder> <report descriptor>
    python -m worker.trainer verify <job folder> <report descriptor>

It stops at the next step when told to: SIGTERM means drain (checkpoint, exit 75), SIGUSR1 means
cancel (exit 76). It dies with its supervisor: the kernel kills it where that can be asked for,
and everywhere it leaves when its standard input is closed.
"""

import errno
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

from app.parent import die_with_parent
from worker.inputs import read_job
from worker.pipe import PipeReporter
from worker.training.errors import JobError, Stopped
from worker.training.reporter import Wish

DRAINED = 75  # EX_TEMPFAIL: try again later
CANCELLED = 76
FAILED = 1

log = logging.getLogger("worker.trainer")


class Signals:
    """A ``Control`` that listens to signals."""

    def __init__(self) -> None:
        self._wish: Wish | None = None
        signal.signal(signal.SIGTERM, self._on_drain)
        signal.signal(signal.SIGUSR1, self._on_cancel)

    def wish(self) -> Wish | None:
        return self._wish

    def _on_drain(self, _number: int, _frame: FrameType | None) -> None:
        self._wish = self._wish or "drain"

    def _on_cancel(self, _number: int, _frame: FrameType | None) -> None:
        self._wish = "cancel"


def main() -> int:
    die_with_parent()
    task, folder, descriptor = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    control, reporter = Signals(), PipeReporter(descriptor)
    try:
        if task == "verify":
            _verify(folder)
        else:
            _train(folder, reporter, control)
    except Stopped as stopped:
        return CANCELLED if stopped.wish == "cancel" else DRAINED
    except JobError as error:
        log.exception("the job failed: %s", error.reason)
        reporter.failed(error.reason, error.message, error.hint)
        return FAILED
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        log.exception("no space left")
        reporter.failed(
            "disk_full",
            "The worker's disk is full.",
            "Free some space below the data folder, then submit the job again.",
        )
        return FAILED
    return 0


def _train(folder: Path, reporter: PipeReporter, control: Signals) -> None:
    from worker.training.run import run

    reporter.result(run(read_job(folder), folder, reporter, control))


def _verify(folder: Path) -> None:
    from worker.training.verify import verify

    verify(read_job(folder), folder)


if __name__ == "__main__":
    sys.exit(main())
