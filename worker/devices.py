"""What a worker can train on: one slot for each device."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import takewhile

CPU = "cpu"


def slots(configured: Sequence[str]) -> list[str]:
    """The device of each slot: as configured, or each GPU that is to be seen, or one CPU."""
    return list(configured) or gpus() or [CPU]


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
