"""The operations on weights as Triton kernels, for a GPU.

They write what `flatlora.ops.reference` defines: the same integers, the same normals to rounding.
How they come near the speed of a plain copy:

- One counter serves eight neighbouring elements, which one thread loads and stores as 16 bytes.
- The integers become uniforms by bit operations on a float's mantissa, and normals by the
  hardware's approximate ``lg2``, ``sqrt``, ``sin`` and ``cos`` (angles in ``[-pi, pi)``, where they
  are good to 1e-5).
- ``step`` and ``draw`` are read from device memory, the *clock*, so a captured CUDA graph draws
  anew when the clock has been set.

`flatlora.ops.sweep` launches all targets of a model at once; the kernels here are its parts and
what serves a single weight.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Interpreted kernels (tests without a GPU) know no inline assembly.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_FLAT_BLOCK = 128  # counters of a program that takes elements in stored order


@triton.jit
def philox_words(low, high, step, draw, key0, key1):
    """Philox4x32-7: four 32-bit words for each counter (low, high, step, draw)."""
    c0 = low
    c1 = high
    c2 = tl.zeros_like(low) + step
    c3 = tl.zeros_like(low) + draw
    k0 = tl.zeros_like(low) + key0
    k1 = tl.zeros_like(low) + key1
    for _ in tl.static_range(7):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(word, INTERPRET: tl.constexpr):
    """Two standard normals from one word: its low half is the radius, its high half the angle."""
    # The 16 bits become the top of a mantissa, so the float is 1 + uniform, exactly.
    one_plus_u = (((word & 0xFFFF) << 7) | 0x3F800040).to(tl.float32, bitcast=True)
    one_plus_v = (((word >> 16) << 7) | 0x3F800000).to(tl.float32, bitcast=True)
    u = one_plus_u - 1.0
    angle = (one_plus_v - 1.5) * 6.283185307179586
    if INTERPRET:
        radius = tl.sqrt(tl.log2(u) * -1.3862943611198906)
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
    else:
        log = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        radius = tl.inline_asm_elementwise(
            "sqrt.approx.f32 $0, $1;", "=f,f", [log * -1.3862943611198906],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        cosine = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        sine = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
    return radius * cosine, radius * sine


@triton.jit
def normals_of(counter, clock, key0, key1, INTERPRET: tl.constexpr):
    """The eight normals of each counter (int64 block index): ``[..., 8]``, in stored order."""
    step = tl.load(clock).to(tl.uint32)
    draw = tl.load(clock + 1).to(tl.uint32)
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(low, high, step, draw, key0.to(tl.uint32), key1.to(tl.uint32))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, j] is word 2 i + j
    cosine, sine = box_muller(words, INTERPRET)
    pairs = tl.join(cosine, sine)
    return tl.reshape(pairs, counter.shape + (8,))


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Round float32 to ``dtype``, to nearest even; the interpreter would truncate to bfloat16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def tile_of(rows, cols8, R: tl.constexpr, C8: tl.constexpr):
    """A program's rows, the counters of its ``R`` rows and ``8 C8`` columns, and which exist."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column8 = tl.program_id(1) * C8 + tl.arange(0, C8)
    inside = (row < rows)[:, None] & (column8 < cols8)[None, :]
    return row, row[:, None] * cols8 + column8[None, :], inside


