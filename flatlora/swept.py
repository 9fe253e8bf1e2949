"""Serve all layers that one launch can serve, where the Triton kernels compute."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from flatlora import ops
from flatlora.noise import Clocks, LayerNoise, version_of
from flatlora.weights import DenseWeight

if TYPE_CHECKING:  # it needs Triton, which exists where the kernels compute
    from flatlora.ops.sweep import Sweep


class SweptLayers:
    """The standard deviations and copies of many layers, written together.

    A sweep knows its tensors by their addresses. They are looked at before each step, and where
    one has changed (a model that was moved, an adapter that was loaded anew) the sweeps are made
    again.

    Args:
        noises: The layers.
        clocks: Where the present step and draw are read.
    """

    def __init__(self, noises: Sequence[LayerNoise], clocks: Clocks) -> None:
        self._noises = noises
        self._clocks = clocks
        self._addresses: list[Any] = []
        self._sweeps: list[Sweep] = []
        self._others: Sequence[LayerNoise] = noises

    def write(self, sigma: float) -> Sequence[LayerNoise]:
        """Take up a step for all layers that can be served together, and write their copies.

        Args:
            sigma: Strength.

        Returns:
            The layers that were not served.
        """
        addresses = [ops.backend(), *map(_addresses, self._noises)]
        if addresses != self._addresses:
            self._plan()
            self._addresses = addresses
        for sweep in self._sweeps:
            sweep.run(sigma, self._clocks.on(sweep.device))
        return self._others

    def forget(self) -> None:
        """Let all tensors go; the next step sorts the layers anew."""
        self._addresses = []
        self._sweeps = []

    def _plan(self) -> None:
        """Sort the layers by what one launch has to have in common."""
        self.forget()
        served = [noise for noise in self._noises if _is_served_by_kernels(noise)]
        self._others = self._noises
        if not served:
            return
        from flatlora.ops.sweep import Sweep, is_narrow, sweepable

        groups = defaultdict(list)
        for noise in served:
            target = noise.target
            weight, adapter = target.stored.tensor, target.lora_a
            if sweepable(weight, adapter, target.lora_b):
                kind = (weight.device, weight.dtype, adapter.dtype, noise.copy is not None)
                groups[kind, is_narrow(weight)].append(noise)
        swept = {noise for group in groups.values() for noise in group}
        self._others = [noise for noise in self._noises if noise not in swept]
        self._sweeps = [
            Sweep([_swept_weight(noise, self._clocks) for noise in group])
            for group in groups.values()
        ]


def _is_served_by_kernels(noise: LayerNoise) -> bool:
    """Whether a layer's weight is a plain matrix on a device where the kernels compute."""
    stored, weight = noise.target.stored, noise.target.stored.tensor
    return (
        not noise.target.units  # FSDP2's, and served by `flatlora.sharded`
        and isinstance(stored, DenseWeight)
        and not stored.transposed
        and weight.dim() == 2
        and type(weight) is torch.nn.Parameter
        and ops.kernels_serve(weight)
    )


def _swept_weight(noise: LayerNoise, clocks: Clocks) -> Any:
    from flatlora.ops.sweep import SweptWeight

    target = noise.target
    weight = target.stored.tensor
    return SweptWeight(
        weight=weight,
        square_norm=noise.square_norm(),
        lora_a=target.lora_a,
        lora_b=target.lora_b,
        scaling=target.scaling,
        key=noise.key,
        std=noise.be_swept(clocks.on(weight.device)),
        copy=noise.copy,
    )


def _addresses(noise: LayerNoise) -> tuple[object, ...]:
    """What a sweep took over from a layer."""
    target, copy = noise.target, noise.copy
    weight, a, b = target.stored.tensor, target.lora_a, target.lora_b
    return (
        *(weight.data_ptr(), weight.dtype, version_of(weight)),
        *(a.data_ptr(), a.shape, a.dtype),
        *(b.data_ptr(), b.dtype),
        None if copy is None else copy.data_ptr(),
        target.scaling,
    )
