"""Checkpoints that are whole or not there, and from which a run goes on bit for bit.

    checkpoints/ckpt-000000020/
        adapter.safetensors      the adapter's weights, float32
        optimizer.safetensors    AdamW's moments
        random.safetensors       torch's generators (dropout draws from them)
        state.json               step, counters, evaluations; what the checkpoint belongs to
        manifest.json            SHA-256 of each file above

Each file is written and synced in a temporary folder, the manifest last; then the folder is renamed
and its parent synced. A reader takes the newest folder whose files have the hashes of its manifest.
Nothing is pickled: safetensors and JSON only.
"""

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.failpoints import Point, failpoint
from worker.training.files import sha256_of, sync
from worker.training.reporter import Reporter
from worker.training.state import Run, State

KEPT = 2
MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one job.

    Args:
        folder: Where they lie.
        identity: Hash of all that determines the run. A checkpoint of another run is not used.
        reporter: Hears of checkpoints that are written, resumed from, or damaged.
    """

    def __init__(self, folder: Path, identity: str, reporter: Reporter) -> None:
        self._folder = folder
        self._identity = identity
        self._reporter = reporter

    def save(self, run: Run, state: State) -> None:
        """Write a checkpoint of the current state, then forget all but the newest two."""
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / f"ckpt-{state.step:09d}"
        partial = self._folder / f"{final.name}.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(_adapter(run), partial / "adapter.safetensors")
        save_file(_moments(run), partial / "optimizer.safetensors")
        save_file(_generators(run.device), partial / "random.safetensors")
        _write_json(partial / "state.json", {"identity": self._identity, **asdict(state)})
        hashes = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        _write_json(partial / MANIFEST, hashes)
        for path in (*partial.iterdir(), partial):
            sync(path)
        failpoint(Point.CHECKPOINT_FILES_WRITTEN)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self._folder)
        failpoint(Point.CHECKPOINT_RENAMED)
        for old in self._complete()[KEPT:]:
            shutil.rmtree(old)
        self._reporter.event(
            "job.checkpoint", f"Checkpoint after step {state.step}.", step=state.step
        )

    def restore(self, run: Run) -> State | None:
        """Put the newest whole checkpoint into the run, and return the state that belongs to it."""
        for folder in self._complete():
            if problem := self._problem_of(folder):
                self._reporter.event(
                    "job.checkpoint_refused",
                    f"{folder.name} was not used: {problem}.",
                    checkpoint=folder.name,
                )
                continue
            state = _load(folder, run)
            self._reporter.event(
                "job.resumed", f"Resumed after step {state.step}.", step=state.step
            )
            return state
        return None

    def _complete(self) -> list[Path]:
        """Folders under their final names, newest first."""
        if not self._folder.exists():
            return []
        return sorted(
            (path for path in self._folder.iterdir() if not path.name.endswith(".tmp")),
            reverse=True,
        )

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


def _adapter(run: Run) -> dict[str, Tensor]:
    return {
        name: parameter.detach().contiguous()
        for name, parameter in run.model.named_parameters()
        if parameter.requires_grad
    }


def _moments(run: Run) -> dict[str, Tensor]:
    """AdamW's state by parameter name; empty until a step was good."""
    found = {}
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value.detach().contiguous()
    return found


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _load(folder: Path, run: Run) -> State:
    weights = load_file(folder / "adapter.safetensors")
    moments = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.copy_(weights[name])
            state = {
                key.rpartition("/")[2]: value
                for key, value in moments.items()
                if key.startswith(f"{name}/")
            }
            if state:
                run.optimizer.state[parameter] = {
                    # AdamW keeps its step counter on the CPU unless it is fused
                    key: value if key == "step" and not _is_fused(run) else value.to(run.device)
                    for key, value in state.items()
                }
    generators = load_file(folder / "random.safetensors")
    torch.set_rng_state(generators["cpu"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"], run.device)
    values: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return State(**{field.name: values[field.name] for field in fields(State)})


def _is_fused(run: Run) -> bool:
    return bool(run.optimizer.defaults.get("fused"))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True))
