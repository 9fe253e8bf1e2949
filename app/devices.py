"""The devices of a slot, as settings and workers' rows write them: ``0``, ``0+1``, ``cpu+cpu``."""

from collections.abc import Sequence

CPU = "cpu"


def parts(device: str) -> list[str]:
    """What the processes of a slot run on, one each."""
    return device.split("+")


def count(device: str | None) -> int:
    """Processes that a slot has room for; one, where there was no choice to make."""
    return len(parts(device)) if device else 1


def joined(devices: Sequence[str]) -> str:
    return "+".join(devices)


def check_slot(device: str) -> None:
    """Raises ValueError where no job could run on all of it."""
    found = parts(device)
    if not all(found):
        raise ValueError(f"expected names joined by +, such as 0+1; found {device!r}")
    gpus = [part for part in found if part != CPU]
    if gpus and len(gpus) < len(found):
        raise ValueError(f"a slot has GPUs or CPUs, not both; found {device!r}")
    if len(set(gpus)) < len(gpus):
        raise ValueError(f"a slot has a GPU once; found {device!r}")
