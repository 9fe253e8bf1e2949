"""LoRA layers that compute in the base's type from float32 weights, with nothing copied or cast.

PEFT casts the input of every adapted layer to the adapter's float32 and keeps that copy until the
backward pass, and it makes a tensor of the layer's output for the update, for its scaling and for
the sum. Here ``A`` and ``B`` are cast instead, which are small, and every product is added where
its result belongs:

    forward     h = x A^T;   y = base(x);   y += s h B^T
    backward    g = s dy B;  dB = s dy^T h;  dA = g^T x;  dx = base's;  dx += g A

Layers that read the same ``x`` (q, k and v; gate and up) do the products with it as one. The base
is called as it is, so whatever computes there (a noisy weight, a quantised one) is not known here.
On a GPU gradients of ``A`` and ``B`` leave their product in float32.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Matrix = Float[Tensor, "out in"]


def fast_adapters(model: nn.Module) -> int:
    """Let all plain LoRA layers of linear bases compute as above; others keep PEFT's way.

    The layers stay PEFT's: adapters are saved, merged and disabled as ever.

    Args:
        model: A PEFT model.

    Returns:
        How many layers do.
    """
    groups = defaultdict(list)
    for name, layer in model.named_modules():
        if _is_plain(layer):
            parent, _, own = name.rpartition(".")
            groups[parent, _SHARING.get(own, own)].append(_FastForward(layer))
    for forwards in groups.values():
        shared = _SharedInput(forwards)
        for forward in forwards:
            forward.shared = shared
    return sum(map(len, groups.values()))


_SHARING = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention's input"),
    **dict.fromkeys(("gate_proj", "up_proj"), "the gated layer's input"),
}
"""Layers that are called with the same tensor, in the families that name theirs so."""


def _is_plain(layer: Any) -> bool:
    """Whether a layer is ``base(x) + s B A dropout(x)`` and nothing else, on a linear base."""
    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper) or layer.lora_variant:
        return False
    # layers of bitsandbytes are linear layers too; Conv1D is none
    if not isinstance(layer.get_base_layer(), nn.Linear) or any(layer.lora_bias.values()):
        return False
    return all(type(part) is nn.Linear for part in layer.lora_A.values())


def forget_inputs(model: nn.Module) -> None:
    """Let go of what a pass that has failed was going to use; it holds that pass's graph."""
    for layer in model.modules():
        forward: Any = layer.forward
        if isinstance(forward, _FastForward):
            forward.shared.forget()


class _FastForward:
    """The forward of one layer."""

    shared: "_SharedInput"

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._usual = layer.forward
        layer.forward = self

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._layer
        name = self.adapter
        if args or kwargs or name is None:
            return cast(Tensor, self._usual(x, *args, **kwargs))
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, nn.Identity) or not dropout.training:
            x, hidden = self.shared.down(self, x)
        else:
            a = layer.lora_A[name].weight
            hidden = nn.functional.linear(dropout(x), a.to(x.dtype))
        b, scaling = layer.lora_B[name].weight, layer.scaling[name]
        base = layer.base_layer(x)
        return cast(Tensor, _Up.apply(base, hidden, b, scaling))  # type: ignore[no-untyped-call]

    @property
    def adapter(self) -> str | None:
        """The one adapter that is active and not merged, or None: then it is PEFT's turn."""
        layer = self._layer
        if layer.disable_adapters or layer.merged:
            return None
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        return active[0] if len(active) == 1 else None

    @property
    def a(self) -> Float[Tensor, "rank in"]:
        """Of the active adapter."""
        return cast(Tensor, self._layer.lora_A[self.adapter].weight)


