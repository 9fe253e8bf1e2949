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
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from flatlora.errors import FlatLoraError
from flatlora.linear import autocast_dtype, linear
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


def _noise_of(tag: str) -> LayerNoise:
    noise = _layers.get(tag)
    if noise is None:
        raise FlatLoraError(
            f"the engine that perturbed {tag.rpartition('#')[0]} is gone; keep it until the "
            "backward pass is over"
        )
    return noise


def streamed_linear(
    x: Float[Tensor, "*batch in"],
    weight: Shaped[Tensor, "..."],
    bias: Float[Tensor, " out"] | None,
    std: Float[Tensor, "#rows #cols"],
    clock: Int64[Tensor, "2"],
    layer: str,
) -> Float[Tensor, "*batch out"]:
    """`linear` with the noisy weight, keeping neither that weight nor the input for backward.

    Under autocast it computes in autocast's dtype, as `linear` does; float64 stays as it is.

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
        RuntimeError: If the input has not the weight's dtype, outside autocast or in float64.
    """
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = autocast_dtype(x)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        raise RuntimeError(f"the input is {x.dtype}, but the layer's weight {weight.dtype}")
    return noisy_linear(x, weight, bias, std, clock, layer)


def noisy_linear(
    x: Float[Tensor, "*batch in"],
    weight: Shaped[Tensor, "..."],
    bias: Float[Tensor, " out"] | None,
    std: Float[Tensor, "#rows #cols"],
    clock: Int64[Tensor, "2"],
    layer: str,
) -> Float[Tensor, "*batch out"]:
    """`streamed_linear` in the dtype of the input, which the bias has too.

    A compiler sees the operator ``torch.ops.flatlora.noisy_linear``. Without one the same is done
    by an autograd function, because calling an operator that is written in Python takes the host
    several times longer, once for each layer and pass.

    Args:
        x: As in `streamed_linear`.
        weight: As in `streamed_linear`.
        bias: As in `streamed_linear`.
        std: As in `streamed_linear`.
        clock: As in `streamed_linear`.
        layer: As in `streamed_linear`.

    Returns:
        As `streamed_linear`.
    """
    out: Tensor
    if torch.compiler.is_compiling():
        out = torch.ops.flatlora.noisy_linear(x, weight, bias, std, clock, layer)
    else:
        out = _NoisyLinear.apply(x, weight, bias, std, clock, layer)  # type: ignore[no-untyped-call]
    return out


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, std: Tensor, clock: Tensor, layer: str
) -> Tensor:
    noise = _noise_of(layer)
    with _without_autocast(x):
        noisy = _noisy_weight(noise, weight, std, clock).to(x.dtype)
        return linear(x, noisy, bias, transposed=noise.target.transposed)


def _input_gradient(grad: Tensor, weight: Tensor, std: Tensor, clock: Tensor, layer: str) -> Tensor:
    noise = _noise_of(layer)
    with _without_autocast(grad):
        noisy = _noisy_weight(noise, weight, std, clock).to(grad.dtype)
        return grad @ (noisy.T if noise.target.transposed else noisy)


def _noisy_weight(noise: LayerNoise, weight: Tensor, std: Tensor, clock: Tensor) -> Tensor:
    """The copy of resident mode, if there is one, or what is written anew."""
    if noise.copy is not None:
        return noise.copy
    return noise.write_to_workspace(weight, std, clock)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias, std, clock, ctx.layer = inputs
    # These exist anyway; saving them lets autograd notice if one is written to, as by a next step.
    ctx.save_for_backward(weight, std, clock)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor, input_gradient: Any) -> tuple[Tensor | None, ...]:
    weight, std, clock = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = input_gradient(grad, weight, std, clock, ctx.layer)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, None, None, None


class _NoisyLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _product(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, _input_gradient)


_operator = torch.library.custom_op("flatlora::noisy_linear", _product, mutates_args=())
_gradient_operator = torch.library.custom_op(
    "flatlora::noisy_linear_grad", _input_gradient, mutates_args=()
)
_operator.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, torch.ops.flatlora.noisy_linear_grad),
    setup_context=_setup_context,
)


@_operator.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, std: Tensor, clock: Tensor, layer: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], std.numel())


@_gradient_operator.register_fake
def _(grad: Tensor, weight: Tensor, std: Tensor, clock: Tensor, layer: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], _noise_of(layer).target.in_features)
