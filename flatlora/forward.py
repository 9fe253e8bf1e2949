"""Lend a frozen layer another forward for a while.

The forward is replaced on the layer's *instance*, so neither the class nor any other layer
notices, and no weight is touched. Afterwards the instance is as it was: an attribute that was
there before is back, and none is left behind that was not.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


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
    if not transposed or bias is None:
        return F.linear(x, weight.T if transposed else weight, bias)
    flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return flat.view(*x.shape[:-1], -1)


def forward_fault(base: nn.Module) -> str | None:
    """Why the forward of a layer is not the matrix product that `linear` computes, or None."""
    kind = type(base)
    if kind.forward is not nn.Linear.forward and not _is_conv1d(base):
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"the base layer is a {name}; expected nn.Linear or transformers' Conv1D"
    if "forward" in vars(base) and _slot(base) == "forward":
        return "the base layer's forward was replaced on the instance by other code"
    return None


@contextmanager
def replaced_forward(base: nn.Module, forward: Forward) -> Iterator[None]:
    """Let a layer compute something else inside the block.

    Where accelerate has hooked the layer (to move inputs between devices), its hook stays in
    charge and only the original forward behind it is replaced.

    Args:
        base: The frozen layer.
        forward: What its forward does inside the block.
    """
    slot, attributes = _slot(base), vars(base)
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


def current_forward(base: nn.Module) -> object:
    """The instance's own forward, or None if it has only that of its class."""
    return vars(base).get(_slot(base))


def _slot(base: nn.Module) -> str:
    """Where the layer's own forward is: accelerate keeps it in ``_old_forward`` behind a hook."""
    return "_old_forward" if "_hf_hook" in vars(base) else "forward"


def _is_conv1d(base: nn.Module) -> bool:
    # looked up, not imported: a model can only hold one if its module is loaded
    module = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(module, "Conv1D", None)
    return conv1d is not None and isinstance(base, conv1d) and type(base).forward is conv1d.forward
