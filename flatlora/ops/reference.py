"""The operations on weights, in plain PyTorch: the definition of correct.

How one element of a weight gets its standard normal, given the layer's `Stream`:

- Elements are numbered in row-major order of the weight as it is *stored* (``out x in`` for a
  linear layer, ``in x out`` for GPT-2's ``Conv1D``). Eight neighbours share one counter: element
  ``i`` is number ``i % 8`` of block ``i // 8``.
- Word ``k`` (0 to 3) of the block's Philox output makes normals ``2k`` and ``2k + 1`` by
  Box-Muller: with ``lo`` its low and ``hi`` its high 16 bits,
  ``r = sqrt(-2 ln((lo + 0.5) / 65536))`` and ``angle = 2 pi hi / 65536 - pi``, they are
  ``r cos(angle)`` and ``r sin(angle)``.
- ``r``, ``cos`` and ``sin`` are rounded to float32 once, so they are read from tables of 65,536
  entries and the normals are the same bits on every device. Their product is rounded to float32.

What 16-bit uniforms cost: ``|z| <= sqrt(-2 ln(0.5 / 65536)) = 4.855`` (a true normal passes that
once in 830,000 draws), the variance is ``1 - 5.3e-6``, mean and all odd moments are exactly 0.

The noisy weight is ``W + std * z``: product and sum each rounded to float32 (float64 for a
float64 weight), then once to the weight's dtype.
"""

import math
from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from flatlora.ops.philox import Stream, philox4x32_

_BLOCK = 8
_LEVELS = 1 << 16
# About 8 MiB of scratch: big enough to share an operation between threads, small enough for caches.
_CHUNK = 1 << 19
# A GPU needs more work per launch; some 300 MiB of scratch at most.
_CUDA_CHUNK = 1 << 22


