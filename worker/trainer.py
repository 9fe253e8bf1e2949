"""The trainer process: one job, then the end. It holds no key to the database or the broker.

    python -m worker.trainer download <job folder> <report descriptor> \\
        <hub id> <revision> <what> <most bytes> <most seconds>
    python -m worker.trainer hub|web|bucket <job folder> <report descriptor> <order>
    python -m worker.trainer train    <job folder> <report descriptor>
    python -m worker.trainer verify   <job folder> <report descriptor>

A job of several GPUs is trained by as many processes, its ranks, and ``train`` only starts them:

    python -m worker.trainer rank     <job folder> <report descriptor>

``what`` is ``all``, or ``description`` for a model without its weights. ``order`` is the file in
which worker/remote.py has written which dataset to fetch.

It stops at the next row or step when told to: SIGTERM means drain (checkpoint, exit 75), SIGUSR1
means cancel (exit 76). It dies with its supervisor: the kernel kills it where that can be asked
for, and everywhere it leaves when its standard input is closed.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from app.devices import CPU, parts
from app.parent import die_with_parent
from worker.devices import visible
from worker.inputs import read_job
from worker.pipe import PipeReporter
from worker.training.config import TrainingJob
from worker.training.errors import ConfigInvalid, JobError, Stopped, as_told
from worker.training.launch import CANCELLED as CANCELLED
from worker.training.launch import DRAINED as DRAINED
from worker.training.launch import (
    FAILURE_DESCRIPTOR,
    Ended,
    RankProcesses,
    code_of,
    death_of,
    failure_of,
)
from worker.training.reporter import Wish

FAILED = 1
NO_DEVICE = 77
OTHERS_GONE = 78  # another rank has ended or does not answer, which is nothing to say of the job

WAIT_SHARE = 0.75  # of the time after which a silent trainer is killed: ranks wait no longer

log = logging.getLogger("worker.trainer")


class Signals:
    """A ``Control`` that listens to signals."""

    def __init__(self) -> None:
        self._wish: Wish | None = None
        self._pass_on: Callable[[int], None] | None = None
        signal.signal(signal.SIGTERM, self._on_drain)
        signal.signal(signal.SIGUSR1, self._on_cancel)

    def wish(self) -> Wish | None:
        return self._wish

    def pass_on(self, send: Callable[[int], None]) -> None:
        """Give all signals to another process too, beginning with what has come before."""
        self._pass_on = send
        if self._wish:
            send(signal.SIGTERM if self._wish == "drain" else signal.SIGUSR1)

    def _on_drain(self, number: int, _frame: FrameType | None) -> None:
        self._wish = self._wish or "drain"
        if self._pass_on:
            self._pass_on(number)

    def _on_cancel(self, number: int, _frame: FrameType | None) -> None:
        self._wish = "cancel"
        if self._pass_on:
            self._pass_on(number)


class Silent:
    """The ``Reporter`` of ranks that have nothing to say."""

    def phase(self, name: str) -> None:
        pass

    def rows(self, done: int, total: int | None) -> None:
        pass

    def preflight(self, report: Mapping[str, Any]) -> None:
        pass

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        pass

    def held_out(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def event(self, type_: str, message: str, **data: Any) -> None:
        pass


def main() -> int:
    die_with_parent()
    control = Signals()
    task, folder, descriptor, *arguments = sys.argv[1:]
    place = f"rank {os.environ['RANK']} " if task == "rank" else ""
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {place}%(levelname)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else it tells every URL, signed or not
    failures = reporter = PipeReporter(int(descriptor))
    if task == "rank":  # the others' say counts too
        failures = PipeReporter(int(os.environ[FAILURE_DESCRIPTOR]))
    try:
        TASKS[task](Path(folder), reporter, control, *arguments)
    except Stopped as stopped:
        return CANCELLED if stopped.wish == "cancel" else DRAINED
    except Exception as error:
        log.exception("the job failed")
        failure = explain(error)
        failures.failed(failure.reason, failure.message, failure.hint)
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
    control: Signals,
    name: str,
    revision: str,
    what: str,
    max_bytes: str,
    seconds: str,
) -> None:
    _die_at_once(control)  # what has come stays in the cache

    from worker.download import download_model, took_too_long
    from worker.remote import watch_the_clock

    watch_the_clock(float(seconds), took_too_long(name, float(seconds)), reporter)
    path = download_model(
        name, revision or None, with_weights=what == "all", max_bytes=int(max_bytes)
    )
    reporter.result({"path": str(path)})


def _fetch(_folder: Path, reporter: PipeReporter, control: Signals, order: str) -> None:
    _die_at_once(control)

    from worker.remote import Order, bring, took_too_long, watch_the_clock

    ordered = Order.read(Path(order))
    watch_the_clock(ordered.seconds, took_too_long(ordered), reporter)
    reporter.result(asdict(bring(ordered)))


def _die_at_once(control: Signals) -> None:
    """From now on, or now: nobody waits for half a download."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    if wish := control.wish():
        raise Stopped(wish)


