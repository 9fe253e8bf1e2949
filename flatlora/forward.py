"""Lend a frozen layer another forward for a while.

The forward is replaced on the layer's *instance*, so neither the class nor any other layer
notices, and no weight is touched. Afterwards the instance is as it was: an attribute that was
there before is back, and none is left behind that was not.

A layer gets the same `NoisyForward` at every step: a compiled model, whose guards look at it, is
compiled once for clean and once for noisy steps.

The noise belongs to the adapter that was found. Where PEFT computes without it inside the block
(adapters disabled or merged, or another one active), the layer computes with its own ``W``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from flatlora.experts import adapted_parameter, is_parameter_wrapper
from flatlora.linear import LentForward, forward_slot, linear
from flatlora.noise import LayerNoise
from flatlora.quantised import QuantisedWeight
from flatlora.streamed import noisy_linear, register, streamed_linear

_NONE = object()


class NoisyForward(LentForward, ABC):
    """A forward with noise, and the module that it is lent to.

    Args:
        noise: The noise of a target.
        host: Module whose forward it replaces.
    """

    def __init__(self, noise: LayerNoise, host: nn.Module) -> None:
        self.noise = noise
        self.host: Any = host
        self._tuned: Any = noise.target.layer
        self._adapter = noise.target.adapter
        self._before: Any = _NONE

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output with noise, or without where PEFT computes without the adapter."""
        if self._is_adapted():
            return self.noisy(*args, **kwargs)
        if self._before is _NONE:
            return type(self.host).forward(self.host, *args, **kwargs)
        return self._before(*args, **kwargs)

    @abstractmethod
    def noisy(self, *args: Any, **kwargs: Any) -> Any:
        """The output with noise."""

    def _is_adapted(self) -> bool:
        # PEFT's private attributes, as its properties would cost more than the rest of this
        layer = self._tuned
        if layer._disable_adapters or layer.merged_adapters:
            return False
        active = layer._active_adapter
        return active == self._adapter if isinstance(active, str) else self._adapter in active

    def lend(self) -> None:
        """Let the layer compute this.

        Where accelerate has hooked the layer (to move inputs between devices), its hook stays in
        charge and only the original forward behind it is replaced.
        """
        attributes = vars(self.host)
        slot = forward_slot(self.host)
        self._before = attributes.get(slot, _NONE)
        attributes[slot] = self

    def take_back(self) -> None:
        """Give the layer its own forward back; does nothing where it has it."""
        attributes = vars(self.host)
        # accelerate moves it from one to the other where a hook was added or removed meanwhile
        for slot in ("forward", "_old_forward"):
            if attributes.get(slot) is not self:
                continue
            if self._before is not _NONE:
                attributes[slot] = self._before
            elif slot == "forward":
                del attributes[slot]
            else:
                attributes[slot] = MethodType(type(self.host).forward, self.host)


class NoisyLinear(NoisyForward):
    """What a perturbed linear layer computes: ``x (W + noise)^T + bias``.

    Args:
        noise: The layer's noise; where it has a `LayerNoise.copy`, that is what is multiplied.
    """

    def __init__(self, noise: LayerNoise) -> None:
        super().__init__(noise, noise.target.base)
        self.transposed = noise.target.transposed
        self._layer = register(noise)

    def noisy(self, x: Tensor) -> Tensor:
        """The layer's output for ``x``; its bias is read at each call, as it may be trained."""
        noise, bias = self.noise, getattr(self.host, "bias", None)
        if noise.copy is not None:
            return linear(x, noise.copy, bias, transposed=self.transposed)
        return streamed_linear(x, self.host.weight, bias, noise.std, noise.clock, self._layer)


class NoisyQuantised(NoisyForward):
    """What a perturbed linear layer of bitsandbytes computes: ``x (W + noise)^T + bias``.

    As such a layer does, it casts input and bias to the dtype that the layer computes in, and its
    output back. In resident mode too it multiplies in the operator that streams: cast copies would
    otherwise stay until the backward pass, once for each layer.

    Args:
        noise: The layer's noise.
    """

    def __init__(self, noise: LayerNoise, stored: QuantisedWeight) -> None:
        super().__init__(noise, noise.target.base)
        self.stored = stored
        self._layer = register(noise)

    def noisy(self, x: Tensor) -> Tensor:
        """The layer's output for ``x``, in its dtype."""
        noise, bias, dtype = self.noise, self.host.bias, self.stored.computes_in(x)
        out = noisy_linear(
            x.to(dtype),
            self.stored.tensor,
            None if bias is None else bias.to(dtype),
            noise.std,
            noise.clock,
            self._layer,
        )
        return out.to(x.dtype)


class NoisyParameter(NoisyForward):
    """What PEFT's wrapper of a perturbed parameter computes.

    Its module reads ``W + noise + s B A``: the noise is a parametrization before PEFT's, for the
    time of one forward pass. PEFT's has no use for its input in the backward pass, so streaming
    writes the noisy parameter only once.

    Args:
        noise: The parameter's noise.
    """

    def __init__(self, noise: LayerNoise) -> None:
        super().__init__(noise, noise.target.layer)
        self.module, self.parameter = adapted_parameter(self.host)

    def noisy(self, *args: Any, adapter_names: None = None, **kwargs: Any) -> Any:
        """The output of the wrapped module; `ParamWrapper.forward` with noise."""
        layer = self.host
        layer._check_forward_args(*args, adapter_names=adapter_names, **kwargs)
        with layer._activate_lora(layer.active_adapters), self._noisy_input():
            return layer.base_layer(*args, **kwargs)

    @contextmanager
    def _noisy_input(self) -> Iterator[None]:
        """Let PEFT's parametrization be given the noisy parameter."""
        parametrizations: Any = self.module.parametrizations
        chain: Any = getattr(parametrizations, self.parameter)
        chain.insert(0, _Noise(self.noise))
        try:
            yield
        finally:
            del chain[0]


class _Noise(nn.Module):
    """The parametrization ``W`` to ``W + noise``."""

    def __init__(self, noise: LayerNoise) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, weight: Tensor) -> Tensor:
        noise = self.noise
        if noise.copy is not None:
            return noise.copy
        return noise.write_to_workspace(weight, noise.std, noise.clock)


def noisy_forward(noise: LayerNoise) -> NoisyForward:
    """How a target computes with its noisy weight, by the target's kind."""
    if is_parameter_wrapper(noise.target.layer):
        return NoisyParameter(noise)
    if isinstance(noise.target.stored, QuantisedWeight):
        return NoisyQuantised(noise, noise.target.stored)
    return NoisyLinear(noise)


__all__ = ["NoisyForward", "noisy_forward"]
