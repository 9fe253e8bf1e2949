"""What a run is made of: what stays the same from step to step, and what changes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn

from flatlora import FlatLora
from worker.training.config import TrainingJob
from worker.training.data.examples import Example
from worker.training.plan import Plan
from worker.training.ranks import Ranks


@dataclass
class State:
    """What changes from step to step, besides the adapter and the optimizer's moments.

    Attributes:
        step: Optimizer steps done.
        tokens: Real tokens seen.
        bad_losses: Steps in a row whose loss or gradient was not finite.
        losses: Sampled training losses, ``[step, loss]``.
        held_out: Evaluations, ``{step, loss, accuracy}``; step 0 is the base model.
        best_adapter: Weights of the best evaluation so far, on the CPU, if that is to be kept.
    """

    step: int = 0
    tokens: int = 0
    bad_losses: int = 0
    losses: list[list[float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    best_adapter: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step.

    Attributes:
        job: What to do.
        model: The base model with its adapter, in training mode.
        flat: The perturbation of its weights.
        optimizer: Of the adapter.
        train: Rows to learn from.
        held_out: Rows that are only evaluated.
        total_steps: That the schedules are made for.
        device: Where this process computes.
        plan: How each step is computed.
        ranks: The processes that train together.
    """

    job: TrainingJob
    model: PeftModel
    flat: FlatLora
    optimizer: torch.optim.Optimizer
    train: Sequence[Example]
    held_out: Sequence[Example]
    total_steps: int
    device: torch.device
    plan: Plan
    ranks: Ranks

    @property
    def base(self) -> nn.Module:
        """The base model, with the adapter inside; it answers with the loss."""
        base: nn.Module = self.model.get_base_model()
        return base

    @property
    def adapter(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, float32, by name."""
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}


def copy_of_adapter(run: Run) -> dict[str, Tensor]:
    """Its weights as they are now, on the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in run.adapter.items()}