@triton.jit
def store_noisy(
    clean, std, out, clock, key0, key1, row, counter, rows, inside, INTERPRET: tl.constexpr
):
    """``clean + std z``, where ``clean`` has the weights of a tile."""
    z = normals_of(counter, clock, key0, key1, INTERPRET)
    s = tl.load(std + row, mask=row < rows, other=0.0)
    index = counter[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    noisy = narrow(clean + s[:, None, None] * z, out.dtype.element_ty, INTERPRET)
    tl.store(out + index, noisy, mask=inside[:, :, None])


@triton.jit(do_not_specialize=["key0", "key1"])
def noisy_rows_kernel(
    weight, std, out, clock, key0, key1, rows, cols8,
    R: tl.constexpr, C8: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``W + std z``, ``R`` rows by ``8 C8`` columns; a row's length is a multiple of eight."""
    row, counter, inside = tile_of(rows, cols8, R, C8)
    index = counter[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    clean = tl.load(weight + index, mask=inside[:, :, None], other=0.0).to(tl.float32)
    store_noisy(clean, std, out, clock, key0, key1, row, counter, rows, inside, INTERPRET)


@triton.jit(do_not_specialize=["key0", "key1"])
def noisy_flat_kernel(
    weight, std, out, clock, key0, key1, total, cols, matrix,
    BY_ROW: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """``W + std z`` for any shape, element by element in stored order.

    ``std`` belongs to rows (``BY_ROW``) or to the columns of each of a stack of matrices that have
    ``matrix`` elements. ``EVEN`` promises that ``total`` and ``cols`` are multiples of eight.
    """
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = normals_of(counter, clock, key0, key1, INTERPRET)
    index = counter[:, None] * 8 + tl.arange(0, 8)[None, :]
    if EVEN:
        first = counter * 8
        inside = tl.broadcast_to((first < total)[:, None], index.shape)
        column = (first // matrix) * cols + first % cols
        unit = tl.multiple_of(column, 8)[:, None] + tl.arange(0, 8)[None, :]
    else:
        inside = index < total
        unit = index // cols if BY_ROW else (index // matrix) * cols + index % cols
    s = tl.load(std + unit, mask=inside, other=0.0)
    clean = tl.load(weight + index, mask=inside, other=0.0).to(tl.float32)
    noisy = narrow(clean + s * z, out.dtype.element_ty, INTERPRET)
    tl.store(out + index, noisy, mask=inside)


def launch_noisy_copy(
    weight: Tensor, std: Tensor, key: tuple[int, int], clock: Tensor, out: Tensor
) -> None:
    """Write ``W + std z`` to ``out``, on the current stream of the weight's device.

    Args:
        weight: ``(..., rows, cols)``, contiguous, float16, bfloat16 or float32.
        std: Float32, ``(..., rows, 1)`` or ``(..., 1, cols)``, contiguous.
        key: Key words of the layer's noise.
        clock: Int64 ``(2,)`` on the weight's device: step and draw.
        out: As the weight.
    """
    assert weight.is_contiguous(), "the noise is addressed in stored order"
    cols = weight.shape[-1]
    by_row = std.shape[-1] == 1 and std.shape[-2] == weight.shape[-2]
    rows = weight.numel() // cols
    with on_device_of(weight):
        if by_row and cols % 8 == 0:
            height, width = row_tile(cols // 8)
            grid = (triton.cdiv(rows, height), triton.cdiv(cols // 8, width))
            noisy_rows_kernel[grid](
                weight, std, out, clock, *key, rows, cols // 8,
                R=height, C8=width, INTERPRET=INTERPRETED, num_warps=4,
            )  # fmt: skip
        else:
            total = weight.numel()
            noisy_flat_kernel[(triton.cdiv(total, 8 * _FLAT_BLOCK),)](
                weight, std, out, clock, *key, total, cols, weight.shape[-2] * cols,
                BY_ROW=by_row, EVEN=not by_row and cols % 8 == 0, BLOCK=_FLAT_BLOCK,
                INTERPRET=INTERPRETED, num_warps=4,
            )  # fmt: skip


def row_tile(cols8: int) -> tuple[int, int]:
    """Rows and counters of a program of four warps: 16 elements a thread, measured best."""
    width = 128 if cols8 % 128 == 0 or cols8 >= 1024 else min(128, triton.next_power_of_2(cols8))
    return 256 // width, width


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which Triton, which launches on the current device, launches on the tensor's.

    An error of Triton's out of it tells how to do without.
    """
    return _LaunchOn(tensor.device) if tensor.is_cuda else nullcontext()


class _LaunchOn(torch.cuda.device):
    def __exit__(self, kind: Any, error: Any, traceback: Any) -> Any:
        add_way_out(error)
        return super().__exit__(kind, error, traceback)


def add_way_out(error: BaseException | None) -> None:
    """Note on an error of a launch, for example for want of a C compiler, what needs no Triton."""
    if isinstance(error, Exception) and not isinstance(error, torch.OutOfMemoryError):
        error.add_note(
            "flatlora could not launch a Triton kernel; FLATLORA_KERNELS=0 in the environment "
            "computes in plain PyTorch instead, slower"
        )
