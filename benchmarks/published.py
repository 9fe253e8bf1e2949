"""The published way to perturb: add noise to the weight, and later subtract it again.

Written anew from the paper (Flat-LoRA, arXiv 2409.14396, equation 8 and algorithm 1) for
comparison; no line is taken from its authors' code. What it shares with their release, because
that is what costs time and bytes:

- the merged weight ``W + s B A`` is built in full, in the weight's dtype, to take its row norms;
- the standard deviation is repeated to the weight's full shape and handed to ``torch.normal``;
- the noise is added to ``W`` in place, in the weight's dtype, and is not kept: it is drawn again
  from the same seed of torch's *global* generator and subtracted, which in bfloat16 does not give
  ``W`` back.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatlora import Target


@torch.no_grad()
def merged_row_std(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scaling: float, sigma: float
) -> Tensor:
    """``sigma / sqrt(n) * ||W'_i||`` of every row of ``W' = W + s B A`` (equation 8).

    Args:
        weight: ``W``, out x in.
        lora_a: ``A``, rank x in.
        lora_b: ``B``, out x rank.
        scaling: ``s``.
        sigma: Strength at this step.

    Returns:
        out x 1, in the weight's dtype.
    """
    merged = weight + scaling * (lora_b.to(weight.dtype) @ lora_a.to(weight.dtype))
    norm: Tensor = merged.norm(dim=1, keepdim=True)
    return norm * (sigma / math.sqrt(weight.shape[1]))


def noise(std: Tensor, cols: int) -> Tensor:
    """Noise of a whole weight from torch's global generator.

    Args:
        std: out x 1.
        cols: ``in``.

    Returns:
        out x in, with the dtype of ``std``.
    """
    return torch.normal(0.0, std.repeat(1, cols))


@torch.no_grad()
def add_(weight: Tensor, std: Tensor, seed: int) -> None:
    """One direction for one weight: seed, draw, add."""
    torch.manual_seed(seed)
    weight += noise(std, weight.shape[1])


class AddSubtract:
    """One optimizer step's perturbation of many layers.

    Args:
        targets: Layers to perturb, none of them transposed. Their weights are written to.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._stds: list[Tensor] = []

    @torch.no_grad()
    def add(self, sigma: float, seed: int) -> None:
        """Before the forward pass."""
        self._stds = [
            merged_row_std(t.weight, t.lora_a, t.lora_b, scaling=t.scaling, sigma=sigma)
            for t in self._targets
        ]
        torch.manual_seed(seed)
        for target, std in zip(self._targets, self._stds, strict=True):
            target.weight.data += noise(std, target.weight.shape[1])

    @torch.no_grad()
    def subtract(self, seed: int) -> None:
        """After the backward pass."""
        torch.manual_seed(seed)
        for target, std in zip(self._targets, self._stds, strict=True):
            target.weight.data -= noise(std, target.weight.shape[1])
