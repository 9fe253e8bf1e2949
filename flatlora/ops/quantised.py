"""Quantised weights, in the forms that bitsandbytes stores them: what they mean, and their noise.

A quantised weight *means* its dequantised matrix ``W``, rounded to the dtype that the matrix is
written in. Its noisy copy is ``W + std * z``, with the elements numbered as in a dense weight: the
noise of a layer is the same however its weight is stored.

The reference in plain PyTorch stands here; `flatlora.ops.quantised_kernels` does the same in one
pass over the codes, on a GPU.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Float32, Int8, Int64, UInt8
from torch import Tensor

from flatlora import ops

# Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E: quantiles of a normal distribution.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' float with two exponent bits and one of mantissa, divided by its largest value.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in _FP4_MAGNITUDES)
_LEVELS = {"nf4": _NF4, "fp4": _FP4}

QUANT_TYPES = tuple(_LEVELS)

# A code of LLM.int8 counts in 127ths of its row's scale.
INT8_STEP = 1 / 127

_CHUNK = 1 << 20


@dataclass(frozen=True)
class NestedScale:
    """How the scales of a doubly quantised weight are themselves stored.

    The scale of block ``b`` is ``levels[codes[b]] * scale[b // blocksize] + offset``.

    Attributes:
        levels: What each code stands for.
        scale: Scale of each block of scales.
        blocksize: Scales in such a block.
        offset: Mean of the scales, a tensor without dimensions.
    """

    levels: Float32[Tensor, "256"]
    scale: Float32[Tensor, " outer"]
    blocksize: int
    offset: Float32[Tensor, ""]


@dataclass(frozen=True)
class FourBit:
    """A matrix of 4-bit codes with one scale for each block of neighbouring elements.

    Attributes:
        packed: Two codes a byte, the first in the high half, in row-major order of the matrix.
        levels: What each code stands for, see `levels_of`.
        scale: Scale of each block or, where ``nested``, its code.
        blocksize: Elements in a block, a multiple of eight.
        nested: How the scales are stored, where they are quantised too.
    """

    packed: UInt8[Tensor, " bytes"]
    levels: Float32[Tensor, "16"]
    scale: Float32[Tensor, " blocks"] | UInt8[Tensor, " blocks"]
    blocksize: int
    nested: NestedScale | None = None


@dataclass(frozen=True)
class EightBit:
    """A matrix of 8-bit codes with one scale for each row.

    ``W = codes * (scale / 127)``, in the order that bitsandbytes computes it in for its own
    backward pass.

    Attributes:
        codes: Integers from -127 to 127.
        scale: Largest magnitude of each row.
    """

    codes: Int8[Tensor, "rows cols"]
    scale: Float32[Tensor, " rows"]


Quantised = FourBit | EightBit


def levels_of(quant_type: str, device: torch.device) -> Float32[Tensor, "16"]:
    """What the sixteen codes of ``"nf4"`` or ``"fp4"`` stand for; not to be written to."""
    return _levels(quant_type, device)


@cache
def _levels(quant_type: str, device: torch.device) -> Tensor:
    return torch.tensor(_LEVELS[quant_type], dtype=torch.float32, device=device)


@torch.no_grad()
def dequantise(weight: Quantised, *, out: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """Write ``W`` to ``out``, rounded to its dtype.

    Args:
        weight: What is stored; only read.
        out: Where the matrix goes, contiguous and on the weight's device.

    Returns:
        ``out``.
    """
    if isinstance(weight, EightBit):
        return torch.mul(weight.codes, (weight.scale * INT8_STEP).unsqueeze(1), out=out)
    if ops.kernels_serve(out):
        from flatlora.ops.quantised_kernels import launch_dequantise

        launch_dequantise(weight, out)
    else:
        _dequantise_blocks(weight, out.view(-1))
    return out


@torch.no_grad()
def noisy_dequantise(
    weight: Quantised,
    std: Float32[Tensor, "rows 1"],
    key: tuple[int, int],
    clock: Int64[Tensor, "2"],
    *,
    out: Float[Tensor, "rows cols"],
) -> Float[Tensor, "rows cols"]:
    """Write ``W + std * z`` to ``out``, where ``W`` is what `dequantise` writes.

    Args:
        weight: What is stored; only read.
        std: Standard deviation of each row's noise.
        key: Key words of the layer's noise.
        clock: Step and draw, on the weight's device.
        out: Where the noisy matrix goes, contiguous and on the weight's device.

    Returns:
        ``out``.
    """
    if ops.kernels_serve(out) and out.shape[1] % 8 == 0:
        from flatlora.ops.quantised_kernels import launch_noisy_dequantise

        launch_noisy_dequantise(weight, std, key, clock, out)
        return out
    dequantise(weight, out=out)
    return ops.noisy_copy_at(out, std, key, clock, out=out)


def _dequantise_blocks(weight: FourBit, out: Float[Tensor, " elements"]) -> None:
    """The reference of 4 bits, some whole blocks at a time."""
    size = weight.blocksize
    height = max(1, _CHUNK // size)
    for first in range(0, len(weight.scale), height):
        scale = _scale(weight, slice(first, first + height))
        start = first * size
        stop = min(start + len(scale) * size, len(out))
        byte = weight.packed[start // 2 : (stop + 1) // 2]
        codes = torch.stack([byte >> 4, byte & 15], dim=1).view(-1)[: stop - start]
        values = weight.levels.index_select(0, codes.int())
        out[start:stop] = values.mul_(scale.repeat_interleave(size)[: stop - start])


def _scale(weight: FourBit, blocks: slice) -> Float32[Tensor, " some"]:
    """The scales of some blocks: product and sum each rounded to float32."""
    nested = weight.nested
    if nested is None:
        return weight.scale[blocks]
    codes = weight.scale[blocks]
    index = torch.arange(blocks.start, blocks.start + len(codes), device=codes.device)
    outer = nested.scale.index_select(0, index // nested.blocksize)
    return nested.levels.index_select(0, codes.int()).mul_(outer).add_(nested.offset)