def _train(folder: Path, reporter: PipeReporter, control: Signals) -> None:
    job = read_job(folder)
    if job.resources.gpus > 1 and not job.dry_run:
        _launch(job, folder, reporter, control)
        return

    from worker.training.run import run

    _check_device()
    reporter.result(run(job, folder, reporter, control))


def _check_device() -> None:
    import torch

    if os.environ.get("FLATLORA_DEVICE", "") not in {"", CPU} and not torch.cuda.is_available():
        log.error("the GPU of this slot is not to be seen any more")  # never on the CPU instead
        sys.exit(NO_DEVICE)


def _launch(job: TrainingJob, folder: Path, reporter: PipeReporter, control: Signals) -> None:
    """Run the job's ranks to their end, and end as they did."""
    devices = parts(os.environ.get("FLATLORA_DEVICE", ""))
    if len(devices) != job.resources.gpus:
        raise ConfigInvalid(
            f"The job asks for {job.resources.gpus} GPUs; found {len(devices)} in FLATLORA_DEVICE.",
            "Give the trainer as many, such as FLATLORA_DEVICE=0+1.",
        )
    module = ["-P", "-m", "worker.trainer"]
    command = [sys.executable, *module, "rank", str(folder), str(reporter.descriptor)]
    environments = [
        {"FLATLORA_DEVICE": device, "CUDA_VISIBLE_DEVICES": visible(device)} for device in devices
    ]
    with RankProcesses(command, environments) as ranks:
        control.pass_on(ranks.signal_all)
        ended = ranks.wait()
    log.info("the ranks have ended: %s", ", ".join(f"{one.rank} with {one.code}" for one in ended))
    end_as(ended, reporter)


def end_as(ended: Sequence[Ended], reporter: PipeReporter) -> None:
    """End this process as its ranks did; return if all is well."""
    if failure := failure_of(ended):
        reporter.failed(failure["reason"], failure["message"], failure["hint"])
        sys.exit(FAILED)
    if died := death_of(ended):
        if died != signal.SIGKILL:
            signal.signal(died, signal.SIG_DFL)
        os.kill(os.getpid(), died)  # the supervisor knows what to think of a signal
    if code := code_of(ended):
        sys.exit(code)


def _rank(folder: Path, reporter: PipeReporter, control: Signals) -> None:
    from worker.training.ranks import is_of_others, joined
    from worker.training.run import run

    _check_device()
    patience = WAIT_SHARE * float(os.environ.get("FLATLORA_STALL_SECONDS", "1800"))
    job = read_job(folder)
    try:
        with joined(patience):
            if os.environ["RANK"] != "0":
                run(job, folder, Silent(), control)
                return
            reporter.result(run(job, folder, reporter, control))
    except JobError:
        raise
    except Exception as error:
        if is_of_others(error):
            log.exception("another rank has gone")
            sys.exit(OTHERS_GONE)
        raise


def _verify(folder: Path, reporter: PipeReporter, _control: Signals) -> None:
    from worker.training.result.verify import verify

    found = verify(read_job(folder), folder)
    reporter.event("job.verified", "A fresh process computes what was trained.", **found)
    reporter.result({})


TASKS: dict[str, Callable[..., None]] = {
    "download": _download,
    "hub": _fetch,
    "web": _fetch,
    "bucket": _fetch,
    "train": _train,
    "rank": _rank,
    "verify": _verify,
}


if __name__ == "__main__":
    sys.exit(main())
