"""Linear layers of bitsandbytes, whose frozen weights are stored as 4-bit or 8-bit codes.

bitsandbytes is never imported here: a model can only hold such a layer if it is loaded already.
"""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int8, Int64, Shaped
from torch import Tensor, nn

from flatlora.linear import autocast_dtype, bitsandbytes_kind
from flatlora.ops.quantised import (
    QUANT_TYPES,
    EightBit,
    FourBit,
    NestedScale,
    Quantised,
    dequantise,
    levels_of,
    noisy_dequantise,
)
from flatlora.weights import StoredWeight

_NOT_YET = "its weight is not quantised yet; move the model to its device first, which does it"


class QuantisedWeight(StoredWeight):
    """A frozen weight stored as codes and their scales; its noisy copy is dense.

    Args:
        module: The layer of bitsandbytes.
    """

    transposed = False

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def tensor(self) -> Shaped[Tensor, "..."]:
        """The codes."""
        tensor: Tensor = self.module.weight
        return tensor

    @abstractmethod
    def computes_in(self, x: Float[Tensor, "*batch in"]) -> torch.dtype:
        """Dtype of the product with ``x``; the layer gives its output back in that of ``x``."""

    @abstractmethod
    def stored(self, tensor: Shaped[Tensor, "..."]) -> Quantised:
        """Codes, as in `tensor`, together with what they mean."""

    def write_dense(self, out: Float[Tensor, "rows cols"]) -> None:
        """Write the clean matrix, which is stored nowhere, to ``out``."""
        dequantise(self.stored(self.tensor), out=out)

    def write_noisy(
        self,
        tensor: Shaped[Tensor, "..."],
        std: Float[Tensor, "rows 1"],
        key: tuple[int, int],
        clock: Int64[Tensor, "2"],
        out: Float[Tensor, "rows cols"],
    ) -> None:
        """See `StoredWeight`."""
        noisy_dequantise(self.stored(tensor), std, key, clock, out=out)


class FourBitWeight(QuantisedWeight):
    """The weight of a ``bitsandbytes.nn.Linear4bit``: ``nf4`` or ``fp4``, doubly quantised or not.

    ``W`` is the matrix that ``bitsandbytes.functional.dequantize_4bit`` returns, bit for bit, in
    the dtype that the weight had before it was quantised. Where the layer computes in another
    dtype, its noisy copy is rounded once more for each product.
    """

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix before it was quantised."""
        return torch.Size(self._state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix before it was quantised."""
        dtype: torch.dtype = self._state.dtype
        return dtype

    def computes_in(self, x: Float[Tensor, "*batch in"]) -> torch.dtype:
        """The layer's compute dtype; the first input decides where none was asked for."""
        if not self.module.compute_type_is_set:  # as the layer's own forward does
            self.module.set_compute_type(x)
            self.module.compute_type_is_set = True
        return self.module.compute_dtype or x.dtype

    def stored(self, tensor: Shaped[Tensor, "..."]) -> FourBit:
        """Packed codes with their scales."""
        state = self._state
        nested = None
        if state.nested:
            inner = state.state2
            nested = NestedScale(inner.code, inner.absmax, inner.blocksize, state.offset)
        return FourBit(
            packed=tensor.detach().view(-1).view(torch.uint8),
            levels=levels_of(state.quant_type, tensor.device),
            scale=state.absmax,
            blocksize=state.blocksize,
            nested=nested,
        )

    @property
    def _state(self) -> Any:
        return four_bit_state(self.module)