class _SharedInput:
    """Layers side by side that may be called with the same input, one after the other."""

    def __init__(self, forwards: list[_FastForward]) -> None:
        self._forwards = forwards
        self._x: Tensor | None = None
        self._same: Tensor | None = None
        self._has_graph = False
        self._waiting: dict[_FastForward, Tensor] = {}

    def forget(self) -> None:
        """Drop what waits for layers that have not come."""
        self._x = self._same = None
        self._waiting = {}

    def down(self, forward: _FastForward, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` itself, for the base, and ``x A^T`` of one layer.

        The first layer computes it for all; one that comes with another input begins anew.
        """
        has_graph = torch.is_grad_enabled()
        if x is self._x and forward in self._waiting and has_graph == self._has_graph:
            return self._take(forward)
        self.forget()
        together = [one for one in self._forwards if one.adapter is not None]
        weights = [one.a for one in together]
        same, *hidden = _Down.apply(x, *weights)  # type: ignore[no-untyped-call]
        self._x, self._same, self._has_graph = x, same, has_graph
        self._waiting = dict(zip(together, hidden, strict=True))
        return self._take(forward)

    def _take(self, forward: _FastForward) -> tuple[Tensor, Tensor]:
        hidden, same = self._waiting.pop(forward), self._same
        assert same is not None
        if not self._waiting:
            self._x = self._same = None
        return same, hidden


class _Down(torch.autograd.Function):
    """``x`` itself, for the bases, and ``x A^T`` for each ``A``; gradients meet in one tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*batch in"], *weights: Float[Tensor, "_ in"]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)  # which are there anyway; their casts are made again
        ranks = [len(weight) for weight in weights]
        ctx.set_materialize_grads(False)
        same = x.view_as(x)
        if not x.requires_grad:
            ctx.mark_non_differentiable(same)
        hidden = nn.functional.linear(x, _stacked(weights, x.dtype))
        return same, *torch.split(hidden, ranks, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        ranks = [len(weight) for weight in weights]
        flat = x.reshape(-1, x.shape[-1])
        g = torch.cat(
            [
                flat.new_zeros(len(flat), rank) if part is None else part.flatten(0, -2)
                for part, rank in zip(grads, ranks, strict=True)
            ],
            dim=-1,
        )
        grad_a = torch.split(_product_in(g.t(), flat, weights[0].dtype), ranks)
        if not ctx.needs_input_grad[0]:
            return None, *grad_a
        a = _stacked(weights, x.dtype)
        if grad is None:
            return (g @ a).view_as(x), *grad_a
        # in place: it was made for nobody else, by the backward passes of the bases' products
        grad = grad.contiguous()
        grad.view_as(flat).addmm_(g, a)
        return grad, *grad_a


def _stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Matrix:
    return torch.cat([weight.to(dtype) for weight in weights])


class _Up(torch.autograd.Function):
    """``y + s h B^T``, written to ``y``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Float[Tensor, "*batch out"],
        hidden: Float[Tensor, "*batch rank"],
        b: Float[Tensor, "out rank"],
        scaling: float,
    ) -> Float[Tensor, "*batch out"]:
        ctx.save_for_backward(hidden, b)
        ctx.scaling = scaling
        h, cast_b = hidden.reshape(-1, b.shape[1]), b.to(hidden.dtype)
        if y._is_view() or y.dtype != hidden.dtype or not y.is_contiguous():
            update = (h @ cast_b.t()).mul_(scaling)
            return y + update.view_as(y).to(y.dtype)
        y.view(-1, b.shape[0]).addmm_(h, cast_b.t(), alpha=scaling)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, b = ctx.saved_tensors
        g = grad.reshape(-1, b.shape[0]).to(hidden.dtype)
        # scaled where it is small: g B has as many columns as the rank, g has as the layer
        grad_hidden = (g @ b.to(g.dtype)).mul_(ctx.scaling)
        grad_b = _product_in(g.t(), hidden.reshape(-1, b.shape[1]), b.dtype).mul_(ctx.scaling)
        return grad, grad_hidden.view_as(hidden), grad_b, None


def _product_in(left: Matrix, right: Matrix, dtype: torch.dtype) -> Matrix:
    """A product in a wider type than its factors', rounded once."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
