"""How a run computes: what fits the device's memory, decided once and kept for all attempts.

A plan changes how fast a run is and how much memory it takes, and no result but by rounding (and
which elements dropout drops). It is written down before the first step, because a resumed run must
round as the one before it did.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from worker.training.files import replace_text

Memory = Literal["resident", "streamed"]


@dataclass(frozen=True)
class Plan:
    """How each step is computed.

    Attributes:
        max_length: Tokens of the longest row.
        micro_batch_size: Rows per forward pass, or packed rows of ``max_length`` tokens at most.
        packing: Whether rows share sequences.
        varlen: Whether a forward pass takes its rows end to end, without padding.
        activation_checkpointing: Whether the backward pass computes activations again.
        perturbation_memory: How noisy weights are kept.
    """

    max_length: int
    micro_batch_size: int
    packing: bool = False
    varlen: bool = False
    activation_checkpointing: bool = False
    perturbation_memory: Memory = "streamed"

    @property
    def capacity(self) -> int:
        """Tokens that a sequence of packed rows may have."""
        return self.max_length * (self.micro_batch_size if self.varlen else 1)

    @property
    def sequences(self) -> int:
        """Sequences of a forward pass: rows end to end are a single one where they are packed."""
        return 1 if self.varlen and self.packing else self.micro_batch_size

    def to_json(self) -> dict[str, Any]:
        """As it is kept in checkpoints."""
        return asdict(self)

    def in_words(self) -> str:
        """For the job's history."""
        rows = "packed rows" if self.packing else "rows"
        parts = [f"{self.micro_batch_size} {rows} of up to {self.max_length} tokens a forward pass"]
        if self.varlen:
            parts.append("without padding")
        if self.activation_checkpointing:
            parts.append("activations computed again")
        parts.append(f"noisy weights {self.perturbation_memory}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Freedom:
    """What may be changed where memory does not suffice: what the job has left to us.

    Attributes:
        micro_batch_size: Whether it may be lowered.
        activation_checkpointing: Whether it may be turned on.
        perturbation_memory: Whether noisy weights may be streamed.
    """

    micro_batch_size: bool
    activation_checkpointing: bool
    perturbation_memory: bool


ENOUGH_TOKENS = 4096
"""Tokens that keep a GPU busy: below that smaller passes cost more than streaming does."""


def lighter(plan: Plan, freedom: Freedom) -> Plan | None:
    """The next plan to try where one does not fit: each is slower and needs less memory.

    Passes are halved while they keep a GPU busy, then noisy weights are streamed, then activations
    computed again, then passes are halved down to one row.

    Returns:
        None if nothing is left to give up.
    """
    may_halve = freedom.micro_batch_size and plan.micro_batch_size > 1
    halved = replace(plan, micro_batch_size=max(1, plan.micro_batch_size // 2))
    if may_halve and halved.micro_batch_size * plan.max_length >= ENOUGH_TOKENS:
        return halved
    if freedom.perturbation_memory and plan.perturbation_memory == "resident":
        return replace(plan, perturbation_memory="streamed")
    if freedom.activation_checkpointing and not plan.activation_checkpointing:
        return replace(plan, activation_checkpointing=True)
    return halved if may_halve else None


FILE = "plan.json"


@dataclass(frozen=True)
class Written:
    """A plan and the step from which on it holds."""

    plan: Plan
    from_step: int


def write_plan(folder: Path, identity: str, plan: Plan, from_step: int) -> None:
    """Keep a plan for later attempts of the same run; on the disk when this returns."""
    record = {"identity": identity, "plan": plan.to_json(), "from_step": from_step}
    replace_text(folder / FILE, json.dumps(record))


def read_plan(folder: Path, identity: str) -> Written | None:
    """The plan of an earlier attempt, unless its settings or inputs were others."""
    try:
        record = json.loads((folder / FILE).read_text())
        if record["identity"] != identity:
            return None
        return Written(Plan(**record["plan"]), int(record["from_step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