def standard_normals(
    stream: Stream, start: int, count: int, device: torch.device
) -> Float32[Tensor, " count"]:
    """The normals of elements ``start`` to ``start + count`` of a layer.

    Args:
        stream: Address of the layer's noise.
        start: Number of the first element, in stored order.
        count: How many elements.
        device: Where to compute them; the bits are the same everywhere.

    Returns:
        Standard normals, float32.
    """
    first = start // _BLOCK
    blocks = -(-(start + count) // _BLOCK) - first
    words = _random_words(stream, first, blocks, device)
    radius, cosine, sine = _tables(device)
    normals = torch.empty(blocks, _BLOCK, dtype=torch.float32, device=device)
    for k, word in enumerate(words):
        r = radius.index_select(0, word & (_LEVELS - 1))
        angle = word.bitwise_right_shift_(16)
        torch.mul(r, cosine.index_select(0, angle), out=normals[:, 2 * k])
        torch.mul(r, sine.index_select(0, angle), out=normals[:, 2 * k + 1])
    offset = start - first * _BLOCK
    return normals.view(-1)[offset : offset + count]


def _random_words(
    stream: Stream, first: int, blocks: int, device: torch.device
) -> tuple[Tensor, ...]:
    index = torch.arange(first, first + blocks, dtype=torch.int64, device=device)
    counter = (
        index & 0xFFFFFFFF,
        index >> 32,
        torch.full_like(index, stream.step),
        torch.full_like(index, stream.draw),
    )
    return philox4x32_(counter, stream.key)


@cache
def _tables(
    device: torch.device,
) -> tuple[Float32[Tensor, " levels"], Float32[Tensor, " levels"], Float32[Tensor, " levels"]]:
    """Box-Muller's radius by the low half word, its cosine and sine by the high one.

    Computed on the CPU whatever torch's default device, as the bits are part of the contract.
    """
    low = torch.arange(_LEVELS, dtype=torch.float64, device="cpu")
    radius = torch.sqrt(-2.0 * torch.log((low + 0.5) / _LEVELS))
    # One quarter wave, mirrored: so the zeros are exact and every moment that should vanish does.
    steps = torch.arange(_LEVELS // 4 + 1, dtype=torch.float64, device="cpu")
    quarter = torch.sin(steps * (2 * math.pi / _LEVELS))
    half = torch.cat([quarter[:-1], quarter.flip(0)[:-1]])
    sine = torch.cat([0.0 - half, half])
    cosine = sine.roll(-_LEVELS // 4)
    return radius.float().to(device), cosine.float().to(device), sine.float().to(device)


@torch.no_grad()
def noisy_copy(
    weight: Float[Tensor, "*stack rows cols"],
    std: Float[Tensor, "*#stack #rows #cols"],
    stream: Stream,
    *,
    out: Float[Tensor, "*stack rows cols"],
) -> Float[Tensor, "*stack rows cols"]:
    """Write ``W + std * z`` to ``out``; ``W`` is only read.

    Args:
        weight: Frozen base weight as stored.
        std: Standard deviation of the noise, see `merged_row_std`.
        stream: Address of the layer's noise.
        out: Where the noisy weight goes, with the weight's dtype and device.

    Returns:
        ``out``.
    """
    stack, noisy = _stack(weight), _stack(out)
    deviations = _stack(std).expand(len(stack), -1, -1)
    _, height, cols = stack.shape
    for matrices, rows in _chunks(stack):
        clean, deviation = stack[matrices, rows], deviations[matrices]
        start = (matrices.start * height + rows.start) * cols
        normals = standard_normals(stream, start, clean.numel(), weight.device)
        noise = normals.view_as(clean).to(std.dtype)
        noise *= deviation[:, rows] if deviation.shape[1] > 1 else deviation
        noisy[matrices, rows] = noise.add_(clean)
    return out


def _stack(tensor: Tensor) -> Float[Tensor, "stack rows cols"]:
    return tensor.view(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


@torch.no_grad()
def row_square_norm(
    weight: Float[Tensor, "*stack rows cols"], *, transposed: bool
) -> Float[Tensor, "*stack out"]:
    """``||W_i||_2^2`` for every output unit ``i`` of a weight, or of each matrix of a stack.

    Args:
        weight: Base weight as stored; read in chunks, so that no full copy in float32 exists.
        transposed: Whether it is stored ``in x out``.

    Returns:
        One value per output unit, float32 (float64 for a float64 weight).
    """
    stack, out = _stack(weight), weight.shape[-1 if transposed else -2]
    norm = torch.zeros(len(stack), out, dtype=_compute_dtype(weight), device=weight.device)
    for matrices, rows in _chunks(stack):
        square = stack[matrices, rows].to(norm.dtype).square()
        if transposed:
            norm[matrices] += square.sum(dim=1)
        else:
            norm[matrices, rows] = square.sum(dim=2)
    return norm.view(*weight.shape[:-2], out)


@torch.no_grad()
def merged_row_std(
    weight: Float[Tensor, "*stack rows cols"],
    square_norm: Float[Tensor, "*stack out"],
    lora_a: Float[Tensor, "*stack rank in"],
    lora_b: Float[Tensor, "*stack out rank"],
    *,
    scaling: float,
    sigma: float,
    transposed: bool,
) -> Float[Tensor, "*stack #rows #cols"]:
    """Standard deviation of the noise for each output unit of a merged LoRA weight.

    With ``W' = W + s B A`` and ``n`` input features, output unit ``i`` gets
    ``sigma / sqrt(n) * ||W'_i||_2`` (arXiv 2409.14396, equation 8). ``W'`` is never built:
    ``||W'_i||^2 = ||W_i||^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T``. In a stack this holds
    for each matrix.

    Args:
        weight: Frozen base weight ``W`` as stored.
        square_norm: ``||W_i||^2`` from `row_square_norm`.
        lora_a: Down projection ``A``.
        lora_b: Up projection ``B``.
        scaling: ``s``, ``alpha / rank`` for plain LoRA.
        sigma: Strength at this step.
        transposed: Whether ``W`` is stored ``in x out``.

    Returns:
        Float32 (float64 for a float64 weight), shaped to broadcast against the stored weight:
        ``(*stack, out, 1)``, or ``(*stack, 1, out)`` if transposed.
    """
    a, b = lora_a.to(square_norm.dtype), lora_b.to(square_norm.dtype)
    cross = (_times_lora_a(weight, a, transposed=transposed) * b).sum(dim=-1)
    update = (b @ (a @ a.mT) * b).sum(dim=-1)
    merged = square_norm + 2 * scaling * cross + scaling**2 * update
    # rounding can push the sum below zero where the update cancels the weight
    std = merged.clamp_min_(0).sqrt_() * (sigma / math.sqrt(a.shape[-1]))
    return std.unsqueeze(-2 if transposed else -1)


def _times_lora_a(
    weight: Float[Tensor, "*stack rows cols"],
    lora_a: Float[Tensor, "*stack rank in"],
    *,
    transposed: bool,
) -> Float[Tensor, "*stack out rank"]:
    """``W A^T`` with ``W`` brought to the precision of ``A`` chunk by chunk."""
    stack, a = _stack(weight), lora_a.reshape(-1, *lora_a.shape[-2:])
    out = stack.shape[2 if transposed else 1]
    product = a.new_zeros(len(stack), out, a.shape[1])
    for matrices, rows in _chunks(stack):
        part = stack[matrices, rows].to(a.dtype)
        if transposed:
            product[matrices] += (a[matrices, :, rows] @ part).mT
        else:
            product[matrices, rows] = part @ a[matrices].mT
    return product.view(*weight.shape[:-2], out, -1)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _chunks(stack: Float[Tensor, "stack rows cols"]) -> Iterator[tuple[slice, slice]]:
    """Parts of bounded size, as slices of matrices and rows: whole matrices, or rows of one."""
    matrices, rows, cols = stack.shape
    if stack.numel() == 0:
        return
    size = _CUDA_CHUNK if stack.is_cuda else _CHUNK
    depth, height = max(1, size // (rows * cols)), min(rows, max(1, size // cols))
    for first in range(0, matrices, depth):
        for start in range(0, rows, height):
            yield slice(first, first + depth), slice(start, min(start + height, rows))
