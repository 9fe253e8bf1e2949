"""One job from its claim to its end, in this process; the training itself runs in another."""

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.devices import count
from app.jobs.states import Phase, Reason
from app.logs import job_context
from app.settings import Settings
from app.storage import ArtifactStore, Damaged, Outage
from app.tracing import flush, span
from worker import metrics
from worker.claims import Claims
from worker.devices import first_of, visible
from worker.fetch import Fetcher
from worker.folders import Folders
from worker.handover import Handover, restore
from worker.inputs import LOG_FILE
from worker.lease import Lease, LeaseLost
from worker.log_tail import LogTail
from worker.patience import until_stored, until_written
from worker.pipe import Message
from worker.process import FolderBusy, Task, TrainerProcess, out_of_memory_kills
from worker.progress import Progress
from worker.publish import publish
from worker.remote import Arrived, Order
from worker.trainer import DRAINED
from worker.training.errors import ConfigInvalid, JobError, as_told
from worker.watch import Draining, Stop, Watch

Value = TypeVar("Value")

log = structlog.get_logger()

HANDOVER_SECONDS = 20  # that a drained job waits for its last checkpoint to be in the store
YIELDING = {Stop.DRAIN, Stop.PAUSE}  # stops after which the job goes on from where it is
TURN_SECONDS = 0.5
UNFORESEEN = JobError("The worker met an error of its own.", "See the worker's log.")


INTERRUPTED: dict[Stop | None, str] = {
    Stop.DRAIN: "drained",
    Stop.PAUSE: "paused",
    Stop.CUT_OFF: "cut_off",
    Stop.CANCEL: "cancelled",
    Stop.MAX_RUNTIME: Reason.MAX_RUNTIME,
}
"""How such an attempt is counted."""


class Interrupted(Exception):
    """Somebody wanted the job to stop, and the trainer has stopped."""


class TrainerDied(Exception):
    """The trainer ended in a way that nobody asked for."""

    def __init__(self, how: str, reason: Reason = Reason.WORKER_LOST) -> None:
        super().__init__(f"The trainer {how}.")
        self.reason = reason


def traced(name: str, lease: Lease, started_at: int | None = None) -> AbstractContextManager[None]:
    """A span in the trace of the request that has submitted the job."""
    ids: dict[str, Any] = {"job_id": lease.job_id, "attempt": lease.attempt}
    return span(name, lease.traceparent, started_at=started_at, **ids)


def _gpus(lease: Lease) -> int:
    """That the job needs; old rows do not say."""
    return 1 if lease.spec["dry_run"] else int(lease.spec["resources"].get("gpus", 1))


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


class ReportedFailure(JobError):
    """The trainer has said why the job fails."""

    def __init__(self, message: Message) -> None:
        super().__init__(message["message"], message["hint"])
        self.reason = Reason(message["reason"])


