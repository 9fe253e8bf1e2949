"""Choose between keeping noisy copies and making each noisy weight when it is used."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from flatlora.targets import Target

MemoryMode = Literal["resident", "streamed"]


def choose_memory(targets: Sequence[Target]) -> MemoryMode:
    """Resident if every device can hold its targets' copies in half of its free memory.

    The other half is left to activations and optimizer state, which are mostly not there yet when
    the engine is built. Streamed where the free memory is not known.

    Args:
        targets: The layers to be perturbed.

    Returns:
        The memory mode.
    """
    needed: Counter[torch.device] = Counter()
    for target in targets:
        needed[target.weight.device] += target.weight.nbytes
    fits = all(size <= free_memory(device) // 2 for device, size in needed.items())
    return "resident" if fits else "streamed"


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
