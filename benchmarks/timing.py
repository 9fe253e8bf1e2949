"""How long a device works, and how long the host needs to ask for it."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# A pause is counted in clock ticks; no GPU that this runs on ticks faster than this.
_TICKS_A_SECOND = 2.0e9
_LONGEST_PAUSE = 0.25


@dataclass(frozen=True)
class Kind:
    """One thing to time.

    Attributes:
        call: Does it on the buffer of that number.
        calls: How many calls, on buffers ``0, 1, ...``, make one measurement. Enough buffers that
            the last call's data has left the cache before its turn comes again.
        prepare: Done before each measurement, not counted.
    """

    call: Callable[[int], object]
    calls: int = 1
    prepare: Callable[[], object] = tuple


@dataclass(frozen=True)
class Times:
    """Median seconds of one call.

    Attributes:
        device: Work of the device, queued so early that it never waits for the host (unless the
            call itself waits for the device).
        host: Until the call returns; the device may still be working.
        wall: From an idle device until it is idle again.
    """

    device: float
    host: float
    wall: float


class Ticks:
    """Times between steps, taken without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: list[Any] = []

    def tick(self) -> None:
        """A step ends here, and the next begins."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._seen.append(event)
        else:
            self._seen.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds between ticks; waits for the device."""
        synchronise(self._device)
        pairs = zip(self._seen, self._seen[1:], strict=False)
        if self._device.type == "cuda":
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def take_turns(kinds: Mapping[str, Kind], device: torch.device, *, rounds: int) -> dict[str, Times]:
    """Time several kinds in turns, so that a slow moment of the machine meets all of them.

    Args:
        kinds: What to time, by name. Each is called twice before the first measurement.
        device: Where it runs.
        rounds: Measurements of each kind.

    Returns:
        Medians by name.
    """
    pauses = {name: _warm_up(kind, device) for name, kind in kinds.items()}
    taken: dict[str, list[Times]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, kind in kinds.items():
            taken[name].append(_once(kind, device, pauses[name]))
    return {name: _median(times) for name, times in taken.items()}


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(kind: Kind, device: torch.device) -> float:
    """How long the device must be kept busy for the host to ask for everything meanwhile."""
    _walk(kind, device)
    return min(_LONGEST_PAUSE, 2 * _walk(kind, device)[0] + 1e-3)


def _once(kind: Kind, device: torch.device, pause: float) -> Times:
    host, wall = _walk(kind, device)
    worked = _device_seconds(kind, pause) if device.type == "cuda" else wall
    return Times(worked / kind.calls, host / kind.calls, wall / kind.calls)


def _walk(kind: Kind, device: torch.device) -> tuple[float, float]:
    """Seconds until all calls have returned, and until their work is done."""
    kind.prepare()
    synchronise(device)
    started = time.perf_counter()
    for number in range(kind.calls):
        kind.call(number)
    returned = time.perf_counter()
    synchronise(device)
    return returned - started, time.perf_counter() - started


def _device_seconds(kind: Kind, pause: float) -> float:
    kind.prepare()
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda._sleep(int(pause * _TICKS_A_SECOND))  # type: ignore[no-untyped-call]
    start.record()
    for number in range(kind.calls):
        kind.call(number)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _median(times: list[Times]) -> Times:
    return Times(
        *(statistics.median(getattr(t, name) for t in times) for name in ("device", "host", "wall"))
    )
