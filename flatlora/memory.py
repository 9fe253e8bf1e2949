"""Choose between keeping noisy copies and making each noisy weight when it is used."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from flatlora.config import Memory
from flatlora.parallel import is_sharded
from flatlora.targets import Target

MemoryMode = Literal["resident", "streamed"]

# The rest of the free memory is in pieces that are too small, or soon somebody else's.
_USABLE = 0.9


class MemoryChoice(NamedTuple):
    """A memory mode and the reason for it."""

    mode: MemoryMode
    reason: str


def choose_memory(targets: Sequence[Target]) -> MemoryChoice:
    """Resident if every device can hold its targets' copies beside what training needs.

    The copies may take half of the free memory, as activations and optimizer state are mostly not
    there yet when the engine is built. Where there have been steps on a GPU (the first is never
    perturbed) the copies must also fit beside the most that these have needed, with a margin.
    Streamed where the free memory is not known, or weights are sharded.

    Args:
        targets: The layers to be perturbed.

    Returns:
        The memory mode and why.
    """
    if sharded := _count_sharded(targets):
        return MemoryChoice(
            "streamed", f"{sharded} weights are sharded, and a copy would be of a whole one"
        )
    needed: Counter[torch.device] = Counter()
    for target in targets:
        stored = target.stored
        needed[stored.tensor.device] += stored.shape.numel() * stored.dtype.itemsize
    for device, size in needed.items():
        free = free_memory(device)
        if size > free // 2:
            return MemoryChoice(
                "streamed",
                f"copies of {_gib(size)} do not fit in half of the {_gib(free)} free on {device}",
            )
        peak = past_peak(device)
        if size + peak > free * _USABLE:
            return MemoryChoice(
                "streamed",
                f"copies of {_gib(size)} do not fit in the {_gib(free)} free on {device} beside "
                f"the {_gib(peak)} that training has needed at its peak",
            )
    sizes = ", ".join(f"{_gib(size)} on {device}" for device, size in needed.items())
    return MemoryChoice("resident", f"copies of {sizes} fit in half of the free memory")


def check_memory(memory: Memory, targets: Sequence[Target]) -> None:
    """Check that a mode that was asked for can be had.

    Raises:
        ValueError: If resident copies were asked for, and weights are sharded.
    """
    if memory == "resident" and (sharded := _count_sharded(targets)):
        raise ValueError(
            f"memory is 'resident', but {sharded} of {len(targets)} targets have a sharded weight: "
            "every rank would keep whole copies of what sharding divides; "
            "set memory to 'streamed' or 'auto'"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a device could still give to tensors; ``0`` if that is not known.

    On a GPU what torch has reserved but does not use counts as free. On the CPU it is the free
    physical memory of the machine; a container's own limit is not looked up.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:  # Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def past_peak(device: torch.device) -> int:
    """Bytes that were once allocated beyond what is now; ``0`` if that is not known."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


def _count_sharded(targets: Sequence[Target]) -> int:
    # a weight in a unit is whole at times, as after an evaluation
    return sum(bool(target.units) or is_sharded(target.weight) for target in targets)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