class EightBitWeight(QuantisedWeight):
    """The weight of a ``bitsandbytes.nn.Linear8bitLt`` (LLM.int8).

    ``W = codes * (scale / 127)``, the matrix that the layer's own backward pass multiplies by,
    rounded to float16, which bitsandbytes brings a weight to before it quantises it.

    A perturbed layer multiplies its input by the noisy matrix. LLM.int8's own forward rounds the
    *input* to eight bits as well, apart from outliers. So what a layer computes as sigma goes to 0
    does not tend to what it computes at 0: that error of the input, some 1 % of the output, is
    missing in between.
    """

    dtype = torch.float16

    @property
    def shape(self) -> torch.Size:
        """Shape of the codes."""
        return self.tensor.shape

    def computes_in(self, x: Float[Tensor, "*batch in"]) -> torch.dtype:
        """The input's dtype or, under autocast, autocast's."""
        return autocast_dtype(x)

    def stored(self, tensor: Int8[Tensor, "rows cols"]) -> EightBit:
        """Codes with the scales of their rows."""
        scale = eight_bit_scale(self.module)
        assert scale is not None, "quantised_fault() comes first"
        return EightBit(tensor.detach(), scale)


def quantised_weight(base: nn.Module) -> QuantisedWeight | None:
    """The stored weight of a layer of bitsandbytes, or None if it is no such layer."""
    kinds = {"4bit": FourBitWeight, "8bit": EightBitWeight}
    kind = bitsandbytes_kind(base)
    return None if kind is None else kinds[kind](base)


def quantised_fault(base: nn.Module) -> str | None:
    """What about the weight of a layer of bitsandbytes forbids a perturbation now, or None.

    Args:
        base: Any layer; only those of bitsandbytes can have such a fault.
    """
    find = {"4bit": _four_bit_fault, "8bit": _eight_bit_fault}
    kind = bitsandbytes_kind(base)
    return None if kind is None else _weight_fault(base) or find[kind](base)


def four_bit_state(base: Any) -> Any:
    """What bitsandbytes says of a 4-bit weight, or None before it is quantised."""
    # the layer keeps another reference, as a weight that is wrapped anew loses its own
    return getattr(base.weight, "quant_state", None) or base.quant_state


def is_packed_for_cpu(base: Any) -> bool:
    """Whether bitsandbytes has packed a 4-bit weight anew, for inference on this CPU."""
    state = getattr(base._parameters.get("weight"), "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


def eight_bit_scale(base: Any) -> Float[Tensor, " rows"] | None:
    """Scales of the rows of an 8-bit weight, which the layer's first forward moves elsewhere."""
    scale: Tensor | None = getattr(base.weight, "SCB", None)
    return base.state.SCB if scale is None else scale


def _weight_fault(base: Any) -> str | None:
    weight, kind = base.weight, type(base.weight).__name__
    if kind not in ("Params4bit", "Int8Params"):
        return f"weight is a {kind}; sharded quantised weights are not supported"
    if weight.is_meta:
        return "weight is on the meta device (offloaded or not loaded yet)"
    return None


def _four_bit_fault(base: Any) -> str | None:
    weight, state = base.weight, four_bit_state(base)
    if state is None:
        return _NOT_YET
    if is_packed_for_cpu(base):
        return (
            "bitsandbytes has packed its weight anew for inference on this CPU, as it does where a "
            "layer is called in evaluation mode, and cannot train with it; load the model again"
        )
    if state.quant_type not in QUANT_TYPES or state.blocksize % 8:
        return f"its weight is {state.quant_type} in blocks of {state.blocksize}; not supported"
    elements = torch.Size(state.shape).numel()
    if weight.numel() * weight.itemsize != (elements + 1) // 2:
        return f"its weight has not the codes of {elements} elements; is it sharded?"
    return _device_fault(weight, state.absmax)


def _eight_bit_fault(base: Any) -> str | None:
    if base.state.has_fp16_weights:
        return (
            "has_fp16_weights=True: its weight is quantised for each product anew; load the model "
            "in 8 bits, or take nn.Linear"
        )
    if base.weight.dtype != torch.int8:
        return _NOT_YET
    scale = eight_bit_scale(base)
    if scale is None:
        return "its weight has lost the scales of its rows (SCB); load the model again"
    return _device_fault(base.weight, scale)


def _device_fault(weight: Tensor, scale: Tensor) -> str | None:
    if weight.device != scale.device:
        return f"its codes are on {weight.device}, their scales on {scale.device}"
    return None
