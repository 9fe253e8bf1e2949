"""Dequantise and perturb in one pass over the codes, as Triton kernels.

They write what `flatlora.ops.quantised` defines. The eight elements of a noise counter are one
32-bit word of 4-bit codes and lie in one block, so that a thread reads one word and one scale for
each counter and nothing else of the weight. The rest is as in `flatlora.ops.kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatlora.ops.kernels import (
    INTERPRETED,
    narrow,
    on_device_of,
    row_tile,
    store_noisy,
    tile_of,
)
from flatlora.ops.quantised import INT8_STEP, FourBit, Quantised

_INT8_STEP = tl.constexpr(INT8_STEP)

_FLAT_BLOCK = 256  # counters of a program that takes elements in stored order


@triton.jit
def product(x, y, INTERPRET: tl.constexpr):
    """``x * y`` rounded to float32, also where a sum follows; the compiler would fuse the two."""
    if INTERPRET:
        result = x * y
    else:
        result = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def scale_of(
    block, scale, levels2, scale2, offset, inside, BLOCKSIZE2: tl.constexpr, INTERPRET: tl.constexpr
):
    """The scale of each block; ``BLOCKSIZE2`` is 0 where scales are not quantised."""
    if BLOCKSIZE2 == 0:
        result = tl.load(scale + block, mask=inside, other=0.0)
    else:
        code = tl.load(scale + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(scale2 + block // BLOCKSIZE2, mask=inside, other=0.0)
        result = product(tl.load(levels2 + code), outer, INTERPRET) + tl.load(offset)
    return result


@triton.jit
def four_bit_values(
    word, counter, levels, scale, levels2, scale2, offset, inside, dtype: tl.constexpr,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The eight weights of each word of codes, ``[..., 8]``: float32, rounded to ``dtype``."""
    # Byte k of a word has element 2k in its high half.
    shift = (tl.arange(0, 8) ^ 1).to(tl.uint32) * 4
    code = (tl.expand_dims(word, -1) >> shift) & 15
    block = counter // (BLOCKSIZE // 8)
    s = scale_of(block, scale, levels2, scale2, offset, inside, BLOCKSIZE2, INTERPRET)
    value = product(tl.load(levels + code.to(tl.int32)), tl.expand_dims(s, -1), INTERPRET)
    return narrow(value, dtype, INTERPRET).to(tl.float32)


@triton.jit
def word_of(packed, counter, size):
    """The word of codes of each counter: ``packed`` as int32 or, if it has a rest, as bytes."""
    if packed.dtype.element_ty == tl.int32:
        word = tl.load(packed + counter, mask=counter * 4 < size, other=0)
        result = word.to(tl.uint32, bitcast=True)
    else:
        result = tl.zeros_like(counter).to(tl.uint32)
        for k in tl.static_range(4):
            byte = tl.load(packed + counter * 4 + k, mask=counter * 4 + k < size, other=0)
            result = result | (byte.to(tl.uint32) << (8 * k))
    return result


