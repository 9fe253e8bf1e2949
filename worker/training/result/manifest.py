"""``training_manifest.json``: all that the adapter was made from, and the hash of each file."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from worker.training.files import sha256_of
from worker.training.state import State

MANIFEST = "training_manifest.json"
PACKAGES = (
    "bitsandbytes", "flatlora", "flatlora-service", "liger-kernel", "peft", "safetensors",
    "tokenizers", "torch", "transformers", "triton",
)  # fmt: skip
# Of the preflight report: what the rows are. Not what they say, nor how fast a machine reads them.
REPORTED = ("format", "rows", "tokens", "length", "steps", "tokens_per_step", "validation")


def versions() -> dict[str, str]:
    """Python's, and those of the packages that are there and decide what the adapter is."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]  # not which build of torch
        except PackageNotFoundError:
            continue
    return found


def write_manifest(
    folder: Path,
    inputs: Mapping[str, Any],
    result: Mapping[str, Any],
    state: State,
    report: Mapping[str, Any],
) -> None:
    """Write the manifest of a folder whose other files are all there.

    Args:
        folder: The adapter's.
        inputs: Hashes of all that went in, and the settings.
        result: What the job reports.
        state: Gives the history of losses.
        report: The preflight report; what tells of the machine or quotes rows is left out.
    """
    manifest = {
        **inputs,
        "data": _about_rows(report),
        "result": result,
        "held_out": state.held_out,
        "train_loss": state.losses,
        "versions": versions(),
        "files": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _about_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: report[name] for name in REPORTED if name in report}
    if validation := found.get("validation"):
        found["validation"] = {name: validation[name] for name in validation if name != "bad_rows"}
    return found
