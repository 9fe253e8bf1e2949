"""Lend a frozen layer another forward for a while.

The forward is replaced on the layer's *instance*, so neither the class nor any other layer
notices, and no weight is touched. Afterwards the instance is as it was: an attribute that was
there before is back, and none is left behind that was not.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class NoisyForward:
    """The forward of a perturbed layer; its own class, so that a perturbed layer is known as one.

    Attributes:
        base: The frozen layer; its bias is read at each call, as it may be trained.
        product: Computes ``x (W + noise)^T + bias`` from ``x`` and ``bias``.
    """

    base: nn.Module
    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for ``x``."""
        return self.product(x, getattr(self.base, "bias", None))


def linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "rows cols"],
    bias: Float[Tensor, " out"] | None,
    *,
    transposed: bool,
) -> Float[Tensor, "*batch out"]:
    """What the frozen layer itself computes, with the same kernels, from a weight as stored.

    Args:
        x: Input.
        weight: Weight as stored, ``out x in`` or, if transposed, ``in x out``.
        bias: Bias of the layer, if any; ``Conv1D`` always has one.
        transposed: Whether the layer is a ``Conv1D``.

    Returns:
        ``x W^T + bias``.
    """
    if not transposed:
        return nn.functional.linear(x, weight, bias)
    assert bias is not None
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def forward_fault(base: nn.Module) -> str | None:
    """Why the forward of a layer is not the matrix product that `linear` computes, or None."""
    kind = type(base)
    if kind.forward is not nn.Linear.forward and not _is_conv1d(base):
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"the base layer is a {name}; expected nn.Linear or transformers' Conv1D"
    own = vars(base).get(_slot(base))
    # accelerate leaves the class's own forward on the instance when it removes a hook
    if own is None or isinstance(own, NoisyForward) or getattr(own, "__func__", 0) is kind.forward:
        return None
    return "the base layer's forward was replaced by other code"


def is_perturbed(base: nn.Module) -> bool:
    """Whether a layer computes with a noisy weight at the moment."""
    return isinstance(vars(base).get(_slot(base)), NoisyForward)


@contextmanager
def replaced_forward(forward: NoisyForward) -> Iterator[None]:
    """Let a layer compute something else inside the block.

    Where accelerate has hooked the layer (to move inputs between devices), its hook stays in
    charge and only the original forward behind it is replaced.

    Args:
        forward: What the layer does inside the block.
    """
    slot, attributes = _slot(forward.base), vars(forward.base)
    missing = slot not in attributes
    before = attributes.get(slot)
    attributes[slot] = forward
    try:
        yield
    finally:
        if missing:
            del attributes[slot]
        else:
            attributes[slot] = before


def _slot(base: nn.Module) -> str:
    """Where the layer's own forward is: accelerate keeps it in ``_old_forward`` behind a hook."""
    return "_old_forward" if "_hf_hook" in vars(base) else "forward"


def _is_conv1d(base: nn.Module) -> bool:
    # looked up, not imported: a model can only hold one if its module is loaded
    module = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(module, "Conv1D", None)
    return conv1d is not None and isinstance(base, conv1d) and type(base).forward is conv1d.forward