class Supervisor:
    def __init__(
        self,
        settings: Settings,
        claims: Claims,
        fetcher: Fetcher,
        store: ArtifactStore,
        draining: Draining,
        device: str | None = None,
    ) -> None:
        """``device``: GPUs (``0``, ``0+1``), ``cpu``, or None for whatever the trainer finds."""
        self._settings = settings
        self._claims = claims
        self._fetcher = fetcher
        self._store = store
        self._draining = draining
        self._device = device
        self.folders = Folders(claims, settings.work_dir)

    def run(self, lease: Lease) -> None:
        """Bring the job to an end, or back into the queue. Never raises for the job's own sake."""
        with job_context(
            job_id=lease.job_id,
            attempt=lease.attempt,
            fence=lease.fence,
            request_id=lease.request_id,
        ):
            log.info("job claimed")
            outcome, began = "cut_off", time.monotonic()
            try:
                outcome = self._attempt(lease)
                log.info("attempt ended", outcome=outcome)
            except LeaseLost:
                outcome = "lease_lost"
                log.warning("lease lost: somebody else holds the job now")
            finally:
                metrics.attempt_ended(outcome, time.monotonic() - began)
                metrics.gpu_memory(self._device, 0)
                flush()
        self.folders.sweep()

    def _attempt(self, lease: Lease) -> str:
        """Work under the lease and write how that ended: one of ``metrics.OUTCOMES``."""
        tail = LogTail(self._folder(lease) / LOG_FILE, lease.job_id, lease.logged)
        progress = Progress(self._claims, lease, tail)
        with Watch(self._settings, self._claims, lease, progress, self._draining) as watch:
            try:
                result, adapter = self._work(lease, progress, watch)
            except Interrupted:
                self._write(progress.finish)
                stop = watch.stop  # read once: after this the watch finds the job given back
                self._yield_to(stop, lease)
                outcome = INTERRUPTED[stop]
            except TrainerDied as error:
                outcome = self._lose(lease, progress, error)
            except Outage as error:
                log.warning("the store was away for too long", exc_info=error)
                gone = TrainerDied("had no store to work with", Reason.PUBLISH_FAILED)
                outcome = self._lose(lease, progress, gone)
            except (SQLAlchemyError, LeaseLost):
                raise  # nothing can be written now; the lease will run out
            except Exception as error:
                outcome = self._fail(lease, progress, error)
            else:
                self._write(progress.finish)
                self._write(lambda: self._claims.succeed(lease, result=result, adapter=adapter))
                outcome = "succeeded"
            self._forget_checkpoints(lease)
        return outcome

    def _lose(self, lease: Lease, progress: Progress, death: "TrainerDied") -> str:
        self._write(progress.finish)
        self._write(lambda: self._claims.lose(lease, death.reason, str(death)))
        return death.reason

    def _fail(self, lease: Lease, progress: Progress, error: Exception) -> str:
        failure = as_told(error, unforeseen=UNFORESEEN)
        if failure is UNFORESEEN:
            # Of this machine rather than of the job: others may do better, and this one pauses.
            log.error("attempt failed", exc_info=error)
            outcome = self._lose(
                lease, progress, TrainerDied("could not be supervised", Reason.INTERNAL)
            )
            self._draining.wait(self._settings.retry_seconds)
            return outcome
        self._write(progress.finish)
        reason = Reason(failure.reason)
        self._write(lambda: self._claims.fail(lease, reason, failure.message, failure.hint))
        return reason

    def _work(
        self, lease: Lease, progress: Progress, watch: Watch
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        self._check_size(lease)
        folder = self._folder(lease)
        folder.mkdir(parents=True, exist_ok=True)
        with traced("job.fetch", lease):
            self._fetch(folder, lease, progress, watch)
        with traced("job.train", lease):
            result = self._train(folder, lease, progress, watch)
        if lease.spec["dry_run"]:
            return result, None
        progress.phase(Phase.PUBLISHING)
        with traced("job.verify", lease):
            self._run("verify", folder, lease, progress, watch)
        with traced("job.publish", lease):
            manifest = self._publish(folder, lease, watch, result)
        return manifest["result"], manifest["adapter"]

    def _check_size(self, lease: Lease) -> None:
        """Only an embedded worker takes jobs that are too large for it: nobody else would come."""
        found = count(self._device)
        if _gpus(lease) > found:
            raise ConfigInvalid(
                f"The job asks for {_gpus(lease)} GPUs, and this service trains on {found}.",
                "Lower resources.gpus, or give the service more: FLATLORA_DEVICES.",
            )

    def _fetch(self, folder: Path, lease: Lease, progress: Progress, watch: Watch) -> None:
        def download(name: str, revision: str | None) -> Path:
            what = "description" if lease.spec["dry_run"] else "all"
            limits = str(self._settings.max_model_bytes), f"{self._settings.model_seconds:g}"
            arguments = (name, revision or "", what, *limits)
            found = self._run("download", folder, lease, progress, watch, *arguments)
            return Path(found["path"])

        def bring(order: Order) -> Arrived:
            with order.written() as path:
                arguments = (str(path),)
                found = self._run(order.task, folder, lease, progress, watch, *arguments)
            return Arrived(**found)

        def fetch() -> None:
            pin = partial(self._claims.pin, lease)
            self._fetcher.fetch(folder, lease, download, bring, pin)

        self._patient(fetch, watch)
        if self._settings.is_cluster:
            try:
                self._patient(lambda: restore(self._store, lease, folder), watch)
            except Damaged as error:  # the job begins anew, and is none the worse for it
                log.warning("the checkpoint in the store cannot be used", exc_info=error)

    def _train(
        self, folder: Path, lease: Lease, progress: Progress, watch: Watch
    ) -> dict[str, Any]:
        if not self._settings.is_cluster:
            return self._run("train", folder, lease, progress, watch)
        with Handover(self._claims, self._store, lease, folder) as handover:

            def hear(message: Message) -> None:
                is_checkpoint = message["kind"] == "event" and message["type"] == "job.checkpoint"
                if is_checkpoint and message["data"].get("verified", True):
                    handover.take(message["data"]["step"])

            try:
                return self._run("train", folder, lease, progress, watch, hear=hear)
            except (Interrupted, TrainerDied):
                self._finish(handover, watch)
                raise

    def _finish(self, handover: Handover, watch: Watch) -> None:
        """See the last checkpoint into the store; a pause is in less of a hurry than a drain."""
        if watch.stop is None or watch.stop in YIELDING:
            handover.finish(HANDOVER_SECONDS)
        deadline = time.monotonic() + self._settings.drain_grace_seconds
        while watch.stop is Stop.PAUSE and not self._draining.is_set():
            if handover.finish(TURN_SECONDS) or time.monotonic() > deadline:
                return

    def _publish(
        self, folder: Path, lease: Lease, watch: Watch, result: dict[str, Any]
    ) -> dict[str, Any]:
        def still_ours() -> None:
            self._claims.wish(lease)  # a manifest is for good: not from one who has lost the job

        return self._patient(
            lambda: publish(self._store, lease.job_id, folder, result, still_ours), watch
        )

    def _run(
        self,
        task: Task,
        folder: Path,
        lease: Lease,
        progress: Progress,
        watch: Watch,
        *arguments: str,
        hear: Callable[[Message], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Run one trainer process to its end and return the result that it reported."""
        if watch.stop:
            raise Interrupted
        oom_kills = out_of_memory_kills()
        result = failure = None
        with self._start(task, folder, lease, *arguments) as trainer, watch.over(trainer):
            for message in trainer.messages():
                match message["kind"]:
                    case "result":
                        result = message["result"]
                    case "failed":
                        failure = message
                    case _:
                        progress.take(message)
                        metrics.hear(message, self._device)
                        hear(message)
            code = trainer.wait()
        if code == DRAINED and self._draining.is_set():
            watch.drain()  # somebody has told all processes, and it was the first to hear
        if failure:
            raise ReportedFailure(failure)
        if code == 0 and result is not None:
            return dict(result)
        if watch.stop is Stop.STALLED:
            raise TrainerDied(f"said nothing for {self._settings.stall_seconds:g} seconds")
        if watch.stop:
            raise Interrupted
        starved = code == -signal.SIGKILL and out_of_memory_kills() > oom_kills
        reason = Reason.HOST_OUT_OF_MEMORY if starved else Reason.WORKER_LOST
        raise TrainerDied(_how(code), reason)

    def _start(self, task: Task, folder: Path, lease: Lease, *arguments: str) -> TrainerProcess:
        is_ours = task in {"hub", "web", "bucket"}  # a trainer of one's own does not fetch rows
        module = "worker.trainer" if is_ours else self._settings.trainer_module
        environment = self._environment(lease)
        try:
            return TrainerProcess(task, folder, *arguments, module=module, environment=environment)
        except FolderBusy as error:
            raise TrainerDied(
                "could not start: one of another attempt works in its folder"
            ) from error

    def _environment(self, lease: Lease) -> dict[str, str]:
        """What the trainer of one attempt gets beside what every trainer gets."""
        device = first_of(self._device, _gpus(lease)) if self._device else ""
        described = {
            "FLATLORA_DEVICE": device,
            "FLATLORA_JOB_ID": lease.job_id,
            "FLATLORA_ATTEMPT": str(lease.attempt),
            "FLATLORA_FENCE": str(lease.fence),
            "FLATLORA_STALL_SECONDS": f"{self._settings.stall_seconds:g}",
        }
        return described | ({"CUDA_VISIBLE_DEVICES": visible(device)} if device else {})

    def _yield_to(self, stop: Stop | None, lease: Lease) -> None:
        """Do what was wished for."""
        match stop:
            case Stop.CANCEL:
                self._write(lambda: self._claims.cancel(lease))
            case Stop.MAX_RUNTIME:
                limit = lease.spec["resources"]["max_runtime"]
                self._write(
                    lambda: self._claims.fail(
                        lease,
                        Reason.MAX_RUNTIME,
                        f"The job ran for more than {limit} seconds.",
                        "Raise resources.max_runtime, or train for fewer steps.",
                    )
                )
            case Stop.DRAIN:
                why = "The worker stops; the job goes on from a checkpoint."
                self._write(lambda: self._claims.release(lease, why))
            case Stop.PAUSE:
                why = "The trainer has stopped; the job can go on from its last checkpoint."
                self._write(lambda: self._claims.release(lease, why))
            case Stop.CUT_OFF:
                why = "The worker could not reach the database; the job goes on from a checkpoint."
                self._write(lambda: self._claims.release(lease, why))
            case _:
                raise LeaseLost(lease.job_id)

    def _write(self, write: Callable[[], Any]) -> None:
        until_written(write, self._draining)

    def _patient(self, call: Callable[[], Value], watch: Watch) -> Value:
        """Through outages of the database and of the store, until somebody wants it to stop."""

        def stored() -> Value:
            try:
                return until_stored(call, self._draining, lambda: watch.stop in {None, Stop.DRAIN})
            except Outage as error:
                if watch.stop:
                    raise Interrupted from error
                raise

        return until_written(stored, self._draining)

    def _forget_checkpoints(self, lease: Lease) -> None:
        """Of a job that is over nobody goes on from one. What stays is found by the retention."""
        if not self._settings.is_cluster:
            return
        with suppress(SQLAlchemyError, OSError):
            if self._claims.over([lease.job_id]):
                self._store.forget_checkpoints(lease.job_id, fence=lease.fence, keep_step=None)

    def _folder(self, lease: Lease) -> Path:
        return self._settings.work_dir / lease.job_id
