"""What a user chooses about the perturbation."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Memory = Literal["auto", "resident", "streamed"]

_SEED_LIMIT = 2**64


@dataclass(frozen=True)
class FlatLoraConfig:
    """Strength, seed and memory mode of the perturbation.

    Together with the step number this is the engine's whole state: the same config at the same
    step draws the same noise, in a resumed run too.

    Attributes:
        sigma: Strength that the schedule rises to. The paper advises 0.05 or 0.10 for language
            models (arXiv 2409.14396); ``0`` is plain LoRA.
        seed: Seed of the noise, ``0 <= seed < 2**64``. Has nothing to do with torch's generators.
        memory: ``"resident"`` keeps one noisy copy of every target and writes it once per step; of
            a quantised weight that is a dense copy. ``"streamed"`` keeps one workspace of the
            largest target's size and writes each noisy weight again for every use. ``"auto"``
            takes resident where the copies fit in half of the device's free memory when the engine
            is built, and streamed elsewhere and for sharded weights; where memory runs out later
            it gives its copies up and streams from then on. All give the same numbers.

    Raises:
        ValueError: If any value is out of range; the message names all such values.
    """

    sigma: float = 0.05
    seed: int = 42
    memory: Memory = "auto"

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise ValueError("; ".join(faults))

    def _faults(self) -> list[str]:
        faults = []
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            faults.append(f"sigma must be finite and not negative, got {self.sigma}")
        if not isinstance(self.seed, int):
            # from a caller without a type checker, a sweep over floats for one
            faults.append(f"seed must be an int, got {self.seed!r}")  # type: ignore[unreachable]
        elif not 0 <= self.seed < _SEED_LIMIT:
            faults.append(f"seed must be at least 0 and below 2**64, got {self.seed}")
        if self.memory not in get_args(Memory):
            faults.append(f"memory must be one of {get_args(Memory)}, got {self.memory!r}")
        return faults
