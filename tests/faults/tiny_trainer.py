"""A trainer of milliseconds in place of ``worker.trainer``: no torch, and every byte foretold.

    FLATLORA_TRAINER_MODULE=tests.faults.tiny_trainer

It is the real trainer's process (arguments, pipe, signals, exit codes, errors) with another inside.
What it "learns" is a chain of hashes over the dataset, the seed, sigma and the step, so a step that
is left out, done twice or done on other rows shows in the adapter's bytes. Every step goes into the
file FLATLORA_EXECUTION_LOG before it is reported.

Labels of the job say how it behaves:

    step_ms: "20"       how long a step takes (default 5)
    crash_at: "7"       dies of SIGSEGV before step 7
    full_at: "7"        finds the disk full before step 7
    memory_at: "7"      finds the GPU's memory too small before step 7
    stall_at: "7"       says nothing more before step 7, and hears nothing
    deaf: "1"           does not stop when it is told to
    real: "1"           is worker.trainer

``crash_at: "7 first"``, and so on: only under the job's first fence.
"""

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.failpoints import Point, failpoint
from tests.faults.twin import (
    WIDTH,
    adapter_files,
    first_state,
    hash_of,
    next_state,
    total_steps,
    weights,
)
from worker import trainer
from worker.inputs import CHECKPOINTS, JOB_FILE, read_job
from worker.pipe import PipeReporter
from worker.training.config import TrainingJob
from worker.training.errors import OutOfGpuMemory, PublishFailed, Stopped
from worker.training.files import sha256_of, sync
from worker.training.reporter import Control, Reporter, Wish

LOG_VARIABLE = "FLATLORA_EXECUTION_LOG"
KEPT = 2
MANIFEST = "manifest.json"

Json = dict[str, Any]


class ExecutionLog:
    """One line for each thing done, by all attempts on all machines, in the order of the doing."""

    def __init__(self, job_id: str) -> None:
        self._path = os.environ.get(LOG_VARIABLE)
        fence = int(os.environ.get("FLATLORA_FENCE", "0"))
        self.is_first = fence <= 1
        self._same = {
            "job": job_id,
            "fence": fence,
            "attempt": int(os.environ.get("FLATLORA_ATTEMPT", "0")),
            "pid": os.getpid(),
            "host": platform.node(),
        }

    def write(self, event: str, step: int, state: str, **more: Any) -> None:
        if not self._path:
            return
        entry = {**self._same, "event": event, "step": step, "hash": state, **more}
        line = json.dumps({**entry, "at": time.time()}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())  # one write: lines of others do not come between
        finally:
            os.close(descriptor)


@dataclass
class State:
    step: int
    hash: str
    held_out: list[Json] = field(default_factory=list)


class Checkpoints:
    """The folders of ``worker.training.checkpoints``, with other things in them."""

    def __init__(self, folder: Path, identity: str, reporter: Reporter, log: ExecutionLog) -> None:
        self._folder = folder
        self._identity = identity
        self._reporter = reporter
        self._log = log

    def save(self, state: State) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / f"ckpt-{state.step:09d}"
        partial = self._folder / f"{final.name}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        (partial / "adapter.safetensors").write_bytes(weights(state.hash, 1))
        (partial / "optimizer.safetensors").write_bytes(bytes.fromhex(state.hash) * 8)
        values = {"identity": self._identity, **asdict(state)}
        (partial / "state.json").write_text(json.dumps(values, sort_keys=True))
        hashes = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(hashes, sort_keys=True))
        for path in (*partial.iterdir(), partial):
            sync(path)
        failpoint(Point.CHECKPOINT_FILES_WRITTEN)
        # Before the rename: from then on somebody may resume from it.
        self._log.write("checkpoint", state.step, state.hash)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self._folder)
        failpoint(Point.CHECKPOINT_RENAMED)
        for old in self._complete()[KEPT:]:
            shutil.rmtree(old)
        is_verified = self._problem_of(final) is None
        self._reporter.event(
            "job.checkpoint",
            f"Checkpoint after step {state.step}.",
            step=state.step,
            size=sum(path.stat().st_size for path in final.iterdir()),
            verified=is_verified,
            kept=[int(path.name.removeprefix("ckpt-")) for path in self._complete()],
        )

    def restore(self) -> State | None:
        """The newest whole one."""
        for folder in self._complete():
            if problem := self._problem_of(folder):
                self._reporter.event(
                    "job.checkpoint_refused",
                    f"{folder.name} was not used: {problem}.",
                    checkpoint=folder.name,
                )
                continue
            values = json.loads((folder / "state.json").read_text())
            state = State(values["step"], values["hash"], values["held_out"])
            self._log.write("resume", state.step, state.hash)
            self._reporter.event(
                "job.resumed", f"Resumed after step {state.step}.", step=state.step
            )
            return state
        return None

    def _complete(self) -> list[Path]:
        folders = self._folder.glob("ckpt-*")
        return sorted((path for path in folders if path.suffix != ".tmp"), reverse=True)

    def _problem_of(self, folder: Path) -> str | None:
        try:
            hashes: dict[str, str] = json.loads((folder / MANIFEST).read_text())
            for name, expected in hashes.items():
                if sha256_of(folder / name) != expected:
                    return f"{name} is damaged"
            identity = json.loads((folder / "state.json").read_text())["identity"]
        except (OSError, ValueError, KeyError) as error:
            return f"it cannot be read ({type(error).__name__})"
        return None if identity == self._identity else "it belongs to other settings or inputs"


