"""Multiply by a noisy weight that is written anew for every use.

For a frozen weight the input's gradient is ``grad (W + noise)`` and needs neither the input nor
the noisy weight of the forward pass: the noise is a pure function of its address, so the backward
pass writes the same noisy weight again.

The product is a torch custom operator, so that ``torch.compile`` takes it as one opaque step and a
CUDA graph can capture it. What an operator cannot take as an argument, the layer's noise, is
looked up by its tag: text, because a compiled graph takes text for a constant and numbers for
variables.
"""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from flatlora.linear import linear
from flatlora.noise import LayerNoise

_layers: "WeakValueDictionary[str, LayerNoise]" = WeakValueDictionary()
_numbers = itertools.count()


def register(noise: LayerNoise) -> str:
    """Give a layer's noise the tag that `streamed_linear` takes.

    The registry keeps nothing alive.
    """
    tag = f"{noise.target.name}#{next(_numbers)}"
    _layers[tag] = noise
    return tag


def streamed_linear(
    x: Float[Tensor, "*batch in"],
    weight: Shaped[Tensor, "..."],
    bias: Float[Tensor, " out"] | None,
    std: Float[Tensor, "#rows #cols"],
    clock: Int64[Tensor, "2"],
    layer: str,
) -> Float[Tensor, "*batch out"]:
    """`linear` with the noisy weight, keeping neither that weight nor the input for backward.

    Under autocast it computes in autocast's dtype, as `linear` does.

    Args:
        x: Input.
        weight: What the layer stores; gets no gradient.
        bias: Bias of the layer, if any; gets a gradient if it asks for one.
        std: Standard deviation of the noise.
        clock: Step and draw.
        layer: Tag of the layer's noise, see `register`.

    Returns:
        ``x (W + noise)^T + bias``.

    Raises:
        RuntimeError: If the input has not the weight's dtype, outside autocast.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        raise RuntimeError(f"the input is {x.dtype}, but the layer's weight {weight.dtype}")
    out: Tensor = torch.ops.flatlora.noisy_linear(x, weight, bias, std, clock, layer)
    return out


@torch.library.custom_op("flatlora::noisy_linear", mutates_args=())
def _noisy_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, std: Tensor, clock: Tensor, layer: str
) -> Tensor:
    noise = _layers[layer]
    with torch.autocast(x.device.type, enabled=False):
        noisy = _noisy_weight(noise, weight, std, clock).to(x.dtype)
        return linear(x, noisy, bias, transposed=noise.target.transposed)


@_noisy_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, std: Tensor, clock: Tensor, layer: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], std.numel())


@torch.library.custom_op("flatlora::noisy_linear_grad", mutates_args=())
def _noisy_linear_grad(
    grad: Tensor, weight: Tensor, std: Tensor, clock: Tensor, layer: str
) -> Tensor:
    noise = _layers[layer]
    with torch.autocast(grad.device.type, enabled=False):
        noisy = _noisy_weight(noise, weight, std, clock).to(grad.dtype)
        return grad @ (noisy.T if noise.target.transposed else noisy)


@_noisy_linear_grad.register_fake
def _(grad: Tensor, weight: Tensor, std: Tensor, clock: Tensor, layer: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], _layers[layer].target.in_features)


def _noisy_weight(noise: LayerNoise, weight: Tensor, std: Tensor, clock: Tensor) -> Tensor:
    """The copy of resident mode, if there is one, or what is written anew."""
    if noise.copy is not None:
        return noise.copy
    return noise.write_to_workspace(weight, std, clock)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias, std, clock, ctx.layer = inputs
    # These exist anyway; saving them lets autograd notice if one is written to, as by a next step.
    ctx.save_for_backward(weight, std, clock)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, std, clock = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.flatlora.noisy_linear_grad(grad, weight, std, clock, ctx.layer)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, None, None, None


_noisy_linear.register_autograd(_backward, setup_context=_setup_context)
