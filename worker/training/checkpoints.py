"""Checkpoints that are whole or not there, and from which a run goes on bit for bit.

    checkpoints/ckpt-000000020/
        adapter.safetensors      the adapter's weights, float32
        optimizer.safetensors    AdamW's moments
        best.safetensors         weights of the best evaluation so far, if that is to be kept
        state.json               step, counters, evaluations, plan; what the checkpoint belongs to
        manifest.json            SHA-256 of each file above

Each file is written and synced in a temporary folder, the manifest last; then the folder is renamed
and its parent synced. A reader takes the newest folder whose files have the hashes of its manifest.
Nothing is pickled: safetensors and JSON only. No generator's state is kept: what a step draws is a
function of its number.
"""

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.failpoints import Point, failpoint
from worker.training.files import sha256_of, sync
from worker.training.plan import Plan
from worker.training.reporter import Reporter
from worker.training.state import Run, State

KEPT = 2
MANIFEST = "manifest.json"
ADAPTER, OPTIMIZER, BEST, STATE = (
    "adapter.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole and belongs to this run.

    Attributes:
        folder: Where its files are.
        step: Optimizer steps done.
        plan: How they were computed; those after it must be too.
    """

    folder: Path
    step: int
    plan: Plan

    def load(self, run: Run) -> State:
        """Put adapter and moments into the run, and return the state that belongs to them."""
        _load_weights(load_file(self.folder / ADAPTER), load_file(self.folder / OPTIMIZER), run)
        values: dict[str, Any] = json.loads((self.folder / STATE).read_text())
        best = self.folder / BEST
        kept = {field.name for field in fields(State)} & values.keys()
        return State(
            **{name: values[name] for name in kept},
            best_adapter=load_file(best) if best.exists() else {},
        )


class Checkpoints:
    """The checkpoints of one job.

    Args:
        folder: Where they lie.
        identity: Hash of all that determines the run. A checkpoint of another run is not used.
        reporter: Hears of checkpoints that are written, resumed from, or damaged.
    """

    def __init__(self, folder: Path, identity: str, reporter: Reporter) -> None:
        self._folder = folder
        self.identity = identity
        self._reporter = reporter

    def save(self, run: Run, state: State) -> None:
        """Write a checkpoint of the current state, then forget all but the newest two.

        All ranks have the same state, and the first writes it.
        """
        if run.ranks.is_first:
            self._write(run, state)
        run.ranks.wait()

    def _write(self, run: Run, state: State) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / f"ckpt-{state.step:09d}"
        partial = self._folder / f"{final.name}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(_adapter(run), partial / ADAPTER)
        save_file(_moments(run), partial / OPTIMIZER)
        if state.best_adapter:
            save_file(state.best_adapter, partial / BEST)
        values = {field.name: getattr(state, field.name) for field in fields(State)}
        del values["best_adapter"]
        described = {"identity": self.identity, "plan": run.plan.to_json(), **values}
        _write_json(partial / STATE, described)
        hashes = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        _write_json(partial / MANIFEST, hashes)
        for path in (*partial.iterdir(), partial):
            sync(path)
        failpoint(Point.CHECKPOINT_FILES_WRITTEN)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self._folder)
        failpoint(Point.CHECKPOINT_RENAMED)
        is_verified = all(sha256_of(final / name) == value for name, value in hashes.items())
        if is_verified:  # else the one before it is the newest that can be trusted
            for old in self._complete()[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        for torn in self._folder.glob("*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
        self._reporter.event(
            "job.checkpoint",
            f"Checkpoint after step {state.step}.",
            step=state.step,
            size=sum(path.stat().st_size for path in final.iterdir()),
            verified=is_verified,
            kept=[int(path.name.removeprefix("ckpt-")) for path in self._complete()],
        )

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint of this run; newer ones are told of, and removed.

        They would stand in the way of those that this run is going to write.
        """
        for folder in self._complete():
            found = self._look_at(folder)
            if isinstance(found, Checkpoint):
                return found
            problem = found.text
            self._reporter.event(
                "job.checkpoint_refused",
                f"{folder.name} was not used: {problem}.",
                checkpoint=folder.name,
            )
            if not found.is_passing:
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def _complete(self) -> list[Path]:
        """Folders under their final names, newest first."""
        if not self._folder.exists():
            return []
        return sorted(
            (path for path in self._folder.glob("ckpt-*") if path.suffix != ".tmp"),
            reverse=True,
        )

    def _look_at(self, folder: Path) -> "Checkpoint | _Problem":
        try:
            hashes: dict[str, str] = json.loads((folder / MANIFEST).read_text())
            for name, expected in hashes.items():
                if sha256_of(folder / name) != expected:
                    return _Problem(f"{name} is damaged")
            values = json.loads((folder / STATE).read_text())
            identity = values["identity"]
            checkpoint = Checkpoint(folder, values["step"], Plan(**values["plan"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            # a disk or a network that is away for a moment has damaged nothing
            is_passing = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            return _Problem(f"it cannot be read ({type(error).__name__})", is_passing)
        if identity == self.identity:
            return checkpoint
        return _Problem("it belongs to other settings or inputs, or to another kind of machine")


class _Problem(NamedTuple):
    """Why a checkpoint is not used, and whether it may be used another time."""

    text: str
    is_passing: bool = False


def _adapter(run: Run) -> dict[str, Tensor]:
    return {name: weight.detach().contiguous() for name, weight in run.adapter.items()}


def _moments(run: Run) -> dict[str, Tensor]:
    """AdamW's state by parameter name; empty until a step was good."""
    found = {}
    for name, parameter in run.adapter.items():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value.detach().contiguous()
    return found


@torch.no_grad()
def _load_weights(weights: dict[str, Tensor], moments: dict[str, Tensor], run: Run) -> None:
    run.optimizer.state.clear()
    adapter = run.adapter
    for name, parameter in adapter.items():
        parameter.copy_(weights[name])
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        # AdamW keeps its step counter on the CPU unless it is fused
        stays = moment == "step" and not _is_fused(run)
        run.optimizer.state[adapter[name]][moment] = value if stays else value.to(run.device)


def _is_fused(run: Run) -> bool:
    return bool(run.optimizer.defaults.get("fused"))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True))
