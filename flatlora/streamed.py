"""Multiply by a noisy weight that is written anew for every use.

For a frozen weight the input's gradient is ``grad (W + noise)`` and needs neither the input nor
the noisy weight of the forward pass: the noise is a pure function of its stream, so the backward
pass writes the same noisy weight again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from flatlora import ops
from flatlora.forward import linear
from flatlora.targets import Target


class Workspace:
    """One buffer for each device and dtype, as large as the largest weight of that dtype.

    All layers write their noisy weight to it in turn, and a weight is used before the next is
    written: work on one device runs in order.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._sizes: dict[torch.dtype, int] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for weight in (target.weight for target in targets):
            self._sizes[weight.dtype] = max(weight.numel(), self._sizes.get(weight.dtype, 0))

    def noisy(
        self,
        weight: Float[Tensor, "rows cols"],
        std: Float[Tensor, "#rows #cols"],
        stream: ops.Stream,
    ) -> Float[Tensor, "rows cols"]:
        """Write a noisy weight; it is valid until the next call.

        Args:
            weight: Frozen weight as stored.
            std: Standard deviation of its noise.
            stream: Address of its noise.

        Returns:
            ``W + noise``, a view of the workspace.
        """
        place = (weight.device, weight.dtype)
        if place not in self._buffers:
            self._buffers[place] = torch.empty(
                self._sizes[weight.dtype], dtype=weight.dtype, device=weight.device
            )
        out = self._buffers[place][: weight.numel()].view(weight.shape)
        return ops.noisy_copy(weight, std, stream, out=out)


def streamed_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "rows cols"],
    bias: Float[Tensor, " out"] | None,
    std: Float[Tensor, "#rows #cols"],
    stream: ops.Stream,
    *,
    workspace: Workspace,
    transposed: bool,
) -> Float[Tensor, "*batch out"]:
    """`linear` with the noisy weight, keeping neither that weight nor the input for backward.

    Under autocast it computes in autocast's dtype, as `linear` does.

    Args:
        x: Input.
        weight: Frozen weight as stored; gets no gradient.
        bias: Bias of the layer, if any; gets a gradient if it asks for one.
        std: Standard deviation of the noise.
        stream: Address of the noise.
        workspace: Where noisy weights are written.
        transposed: Whether the layer is a ``Conv1D``.

    Returns:
        ``x (W + noise)^T + bias``.
    """
    out: Tensor = _StreamedLinear.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        x, weight, bias, std, stream, workspace, transposed
    )
    return out


class _StreamedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        std: Tensor,
        stream: ops.Stream,
        workspace: Workspace,
        transposed: bool,
    ) -> Tensor:
        # W and std exist anyway; saving them lets autograd notice if either is written to
        ctx.save_for_backward(weight, std)
        ctx.stream, ctx.workspace, ctx.transposed = stream, workspace, transposed
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return linear(x, workspace.noisy(weight, std, stream), bias, transposed=transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, std = ctx.saved_tensors
        grad_x = grad_bias = None
        # The gradient already has the dtype that the forward computed in, autocast or not.
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                noisy = ctx.workspace.noisy(weight, std, ctx.stream).to(grad.dtype)
                grad_x = (grad @ (noisy.T if ctx.transposed else noisy)).to(ctx.x_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias, None, None, None, None
