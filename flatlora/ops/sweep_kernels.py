"""Row norms and noisy copies of all targets in one launch: the kernels of `flatlora.ops.sweep`.

The weights are cut into *units* of ``R`` rows by ``KC`` columns. A unit is worked on twice. First
its share of ``(W A^T)_i . B_i`` is summed; the last unit of a block of ``R`` rows to arrive turns
the block's sum into standard deviations and raises the block's flag. Then, ``lag`` units later,
the block's noisy copy is written. In between the unit still lies in the GPU's L2 cache, so the
weights come from memory once.

A program that waits for a flag has a higher number than those that raise it. GPUs start programs
in the order of their number (NVIDIA's do, without promising it), so these are running or done and
nobody waits for ever.
"""

import triton
import triton.language as tl

from flatlora.ops.kernels import narrow, normals_of

# Columns of the table of targets, which holds int64: addresses, key words, sizes.
WEIGHT, COPY, STD, SQUARE_NORM, A, B, A16, GRAM, KEY0, KEY1, ROWS, COLS, RANK = range(13)
FIELDS = 13

_WEIGHT: tl.constexpr = tl.constexpr(WEIGHT)
_COPY: tl.constexpr = tl.constexpr(COPY)
_STD: tl.constexpr = tl.constexpr(STD)
_SQUARE_NORM: tl.constexpr = tl.constexpr(SQUARE_NORM)
_A: tl.constexpr = tl.constexpr(A)
_B: tl.constexpr = tl.constexpr(B)
_A16: tl.constexpr = tl.constexpr(A16)
_GRAM: tl.constexpr = tl.constexpr(GRAM)
_KEY0: tl.constexpr = tl.constexpr(KEY0)
_KEY1: tl.constexpr = tl.constexpr(KEY1)
_ROWS: tl.constexpr = tl.constexpr(ROWS)
_COLS: tl.constexpr = tl.constexpr(COLS)
_RANK: tl.constexpr = tl.constexpr(RANK)
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)


@triton.jit
def _pointer(entry, dtype: tl.constexpr):
    # an address from a table has lost the alignment that wide loads need to know of
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _dot(x, y, accumulator, INTERPRET: tl.constexpr):
    if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
        result = tl.dot(x.to(tl.float32), y.to(tl.float32), accumulator, input_precision="ieee")
    else:
        result = tl.dot(x, y, accumulator)
    return result


