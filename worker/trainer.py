"""The trainer process: one job, then the end. It holds no key to the database or the broker.

    python -m worker.trainer download <job folder> <report descriptor> <hub id> <revision> <what>
    python -m worker.trainer train    <job folder> <report descriptor>
    python -m worker.trainer verify   <job folder> <report descriptor>

``what`` is ``all``, or ``description`` for a model without its weights.

It stops at the next step when told to: SIGTERM means drain (checkpoint, exit 75), SIGUSR1 means
cancel (exit 76). It dies with its supervisor: the kernel kills it where that can be asked for,
and everywhere it leaves when its standard input is closed.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from app.parent import die_with_parent
from worker.inputs import read_job
from worker.pipe import PipeReporter
from worker.training.errors import JobError, Stopped, as_told
from worker.training.reporter import Wish

DRAINED = 75  # EX_TEMPFAIL: try again later
CANCELLED = 76
FAILED = 1
NO_DEVICE = 77

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
    task, folder, descriptor, *arguments = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    control, reporter = Signals(), PipeReporter(int(descriptor))
    try:
        TASKS[task](Path(folder), reporter, control, *arguments)
    except Stopped as stopped:
        return CANCELLED if stopped.wish == "cancel" else DRAINED
    except Exception as error:
        log.exception("the job failed")
        failure = explain(error)
        reporter.failed(failure.reason, failure.message, failure.hint)
        return FAILED
    return 0


def explain(error: Exception) -> JobError:
    """What the job's author is told.

    An exception would come again if the job were run again, so it ends the job; a trainer that
    the system kills says nothing, and its job is tried again.
    """
    unforeseen = JobError(
        f"The trainer met an error of its own ({type(error).__name__}).",
        "The trainer's log on the worker has the details. Please report it.",
    )
    return as_told(error, unforeseen=unforeseen)


def _download(
    _folder: Path,
    reporter: PipeReporter,
    _control: Signals,
    name: str,
    revision: str,
    what: str,
) -> None:
    from worker.download import download_model

    # Nobody waits for half a download, and what has come stays in the cache.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    path = download_model(name, revision or None, with_weights=what == "all")
    reporter.result({"path": str(path)})


def _train(folder: Path, reporter: PipeReporter, control: Signals) -> None:
    import torch

    from worker.training.run import run

    if os.environ.get("FLATLORA_DEVICE", "") not in {"", "cpu"} and not torch.cuda.is_available():
        log.error("the GPU of this slot is not to be seen any more")  # never on the CPU instead
        sys.exit(NO_DEVICE)
    reporter.result(run(read_job(folder), folder, reporter, control))


def _verify(folder: Path, reporter: PipeReporter, _control: Signals) -> None:
    from worker.training.result.verify import verify

    verify(read_job(folder), folder)
    reporter.result({})


TASKS: dict[str, Callable[..., None]] = {"download": _download, "train": _train, "verify": _verify}


if __name__ == "__main__":
    sys.exit(main())
