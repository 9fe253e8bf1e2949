"""What a frozen linear layer computes, and whether a layer is one."""

import sys
from typing import Literal, NoReturn, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatlora.errors import FlatLoraError


class LentForward:
    """A forward that a layer has for a while; its own class, so that such a layer is known.

    A copy of it would outlive that while.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be copied or pickled with the model, which no longer would be clean after.

        Raises:
            FlatLoraError: Always.
        """
        raise FlatLoraError("the model is perturbed; copy or save it outside the block")


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
    out = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return out.view(*x.shape[:-1], weight.shape[1])


def autocast_dtype(x: Float[Tensor, "..."]) -> torch.dtype:
    """What autocast, where it is on, brings an input to; it leaves float64 alone."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def forward_fault(base: nn.Module) -> str | None:
    """Why the forward of a layer is not the matrix product that `linear` computes, or None."""
    kind = type(base)
    plain = kind.forward is nn.Linear.forward or _is_conv1d(base)
    if not plain and bitsandbytes_kind(base) is None:
        name = f"{kind.__module__}.{kind.__qualname__}"
        return (
            f"the base layer is a {name}; expected nn.Linear, transformers' Conv1D, or "
            "bitsandbytes' Linear4bit or Linear8bitLt"
        )
    if is_forward_replaced(base):
        return "the base layer's forward was replaced by other code"
    return None


def is_forward_replaced(module: nn.Module) -> bool:
    """Whether other code has replaced the forward of this one module."""
    own = vars(module).get(forward_slot(module))
    # accelerate leaves the class's own forward on the instance when it removes a hook
    its_class = getattr(own, "__func__", None) is type(module).forward
    return not (own is None or isinstance(own, LentForward) or its_class)


def is_perturbed(base: nn.Module) -> bool:
    """Whether a layer computes with a noisy weight at the moment."""
    return isinstance(vars(base).get(forward_slot(base)), LentForward)


def forward_slot(base: nn.Module) -> str:
    """Where the layer's own forward is: accelerate keeps it in ``_old_forward`` behind a hook."""
    return "_old_forward" if "_hf_hook" in vars(base) else "forward"


def bitsandbytes_kind(base: nn.Module) -> Literal["4bit", "8bit"] | None:
    """Which linear layer of bitsandbytes a layer is, or None if it is neither."""
    # looked up, not imported, as below
    module = sys.modules.get("bitsandbytes.nn.modules")
    if module is None or not isinstance(base, nn.Linear):
        return None
    forward = type(base).forward
    if forward is module.Linear4bit.forward:
        return "4bit"
    return "8bit" if forward is module.Linear8bitLt.forward else None


def _is_conv1d(base: nn.Module) -> bool:
    # looked up, not imported: a model can only hold one if its module is loaded
    module = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(module, "Conv1D", None)
    return conv1d is not None and isinstance(base, conv1d) and type(base).forward is conv1d.forward