@triton.jit
def adapters_kernel(
    targets,
    DTYPE: tl.constexpr, ADAPTER: tl.constexpr, RP: tl.constexpr, BK: tl.constexpr,
    ROUNDED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute each ``A A^T``, with ``A`` rounded to the weights' dtype and padded to ``RP`` rows.

    With ``ROUNDED`` that ``A`` is written too.
    """
    entry = targets + tl.program_id(0) * _FIELDS
    cols = tl.multiple_of(tl.load(entry + _COLS), 8)
    rank = tl.load(entry + _RANK)
    unit = tl.arange(0, RP)
    gram = tl.zeros([RP, RP], tl.float32)
    for start in range(0, cols, BK):
        k = start + tl.arange(0, BK)
        place = unit[:, None] * cols + k[None, :]
        inside = (k < cols)[None, :]
        x = tl.load(
            _pointer(entry + _A, ADAPTER) + place,
            mask=inside & (unit < rank)[:, None], other=0.0,
        )  # fmt: skip
        x = narrow(x.to(tl.float32), DTYPE, INTERPRET)
        if ROUNDED:
            tl.store(_pointer(entry + _A16, DTYPE) + place, x, mask=inside)
        gram = _dot(x, tl.trans(x), gram, INTERPRET)
    square = unit[:, None] * RP + unit[None, :]
    tl.store(_pointer(entry + _GRAM, tl.float32) + square, gram)


@triton.jit
def _share(
    entry, block, chunk, b,
    DTYPE: tl.constexpr, ADAPTER: tl.constexpr, RP: tl.constexpr, R: tl.constexpr,
    KC: tl.constexpr, BK: tl.constexpr, ROUNDED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One unit's share of ``(W A^T)_i . B_i``, for the rows of a block."""
    rows = tl.load(entry + _ROWS)
    cols = tl.multiple_of(tl.load(entry + _COLS), 8)
    weight = _pointer(entry + _WEIGHT, DTYPE)
    row = block.to(tl.int64) * R + tl.arange(0, R)
    r = tl.arange(0, RP)
    product = tl.zeros([R, RP], tl.float32)
    for start in range(0, KC, BK):
        k = chunk * KC + start + tl.arange(0, BK)
        w = tl.load(
            weight + row[:, None] * cols + k[None, :],
            mask=(row < rows)[:, None] & (k < cols)[None, :], other=0.0,
        )  # fmt: skip
        place = r[None, :] * cols + k[:, None]
        if ROUNDED:
            a = tl.load(_pointer(entry + _A16, DTYPE) + place, mask=(k < cols)[:, None], other=0.0)
        else:
            inside = (k < cols)[:, None] & (r < tl.load(entry + _RANK))[None, :]
            a = tl.load(_pointer(entry + _A, ADAPTER) + place, mask=inside, other=0.0)
            a = narrow(a.to(tl.float32), DTYPE, INTERPRET)
        product = _dot(w, a, product, INTERPRET)
    return tl.sum(product * b, axis=1)


@triton.jit
def _adapter_rows(entry, block, ADAPTER: tl.constexpr, RP: tl.constexpr, R: tl.constexpr):
    """The rows of ``B`` that belong to a block, float32."""
    rank = tl.load(entry + _RANK)
    row = block.to(tl.int64) * R + tl.arange(0, R)
    r = tl.arange(0, RP)
    inside = (row < tl.load(entry + _ROWS))[:, None] & (r < rank)[None, :]
    place = row[:, None] * rank + r[None, :]
    return tl.load(_pointer(entry + _B, ADAPTER) + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_std(
    entry, factors, target, block, b, cross, sigma,
    RP: tl.constexpr, R: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Turn a block's sums into standard deviations."""
    row = block.to(tl.int64) * R + tl.arange(0, R)
    inside = row < tl.load(entry + _ROWS)
    r = tl.arange(0, RP)
    gram = tl.load(_pointer(entry + _GRAM, tl.float32) + r[:, None] * RP + r[None, :])
    product = tl.dot(b, gram, input_precision="ieee" if INTERPRET else "tf32x3")
    update = tl.sum(product * b, axis=1)
    s = tl.load(factors + target * 2)
    scale = tl.load(factors + target * 2 + 1) * sigma
    clean = tl.load(_pointer(entry + _SQUARE_NORM, tl.float32) + row, mask=inside, other=0.0)
    merged = clean + 2.0 * s * cross + s * s * update
    # rounding can push the sum below zero where the update cancels the weight
    std = tl.sqrt(tl.maximum(merged, 0.0)) * scale
    tl.store(_pointer(entry + _STD, tl.float32) + row, std, mask=inside)


@triton.jit(do_not_specialize=["sigma"])
def norms_kernel(
    targets, factors, blocks, sigma,
    DTYPE: tl.constexpr, ADAPTER: tl.constexpr, RP: tl.constexpr, R: tl.constexpr,
    KC: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Standard deviations alone: a program does all units of a block, in their order.

    It adds what `sweep_kernel` adds, in the same order, so the results are the same bits; and it
    needs no memory for what several programs would hand to each other.
    """
    target = tl.load(blocks + tl.program_id(0) * 2)
    block = tl.load(blocks + tl.program_id(0) * 2 + 1)
    entry = targets + target * _FIELDS
    b = _adapter_rows(entry, block, ADAPTER, RP, R)
    cross = tl.zeros([R], tl.float32)
    for chunk in range(0, tl.cdiv(tl.load(entry + _COLS), KC)):
        cross += _share(
            entry, block, chunk, b, DTYPE, ADAPTER, RP, R, KC, BK, False, INTERPRET
        )  # fmt: skip
    _store_std(entry, factors, target, block, b, cross, sigma, RP, R, INTERPRET)


@triton.jit
def _norm_unit(
    targets, factors, units, partial, arrived, ready, unit, epoch, sigma,
    DTYPE: tl.constexpr, ADAPTER: tl.constexpr, RP: tl.constexpr,
    R: tl.constexpr, KC: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    target = tl.load(units + unit * 4)
    block = tl.load(units + unit * 4 + 1)
    chunk = tl.load(units + unit * 4 + 2)
    flag = tl.load(units + unit * 4 + 3)
    entry = targets + target * _FIELDS
    b = _adapter_rows(entry, block, ADAPTER, RP, R)
    share = _share(entry, block, chunk, b, DTYPE, ADAPTER, RP, R, KC, BK, True, INTERPRET)
    lane = tl.arange(0, R)
    tl.store(partial + unit.to(tl.int64) * R + lane, share)
    tl.debug_barrier()
    chunks = tl.cdiv(tl.load(entry + _COLS), KC)
    if tl.atomic_add(arrived + flag, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrived + flag, 0)
        first = (unit - chunk).to(tl.int64)
        cross = tl.zeros([R], tl.float32)
        for i in range(0, chunks):
            cross += tl.load(partial + (first + i) * R + lane, cache_modifier=".cg")
        _store_std(entry, factors, target, block, b, cross, sigma, RP, R, INTERPRET)
        tl.debug_barrier()
        tl.atomic_xchg(ready + flag, epoch, sem="release")


@triton.jit
def _copy_tile(
    targets, units, ready, clock, unit, tile, epoch,
    DTYPE: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, C8: tl.constexpr,
    NARROW: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    target = tl.load(units + unit * 4)
    block = tl.load(units + unit * 4 + 1)
    chunk = tl.load(units + unit * 4 + 2)
    flag = tl.load(units + unit * 4 + 3)
    entry = targets + target * _FIELDS
    rows = tl.load(entry + _ROWS)
    cols8 = (tl.load(entry + _COLS) // 8).to(tl.int32)
    # counters of the block of rows, whatever row they lie in
    first = (chunk * TILES + tile) * C8
    local = first + tl.arange(0, C8)
    height = tl.minimum(rows - block * R, R).to(tl.int32)
    inside = local < height * cols8
    start = block.to(tl.int64) * R * cols8
    counter = start + local
    index = local[:, None] * 8 + tl.arange(0, 8)[None, :]
    weight = tl.multiple_of(_pointer(entry + _WEIGHT, DTYPE) + start * 8, 16)
    clean = tl.load(
        weight + index, mask=inside[:, None], other=0.0, eviction_policy="evict_first"
    ).to(tl.float32)
    z = normals_of(counter, clock, tl.load(entry + _KEY0), tl.load(entry + _KEY1), INTERPRET)
    while tl.atomic_add(ready + flag, 0, sem="acquire") < epoch:
        pass
    if NARROW:
        row = local // cols8
    else:  # a tile meets two rows at most
        row = first // cols8
        row = tl.where(local >= (row + 1) * cols8, row + 1, row)
    std = _pointer(entry + _STD, tl.float32) + block.to(tl.int64) * R
    s = tl.load(std + row, mask=inside, other=0.0, cache_modifier=".cg")
    copy = tl.multiple_of(_pointer(entry + _COPY, DTYPE) + start * 8, 16)
    noisy = narrow(clean + s[:, None] * z, DTYPE, INTERPRET)
    tl.store(copy + index, noisy, mask=inside[:, None], eviction_policy="evict_first")


@triton.jit(do_not_specialize=["count", "lag", "epoch", "sigma"])
def sweep_kernel(
    targets, factors, units, partial, arrived, ready, clock, count, lag, epoch, sigma,
    DTYPE: tl.constexpr, ADAPTER: tl.constexpr, RP: tl.constexpr, R: tl.constexpr,
    KC: tl.constexpr, BK: tl.constexpr, C8: tl.constexpr, TILES: tl.constexpr,
    NARROW: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Standard deviations of all rows and, ``lag`` units behind, all noisy copies."""
    program = tl.program_id(0)
    unit = program // (TILES + 1)
    part = program % (TILES + 1)
    if part == 0:
        if unit < count:
            _norm_unit(
                targets, factors, units, partial, arrived, ready, unit, epoch, sigma,
                DTYPE, ADAPTER, RP, R, KC, BK, INTERPRET,
            )  # fmt: skip
    elif unit >= lag:
        _copy_tile(
            targets, units, ready, clock, unit - lag, part - 1, epoch,
            DTYPE, R, TILES, C8, NARROW, INTERPRET,
        )  # fmt: skip
