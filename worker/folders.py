"""The work folders of a machine's jobs: what is cleared in them, and when they go."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from app.ids import is_id
from app.jobs.states import Reason
from worker.claims import Claims
from worker.inputs import CHECKPOINTS, JOB_FILE, LOG_FILE

log = structlog.get_logger()

AT_ONCE = 500


class Folders:
    def __init__(self, claims: Claims, work_dir: Path) -> None:
        self._claims = claims
        self._work_dir = work_dir

    def sweep(self) -> None:
        """Clear what jobs have left that were over before anybody could."""
        folders = [path for path in self._work_dir.glob("*/*") if path.is_dir()]
        over = self._claims.over({path.parent.name for path in folders})
        for job_id, reason in over.items():
            clear(self._work_dir / job_id, reason)

    def forget_gone(self) -> int:
        """Remove the folders of jobs that have been deleted; how many.

        A database without a job may be the wrong one: then nothing goes that took work to make.
        """
        is_in_use, gone = self._claims.has_jobs(), 0
        for folders in self._pages():
            known = self._claims.known([folder.name for folder in folders])
            for folder in folders:
                if folder.name not in known and (is_in_use or not _holds_work(folder)):
                    shutil.rmtree(folder, ignore_errors=True)
                    gone += 1
        if gone:
            log.info("folders of deleted jobs removed", folders=gone)
        return gone

    def _pages(self) -> Iterator[list[Path]]:
        """Listed before the rows are read, which are there before the folders."""
        folders = [path for path in self._work_dir.glob("*") if is_id(path.name, "job")]
        for start in range(0, len(folders), AT_ONCE):
            yield folders[start : start + AT_ONCE]


def _holds_work(folder: Path) -> bool:
    with suppress(OSError):
        return any(path.is_dir() for path in folder.iterdir())
    return True


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