class Run:
    """One execution of a job."""

    def __init__(self, job: TrainingJob, labels: Mapping[str, str], folder: Path) -> None:
        self._job = job
        self._labels = labels
        self._folder = folder
        self._log = ExecutionLog(job.job_id)
        self._total = total_steps(asdict(job.training))

    def run(self, reporter: Reporter, control: Control) -> Json:
        job = self._job
        reporter.phase("validating")
        rows = job.dataset.path.read_bytes().count(b"\n")
        dataset = sha256_of(job.dataset.path)  # of what it finds, whatever it was told
        reporter.preflight(self._report(rows))
        if job.dry_run:
            return {"dry_run": True}
        reporter.phase("loading")
        begin = first_state(dataset, job.seed, job.sigma)
        self._log.write("start", 0, begin)
        checkpoints = Checkpoints(
            self._folder / CHECKPOINTS, hash_of(f"{begin} {job.lora.rank}"), reporter, self._log
        )
        state = checkpoints.restore() or State(0, begin)
        reporter.phase("training")
        try:
            self._train(state, checkpoints, reporter, control)
        except Stopped as stopped:
            self._log.write("end", state.step, state.hash, how=stopped.wish)
            raise
        self._log.write("end", state.step, state.hash, how="done")
        self._save(state)
        return self._result(state, rows)

    def _train(
        self, state: State, checkpoints: Checkpoints, reporter: Reporter, control: Control
    ) -> None:
        settings, total = self._job.training, self._total
        evaluate_every = self._job.evaluation.every_steps or max(20, math.ceil(total / 4))
        checkpoint_every = settings.checkpoint_steps or max(10, math.ceil(total / 10))
        if not state.held_out:
            self._evaluate(state, reporter)
        while state.step < total:
            if wish := control.wish():
                if wish == "drain":
                    checkpoints.save(state)
                raise Stopped(wish)
            self._misbehave(state.step + 1)
            seconds = float(self._labels.get("step_ms", "5")) / 1000
            time.sleep(seconds)
            state.step += 1
            state.hash = next_state(state.hash, state.step)
            self._log.write("step", state.step, state.hash)
            reporter.step(state.step, total, self._metrics(state, seconds))
            is_last = state.step == total
            if is_last or state.step % evaluate_every == 0:
                self._evaluate(state, reporter)
            if is_last or state.step % checkpoint_every == 0:
                checkpoints.save(state)

    def _misbehave(self, step: int) -> None:
        if self._is_at("crash_at", step):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._is_at("full_at", step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._is_at("memory_at", step):
            raise OutOfGpuMemory("The GPU's memory did not suffice.", "Take a larger one.")
        while self._is_at("stall_at", step):
            time.sleep(3600)

    def _is_at(self, label: str, step: int) -> bool:
        place, _, when = self._labels.get(label, "").partition(" ")
        return place == str(step) and (when != "first" or self._log.is_first)

    def _metrics(self, state: State, seconds: float) -> Json:
        return {
            "loss": _loss(state),
            "learning_rate": self._job.training.learning_rate,
            "sigma": self._job.sigma * state.step / self._total,
            "grad_norm": 1.0,
            "tokens_per_second": 1000.0,
            "eta_seconds": round(seconds * (self._total - state.step), 1),
        }

    def _evaluate(self, state: State, reporter: Reporter) -> None:
        reporter.phase("evaluating")
        found = {"loss": _loss(state), "accuracy": round(state.step / self._total, 4)}
        state.held_out.append({"step": state.step, **found})
        reporter.held_out(state.step, found)
        reporter.phase("training")

    def _save(self, state: State) -> None:
        folder = self._folder / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in self.files(state.hash).items():
            (folder / name).write_bytes(content)
        (self._folder / "probe.json").write_text(json.dumps({"state": state.hash}))

    def files(self, state: str) -> dict[str, bytes]:
        job = self._job
        return adapter_files(state, rank=job.lora.rank, base_model=job.base_model.name)

    def _report(self, rows: int) -> Json:
        return {
            "format": {"name": "chat", "file": "jsonl", "compression": None},
            "rows": {
                "read": rows, "used": rows, "held_out": 1, "bad": 0, "truncated": 0,
                "dropped_without_targets": 0, "duplicates": 0,
            },
            "bad_rows": [],
            "tokens": {"all": 100 * rows, "in_loss": 50 * rows},
            "length": {"p50": 100, "p90": 100, "p99": 100, "max": 100, "limit": 1024},
            "steps": self._total,
            "tokens_per_step": 100 * self._job.training.batch_size,
            "first_example": [],
            "warnings": [],
        }  # fmt: skip

    def _result(self, state: State, rows: int) -> Json:
        first, last = state.held_out[0], state.held_out[-1]
        trainable = 2 * WIDTH * self._job.lora.rank
        return {
            "held_out": {
                "rows": 1,
                "tokens": 50,
                "dtype": "float32",
                "before": {name: first[name] for name in ("loss", "accuracy")},
                "after": {name: last[name] for name in ("loss", "accuracy")},
            },
            "steps": state.step,
            "epochs": round(state.step * self._job.training.batch_size / max(1, rows), 4),
            "train_tokens": 100 * self._job.training.batch_size * state.step,
            "sigma": self._job.sigma,
            "perturbed_layers": 1,
            "trainable_parameters": trainable,
            "parameters": WIDTH * WIDTH,
            "precision": "float32",
        }


def _loss(state: State) -> float:
    return round(4 / (1 + state.step / 10) + int(state.hash[:2], 16) / 1000, 6)


class Deaf:
    """A ``Control`` that hears no wish."""

    def wish(self) -> Wish | None:
        return None


def _labels(folder: Path) -> dict[str, str]:
    labels: dict[str, str] = json.loads((folder / JOB_FILE).read_text())["spec"]["labels"]
    return labels


def _download(
    folder: Path, reporter: PipeReporter, _control: Control, name: str, revision: str, *_rest: str
) -> None:
    """A folder named by a commit, which depends on what was asked for alone."""
    commit = hashlib.sha1(f"{name} {revision}".encode(), usedforsecurity=False).hexdigest()
    path = folder / "hub" / (revision if len(revision) == len(commit) else commit)
    path.mkdir(parents=True, exist_ok=True)
    reporter.result({"path": str(path)})


def _train(folder: Path, reporter: PipeReporter, control: Control) -> None:
    labels = _labels(folder)
    heard = Deaf() if labels.get("deaf") else control
    reporter.result(Run(read_job(folder), labels, folder).run(reporter, heard))


def _verify(folder: Path, reporter: PipeReporter, _control: Control) -> None:
    job = read_job(folder)
    state = json.loads((folder / "probe.json").read_text())["state"]
    expected = Run(job, {}, folder).files(state)
    found = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    if found != expected:
        wrong = sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )
        raise PublishFailed(f"The saved adapter is not what was trained: {', '.join(wrong)}.")
    reporter.result({})


def main(arguments: Sequence[str]) -> int:
    task, folder = arguments[0], Path(arguments[1])
    if task == "download" or not _labels(folder).get("real"):
        trainer.TASKS.update(download=_download, train=_train, verify=_verify)
    return trainer.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
