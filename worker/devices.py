"""What a worker can train on: one slot for each device, or for some that work together."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import takewhile

from app.devices import CPU, joined, parts


def slots(configured: Sequence[str]) -> list[str]:
    """The devices of each slot: as configured, or each GPU that is to be seen, or one CPU."""
    return list(configured) or gpus() or [CPU]


def one_slot(configured: Sequence[str]) -> str | None:
    """All devices together, for a worker that runs one job at a time.

    None where there is no choice to make: the trainer takes the GPU that it finds, or the CPU.
    """
    found = [part for slot in configured for part in parts(slot)] or gpus()
    if len(found) < 2 and not configured:
        return None
    return joined([part for part in found if part != CPU] or found)


def first_of(device: str, number: int) -> str:
    """So many of a slot's devices: what a job that needs no more gets to see."""
    return joined(parts(device)[:number])


def visible(device: str) -> str:
    """``CUDA_VISIBLE_DEVICES`` for a process that is to see these devices alone."""
    return ",".join(part for part in parts(device) if part != CPU)


def _is_device(name: str) -> bool:
    """CUDA sees no more of a list from the first entry on that names none."""
    return name.isdecimal() or name.startswith(("GPU-", "MIG-"))


def gpus() -> list[str]:
    """Numbers or ids as ``CUDA_VISIBLE_DEVICES`` takes them. Asks the driver, not torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return list(takewhile(_is_device, (part.strip() for part in visible.split(","))))
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        listed = subprocess.run(  # noqa: S603 - as the driver has installed it
            [command, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):  # installed, and no driver answers
        return []
    return listed.stdout.split()
