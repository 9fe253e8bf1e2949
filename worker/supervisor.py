"""One job from its claim to its end, in this process; the training itself runs in another."""

import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.jobs.states import Phase, Reason
from app.settings import Settings
from app.storage import ArtifactStore
from worker.claims import Claims, Lease, LeaseLost
from worker.fetch import Fetcher
from worker.inputs import CHECKPOINTS, JOB_FILE, LOG_FILE
from worker.pipe import Message
from worker.process import Task, TrainerProcess, out_of_memory_kills
from worker.progress import Progress
from worker.publish import publish
from worker.training.errors import JobError, as_told
from worker.watch import Stop, Watch

log = structlog.get_logger()

UNFORESEEN = JobError("The worker met an error of its own.", "See the worker's log.")


class Interrupted(Exception):
    """Somebody wanted the job to stop, and the trainer has stopped."""


class TrainerDied(Exception):
    """The trainer ended in a way that nobody asked for."""

    def __init__(self, code: int, reason: Reason) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        super().__init__(f"The trainer {how}.")
        self.reason = reason


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
        draining: threading.Event,
    ) -> None:
        self._settings = settings
        self._claims = claims
        self._fetcher = fetcher
        self._store = store
        self._draining = draining

    def run(self, lease: Lease) -> None:
        """Bring the job to an end, or back into the queue. Never raises for the job's own sake."""
        logger = log.bind(job_id=lease.job_id, attempt=lease.attempt, fence=lease.fence)
        logger.info("job claimed")
        try:
            self._attempt(lease)
        except LeaseLost:
            logger.warning("lease lost: somebody else holds the job now")
        else:
            logger.info("attempt ended")
        self.sweep()

    def _attempt(self, lease: Lease) -> None:
        """Work under the lease and write how that ended."""
        progress = Progress(self._claims, lease)
        with Watch(self._settings, self._claims, lease, progress, self._draining) as watch:
            try:
                result, adapter = self._work(lease, progress, watch)
            except Interrupted:
                progress.flush()
                self._yield_to(watch.stop, lease)
            except TrainerDied as death:
                progress.flush()
                self._claims.lose(lease, death.reason, str(death))
            except (SQLAlchemyError, LeaseLost):
                raise  # nothing can be written now; the lease will run out
            except Exception as error:
                progress.flush()
                failure = as_told(error, unforeseen=UNFORESEEN)
                if failure is UNFORESEEN:
                    log.error("attempt failed", job_id=lease.job_id, exc_info=error)
                self._claims.fail(lease, Reason(failure.reason), failure.message, failure.hint)
            else:
                progress.flush()
                self._claims.succeed(lease, result=result, adapter=adapter)

    def _work(
        self, lease: Lease, progress: Progress, watch: Watch
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        folder = self._folder(lease)
        folder.mkdir(parents=True, exist_ok=True)

        def download(name: str, revision: str | None) -> Path:
            what = "description" if lease.spec["dry_run"] else "all"
            found = self._run("download", folder, progress, watch, name, revision or "", what)
            return Path(found["path"])

        self._fetcher.fetch(folder, lease.job_id, dict(lease.spec), download)
        result = self._run("train", folder, progress, watch)
        if lease.spec["dry_run"]:
            return result, None
        progress.phase(Phase.PUBLISHING)
        self._run("verify", folder, progress, watch)
        manifest = publish(self._store, lease.job_id, folder, result)
        return manifest["result"], manifest["adapter"]

    def _run(
        self, task: Task, folder: Path, progress: Progress, watch: Watch, *arguments: str
    ) -> dict[str, Any]:
        """Run one trainer process to its end and return the result that it reported."""
        if watch.stop:
            raise Interrupted
        oom_kills = out_of_memory_kills()
        result = failure = None
        with TrainerProcess(task, folder, *arguments) as trainer, watch.over(trainer):
            for message in trainer.messages():
                match message["kind"]:
                    case "result":
                        result = message["result"]
                    case "failed":
                        failure = message
                    case _:
                        progress.take(message)
            code = trainer.wait()
        if failure:
            raise ReportedFailure(failure)
        if code == 0 and result is not None:
            return dict(result)
        if watch.stop:
            raise Interrupted
        starved = code == -signal.SIGKILL and out_of_memory_kills() > oom_kills
        raise TrainerDied(code, Reason.HOST_OUT_OF_MEMORY if starved else Reason.WORKER_LOST)

    def _yield_to(self, stop: Stop | None, lease: Lease) -> None:
        """Do what was wished for."""
        match stop:
            case Stop.CANCEL:
                self._claims.cancel(lease)
            case Stop.MAX_RUNTIME:
                limit = lease.spec["resources"]["max_runtime"]
                self._claims.fail(
                    lease,
                    Reason.MAX_RUNTIME,
                    f"The job ran for more than {limit} seconds.",
                    "Raise resources.max_runtime, or train for fewer steps.",
                )
            case Stop.DRAIN:
                self._claims.release(lease, "The worker stops; the job goes on from a checkpoint.")
            case _:
                raise LeaseLost(lease.job_id)

    def _folder(self, lease: Lease) -> Path:
        return self._settings.work_dir / lease.job_id

    def sweep(self) -> None:
        """Clear what jobs have left that were over before anybody could."""
        folders = [path for path in self._settings.work_dir.glob("*/*") if path.is_dir()]
        over = self._claims.over({path.parent.name for path in folders})
        for job_id, reason in over.items():
            clear(self._settings.work_dir / job_id, reason)


def clear(folder: Path, reason: str | None) -> None:
    """Of a job that is over only the description and the log stay on the worker.

    Where the loss has diverged the last checkpoints stay too: they are from before that.
    """
    kept = {JOB_FILE, LOG_FILE} | ({CHECKPOINTS} if reason == Reason.LOSS_DIVERGED else set())
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
