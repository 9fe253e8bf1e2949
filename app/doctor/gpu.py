"""Torch, the driver and the GPUs, and whether they fit each other.

Torch is asked in a process of its own: the API never imports it, and a broken CUDA may end one.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from app.devices import CPU, parts
from app.doctor.finding import Check, Finding, fail, gib, ok, warn
from app.settings import Settings

PATIENCE_SECONDS = 50  # torch is a gigabyte, and a cold disk is slow
DRIVER_SECONDS = 5
QUERY = "--query-gpu=name,driver_version,memory.total"
ASK_TORCH = """
import json, torch
gpus = []
for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    gpu = {"name": torch.cuda.get_device_name(index)}
    try:
        gpu["memory"] = torch.cuda.mem_get_info(index)
        assert torch.ones(8, device=index).sum().item() == 8
    except Exception as error:
        gpu["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    gpus.append(gpu)
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}))
"""


@dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None
    gpus: list[dict[str, Any]]
    complaint: str
    """What CUDA has written to standard error, such as that the driver is too old."""


def gpu(settings: Settings) -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield _without_torch(settings)
        return
    torch, seen = _ask_torch(), _ask_driver()
    if isinstance(torch, str):
        mend = "Install torch again: pip install --force-reinstall torch"
        yield fail("torch", torch, "a torch that can be imported", mend)
        return
    built = f"CUDA {torch.cuda}" if torch.cuda else "the CPU alone"
    yield ok("torch", f"{torch.version}, built for {built}")
    yield from _judge(settings, torch, seen)


def _without_torch(settings: Settings) -> Finding:
    if settings.is_cluster:
        return ok("torch", "none here: this machine can serve the API, and trains nothing")
    mend = "pip install flatlora-service[worker], or run `flatlora api` and train elsewhere."
    return fail("torch", "none here, so `flatlora up` cannot train", "torch", mend)


def _ask_torch() -> Torch | str:
    """What it sees, or what went wrong."""
    command = [sys.executable, "-P", "-c", ASK_TORCH]
    try:
        done = subprocess.run(  # noqa: S603 - our own text
            command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer of torch within {PATIENCE_SECONDS} s"
    errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        return errors[-1][:300] if errors else f"a process with torch ended with {done.returncode}"
    found = json.loads(done.stdout.splitlines()[-1])
    complaints = [line for line in errors if "cuda" in line.lower() or "driver" in line.lower()]
    return Torch(
        found["torch"], found["cuda"], found["gpus"], complaints[0][:300] if complaints else ""
    )


def _ask_driver() -> list[str]:
    """The GPUs that the driver knows, as it describes them."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run(  # noqa: S603 - as the driver has installed it
            [command, QUERY, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=DRIVER_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):  # installed, and no driver answers
        return []
    return done.stdout.strip().splitlines()


def _judge(settings: Settings, torch: Torch, seen: list[str]) -> Iterator[Finding]:
    wanted = [part for slot in settings.devices for part in parts(slot) if part != CPU]
    expected = f"the GPUs of FLATLORA_DEVICES: {', '.join(wanted)}" if wanted else ""
    if not torch.gpus:
        yield _on_the_cpu(torch, seen, expected, is_wanted=bool(wanted))
        return
    for index, each in enumerate(torch.gpus):
        yield _judge_one(index, each, seen)
    missing = [name for name in wanted if name.isdecimal() and int(name) >= len(torch.gpus)]
    if missing:
        mend = "Correct FLATLORA_DEVICES: GPUs are counted from 0."
        found = f"torch sees {len(torch.gpus)}, so there is no {', '.join(missing)}"
        yield fail("gpu", found, expected, mend)


def _on_the_cpu(torch: Torch, seen: list[str], expected: str, *, is_wanted: bool) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen and hidden is None:
        why = torch.complaint or f"torch {torch.version} cannot use it"
        found = f"{seen[0]} is here, but {why}; jobs train on the CPU"
        mend = "Install a torch built for a CUDA that this driver knows, or a newer driver."
        return warn("gpu", found, expected or "a torch that uses the GPU", mend)
    if is_wanted:
        found = "no GPU is to be seen; jobs train on the CPU"
        mend = "Check the driver with nvidia-smi, the container's --gpus, CUDA_VISIBLE_DEVICES."
        return warn("gpu", found, expected, mend)
    return ok("gpu", "none: jobs train on the CPU")


def _judge_one(index: int, found: dict[str, Any], seen: list[str]) -> Finding:
    name = f"gpu {index}"
    if error := found.get("error"):
        mend = "Install a torch whose CUDA fits this GPU and its driver; see who else uses it."
        return fail(name, f"{found['name']}: {error}", "a GPU that computes", mend)
    free, total = found["memory"]
    driver = f", driver {seen[0].split(',')[1].strip()}" if seen else ""
    return ok(name, f"{found['name']}{driver}, {gib(free)} of {gib(total)} free")


GPU = Check(
    "torch",
    gpu,
    "a torch that can be imported",
    "See what `python -c 'import torch; print(torch.cuda.is_available())'` says.",
    seconds=PATIENCE_SECONDS + 2 * DRIVER_SECONDS,
)