@triton.jit
def dequantise_kernel(
    packed, levels, scale, levels2, scale2, offset, out, total, size,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """``W`` of any shape, in stored order."""
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = counter[:, None] * 8 + tl.arange(0, 8)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    word = word_of(packed, counter, size)
    value = four_bit_values(
        word, counter, levels, scale, levels2, scale2, offset, counter * 8 < total, dtype,
        BLOCKSIZE, BLOCKSIZE2, INTERPRET,
    )  # fmt: skip
    tl.store(out + index, narrow(value, dtype, INTERPRET), mask=index < total)


@triton.jit(do_not_specialize=["key0", "key1"])
def noisy_four_bit_kernel(
    packed, levels, scale, levels2, scale2, offset, std, out, clock, key0, key1,
    rows, cols8, size, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    R: tl.constexpr, C8: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``W + std z`` from 4-bit codes, for whole rows whose length is a multiple of eight."""
    row, counter, inside = tile_of(rows, cols8, R, C8)
    word = word_of(packed, tl.where(inside, counter, 0), size)
    clean = four_bit_values(
        word, counter, levels, scale, levels2, scale2, offset, inside, out.dtype.element_ty,
        BLOCKSIZE, BLOCKSIZE2, INTERPRET,
    )  # fmt: skip
    store_noisy(clean, std, out, clock, key0, key1, row, counter, rows, inside, INTERPRET)


@triton.jit(do_not_specialize=["key0", "key1"])
def noisy_eight_bit_kernel(
    codes, scale, std, out, clock, key0, key1, rows, cols8,
    R: tl.constexpr, C8: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``W + std z`` from 8-bit codes, for whole rows whose length is a multiple of eight."""
    row, counter, inside = tile_of(rows, cols8, R, C8)
    index = counter[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    code = tl.load(codes + index, mask=inside[:, :, None], other=0).to(tl.float32)
    step = tl.load(scale + row, mask=row < rows, other=0.0) * _INT8_STEP
    value = product(code, step[:, None, None], INTERPRET)
    clean = narrow(value, out.dtype.element_ty, INTERPRET).to(tl.float32)
    store_noisy(clean, std, out, clock, key0, key1, row, counter, rows, inside, INTERPRET)


def launch_dequantise(weight: FourBit, out: Tensor) -> None:
    """Write ``W`` to ``out``, on the current stream of its device.

    Args:
        weight: What is stored.
        out: ``(rows, cols)``, contiguous, float16, bfloat16 or float32.
    """
    total = out.numel()
    grid = (triton.cdiv(total, 8 * _FLAT_BLOCK),)
    with on_device_of(out):
        dequantise_kernel[grid](
            *_pointers(weight), out, total, weight.packed.numel(), **_blocksizes(weight),
            BLOCK=_FLAT_BLOCK, INTERPRET=INTERPRETED, num_warps=4,
        )  # fmt: skip
    torch.autograd.graph.increment_version([out])  # torch has not seen the writing


def launch_noisy_dequantise(
    weight: Quantised, std: Tensor, key: tuple[int, int], clock: Tensor, out: Tensor
) -> None:
    """Write ``W + std z`` to ``out``, on the current stream of its device.

    Args:
        weight: What is stored.
        std: Float32, ``(rows, 1)``, contiguous.
        key: Key words of the layer's noise.
        clock: Int64 ``(2,)``: step and draw.
        out: ``(rows, cols)``, contiguous, float16, bfloat16 or float32; ``cols`` is a multiple of
            eight.
    """
    rows, cols8 = out.shape[0], out.shape[1] // 8
    height, width = row_tile(cols8)
    grid = (triton.cdiv(rows, height), triton.cdiv(cols8, width))
    tile = {"R": height, "C8": width, "INTERPRET": INTERPRETED, "num_warps": 4}
    with on_device_of(out):
        if isinstance(weight, FourBit):
            noisy_four_bit_kernel[grid](
                *_pointers(weight), std, out, clock, *key, rows, cols8, weight.packed.numel(),
                **_blocksizes(weight), **tile,
            )  # fmt: skip
        else:
            noisy_eight_bit_kernel[grid](
                weight.codes, weight.scale, std, out, clock, *key, rows, cols8, **tile
            )
    torch.autograd.graph.increment_version([out])  # torch has not seen the writing


def _pointers(weight: FourBit) -> tuple[Tensor | None, ...]:
    nested = weight.nested
    inner = (None,) * 3 if nested is None else (nested.levels, nested.scale, nested.offset)
    return (_words(weight.packed), weight.levels, weight.scale, *inner)


def _blocksizes(weight: FourBit) -> dict[str, int]:
    return {
        "BLOCKSIZE": weight.blocksize,
        "BLOCKSIZE2": 0 if weight.nested is None else weight.nested.blocksize,
    }


def _words(packed: Tensor) -> Tensor:
    """Packed codes as int32 words, where they are whole and aligned words."""
    whole = packed.numel() % 4 == 0 and packed.data_ptr() % 4 == 0
    return packed.view(torch.int32) if whole else packed
