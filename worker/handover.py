"""Checkpoints on their way to the store, so that a worker on another machine can go on from them.

Only the newest matters: while one is uploaded, those in between are passed over. The row points at
what is complete in the store, by a fenced write; an attempt that has lost its lease points nowhere.
"""

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog

from app.failpoints import Point, failpoint
from app.storage import ArtifactStore
from worker.claims import Claims
from worker.inputs import CHECKPOINTS
from worker.lease import Lease, LeaseLost

log = structlog.get_logger()


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"ckpt-{step:09d}"


def newest_step(folder: Path) -> int:
    """Of the checkpoints that this machine has; 0 for none."""
    steps = [path.name.removeprefix("ckpt-") for path in (folder / CHECKPOINTS).glob("ckpt-*")]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def restore(store: ArtifactStore, lease: Lease, folder: Path) -> None:
    """Bring the checkpoint of another machine here, unless a newer one is here already."""
    checkpoint = lease.checkpoint
    if checkpoint is None or checkpoint["step"] <= newest_step(folder):
        return
    store.fetch_checkpoint(lease.job_id, checkpoint, checkpoint_folder(folder, checkpoint["step"]))


@contextmanager
def _kept(checkpoint: Path, folder: Path) -> Iterator[Path]:
    """The same files under other names: the trainer forgets its older checkpoints meanwhile."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        for path in checkpoint.iterdir():
            os.link(path, folder / path.name)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Handover:
    """Uploads what it is told of, in a thread, while the block lasts."""

    def __init__(self, claims: Claims, store: ArtifactStore, lease: Lease, folder: Path) -> None:
        self._claims = claims
        self._store = store
        self._lease = lease
        self._folder = folder
        self._step = 0
        self._done = 0
        self._is_over = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="handover", daemon=True)

    def __enter__(self) -> "Handover":
        self._thread.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join(1)  # an upload may last, and its thread is a daemon

    def take(self, step: int) -> None:
        """There is a checkpoint after this step."""
        with self._changed:
            self._step = max(self._step, step)
            self._changed.notify_all()

    def finish(self, seconds: float) -> bool:
        """Wait until the newest one is in the store: the job is about to go elsewhere.

        Returns:
            Whether there is nothing left to wait for.
        """
        self.take(newest_step(self._folder))
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_over or self._done >= self._step, seconds
            )

    def _run(self) -> None:
        try:
            self._hand_over()
        finally:  # whoever waits for it waits no longer
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _hand_over(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._step > self._done)
                if self._is_over:
                    return
                step = self._step
            try:
                self._upload(step)
            except LeaseLost:
                return
            except Exception as error:
                # The next one will do; and without any the job begins anew elsewhere.
                log.warning(
                    "checkpoint not handed over",
                    job_id=self._lease.job_id,
                    step=step,
                    exc_info=error,
                )
            with self._changed:
                self._done = step
                self._changed.notify_all()

    def _upload(self, step: int) -> None:
        lease = self._lease
        failpoint(Point.HANDOVER_BEFORE_UPLOAD)
        with _kept(checkpoint_folder(self._folder, step), self._folder / "handover") as folder:
            files = self._store.put_checkpoint(lease.job_id, lease.fence, step, folder)
        checkpoint: Mapping[str, Any] = {"fence": lease.fence, "step": step, "files": files}
        self._claims.hand_over(lease, checkpoint)
        self._store.forget_checkpoints(lease.job_id, fence=lease.fence, keep_step=step)
