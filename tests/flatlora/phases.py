"""Watches a training run from outside: what happens in which order, and whether it meets noise."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatlora import find_targets

Seen = list[tuple[str, bool]]


class Phases:
    """Notes each phase of a run, with whether the model was perturbed in it.

    Args:
        model: The PEFT model, before a trainer wraps it.
        optimizer: The trainer's optimizer, if its steps are of interest.
        is_noisy: How to tell; by default from what a layer multiplies by.

    Attributes:
        seen: The phases in order: forward, backward, optimizer, evaluation, saving.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        is_noisy: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        self.seen: Seen = []
        self._is_noisy = is_noisy or (lambda _: bool(self.noise().any()))
        target = find_targets(model)[0]
        self.base = target.base
        self.weight = target.weight
        target.layer.register_forward_pre_hook(self._forward)
        trained: Any = target.lora_b
        trained.register_hook(lambda _: self._note("backward"))
        saved: Any = model
        saved.register_state_dict_pre_hook(lambda *_: self._note("saving"))
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda *_: self._note("optimizer"))

    def noise(self) -> Tensor:
        """What the layer multiplies by, less its weight."""
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            unit = torch.eye(self.weight.shape[1], dtype=self.weight.dtype)
            noisy: Tensor = self.base(unit)
            clean: Tensor = type(self.base).forward(self.base, unit)
        return (noisy - clean).T

    def training(self) -> Seen:
        """The phases of training alone."""
        return [phase for phase in self.seen if phase[0] not in {"evaluation", "saving"}]

    def of(self, name: str) -> set[bool]:
        """Whether one phase was perturbed: never, always, at times, or it did not happen."""
        return {noisy for phase, noisy in self.seen if phase == name}

    def _forward(self, layer: nn.Module, _: Any) -> None:
        self._note("forward" if layer.training else "evaluation")

    def _note(self, phase: str) -> None:
        self.seen.append((phase, self._is_noisy(self.base)))


def windows(sizes: list[int], *, passes: int = 1) -> Seen:
    """What should be seen in training: one optimizer step per size, with so many micro-batches.

    Args:
        sizes: Number of micro-batches of each step; the first step has strength zero.
        passes: Forward passes per micro-batch, two where activations are computed again.
    """
    seen: Seen = []
    for step, size in enumerate(sizes):
        noisy = step > 0
        seen += ([("forward", noisy)] * passes + [("backward", noisy)]) * size
        seen.append(("optimizer", False))
    return seen
