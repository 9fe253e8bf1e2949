"""What a run is made of: what stays the same from step to step, and what changes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flatlora import FlatLora
from worker.training.config import TrainingJob
from worker.training.data.rendering import Example


@dataclass
class State:
    """What changes from step to step, besides the adapter and the optimizer's moments.

    Attributes:
        step: Optimizer steps done.
        tokens: Real tokens seen.
        bad_losses: Steps in a row whose loss or gradient was not finite.
        losses: Sampled training losses, ``[step, loss]``.
        held_out: Evaluations, ``{step, loss, accuracy}``; step 0 is the base model.
    """

    step: int = 0
    tokens: int = 0
    bad_losses: int = 0
    losses: list[list[float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step."""

    job: TrainingJob
    model: nn.Module
    flat: FlatLora
    optimizer: torch.optim.Optimizer
    train: Sequence[Example]
    held_out: Sequence[Example]
    total_steps: int
    device: torch.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapter's weights, float32."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
