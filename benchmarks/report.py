"""What every benchmark says beside its numbers: on which machine, with which versions, when."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flatlora import ops

NO_KERNELS = "no kernels here"


class Disagreement(Exception):
    """Two ways to compute one thing differ, so neither is faster than the other."""


def machine(device: torch.device) -> dict[str, str]:
    """Command, device, versions and date; a number without them cannot be measured again."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": _commit(),
        "kernels": kernels(device),
        "device": _device_name(device),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "peft")},
        "cuda": torch.version.cuda or "none",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def headline(device: torch.device) -> str:
    facts = machine(device)
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton")]
    return ", ".join([facts["device"], *versions, facts["kernels"], facts["date"]])


def kernels(device: torch.device) -> str:
    """Whether the library's kernels compute there, in words."""
    serve = ops.kernels_serve(torch.empty(0, dtype=torch.bfloat16, device=device))
    return "kernels" if serve else NO_KERNELS


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; the first column names the row."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    # a log file has no width: 80 columns would cut the numbers off
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(table)


def write(path: Path | None, benchmark: str, device: torch.device, results: Any) -> None:
    """Keep the results with the machine they were measured on."""
    if path is not None:
        record = {"benchmark": benchmark, "machine": machine(device), "results": results}
        path.write_text(json.dumps(record, indent=2) + "\n")


def refuse(reason: Disagreement) -> int:
    """Say why there is no ratio; the exit status."""
    sys.stderr.write(f"no ratio: the outputs disagree: {reason}\n")
    return 1


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


def _commit() -> str:
    """The commit of this folder, marked where files differ from it; "none" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        found = subprocess.run(  # noqa: S603  # a constant command
            command, cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return found.stdout.strip()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
