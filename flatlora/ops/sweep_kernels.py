"""Row norms and noisy copies of all targets in one launch: the kernels of `flatlora.ops.sweep`.

The weights are cut into *units* of ``R`` rows by ``KC`` columns. A unit is worked on twice. First
its share of ``(W A^T)_i . B_i`` is summed; the last unit of a block of ``R`` rows to arrive turns
the block's sum into standard deviations and raises the block's flag. Then, ``lag`` units later,
the block's noisy copy is written. In between the unit still lies in the GPU's L2 cache, so the
weights come from memory once.

Programs start in the order of their number, and one that waits for a flag has a higher number
than those that raise it: they are running or done, so nobody waits for ever.
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
    targets, partial, arrived,
    DTYPE: tl.constexpr, ADAPTER: tl.constexpr, RP: tl.constexpr,
    KC: tl.constexpr, BK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Round each ``A`` to the weights' dtype, padded to ``RP`` rows, and compute its ``A A^T``."""
    target = tl.program_id(0)
    chunk = tl.program_id(1)
    entry = targets + target * _FIELDS
    cols = tl.multiple_of(tl.load(entry + _COLS), 8)
    chunks = tl.cdiv(cols, KC)
    if chunk < chunks:
        a = _pointer(entry + _A, ADAPTER)
        a16 = _pointer(entry + _A16, DTYPE)
        rank = tl.load(entry + _RANK)
        unit = tl.arange(0, RP)
        gram = tl.zeros([RP, RP], tl.float32)
        for start in range(0, KC, BK):
            k = chunk * KC + start + tl.arange(0, BK)
            place = unit[:, None] * cols + k[None, :]
            inside = (k < cols)[None, :]
            x = tl.load(a + place, mask=inside & (unit < rank)[:, None], other=0.0)
            x = narrow(x.to(tl.float32), DTYPE, INTERPRET)
            tl.store(a16 + place, x, mask=inside)
            gram = _dot(x, tl.trans(x), gram, INTERPRET)
        square = unit[:, None] * RP + unit[None, :]
        slots = partial + target * tl.num_programs(1) * (RP * RP)
        tl.store(slots + chunk * (RP * RP) + square, gram)
        tl.debug_barrier()
        if tl.atomic_add(arrived + target, 1, sem="acq_rel") == chunks - 1:
            tl.store(arrived + target, 0)
            whole = tl.zeros([RP, RP], tl.float32)
            for i in range(0, chunks):
                whole += tl.load(slots + i * (RP * RP) + square, cache_modifier=".cg")
            tl.store(_pointer(entry + _GRAM, tl.float32) + square, whole)


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
    rows = tl.load(entry + _ROWS)
    cols = tl.multiple_of(tl.load(entry + _COLS), 8)
    rank = tl.load(entry + _RANK)
    weight = _pointer(entry + _WEIGHT, DTYPE)
    a16 = _pointer(entry + _A16, DTYPE)
    lane = tl.arange(0, R)
    row = block.to(tl.int64) * R + lane
    r = tl.arange(0, RP)
    product = tl.zeros([R, RP], tl.float32)
    for start in range(0, KC, BK):
        k = chunk * KC + start + tl.arange(0, BK)
        w = tl.load(
            weight + row[:, None] * cols + k[None, :],
            mask=(row < rows)[:, None] & (k < cols)[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(a16 + r[None, :] * cols + k[:, None], mask=(k < cols)[:, None], other=0.0)
        product = _dot(w, a, product, INTERPRET)
    inside = (row < rows)[:, None] & (r < rank)[None, :]
    b = tl.load(
        _pointer(entry + _B, ADAPTER) + row[:, None] * rank + r[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    tl.store(partial + unit.to(tl.int64) * R + lane, tl.sum(product * b, axis=1))
    tl.debug_barrier()
    chunks = tl.cdiv(cols, KC)
    if tl.atomic_add(arrived + flag, 1, sem="acq_rel") == chunks - 1:
        tl.store(arrived + flag, 0)
        first = (unit - chunk).to(tl.int64)
        cross = tl.zeros([R], tl.float32)
        for i in range(0, chunks):
            cross += tl.load(partial + (first + i) * R + lane, cache_modifier=".cg")
        gram = tl.load(_pointer(entry + _GRAM, tl.float32) + r[:, None] * RP + r[None, :])
        bg = tl.dot(b, gram, input_precision="ieee" if INTERPRET else "tf32x3")
        update = tl.sum(bg * b, axis=1)
        s = tl.load(factors + target * 2)
        scale = tl.load(factors + target * 2 + 1) * sigma
        clean = tl.load(
            _pointer(entry + _SQUARE_NORM, tl.float32) + row, mask=row < rows, other=0.0
        )
        merged = clean + 2.0 * s * cross + s * s * update
        # rounding can push the sum below zero where the update cancels the weight
        std = tl.sqrt(tl.maximum(merged, 0.0)) * scale
        tl.store(_pointer(entry + _STD, tl.float32) + row, std, mask=row < rows)
        tl.debug_barrier()
        tl.atomic_xchg(ready + flag, epoch, sem="release")


@triton.jit
def _copy_tile(
    targets, units, ready, clock, unit, tile, epoch,
    DTYPE: tl.constexpr, R: tl.constexpr, TILES: tl.constexpr, C8: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    target = tl.load(units + unit * 4)
    block = tl.load(units + unit * 4 + 1)
    chunk = tl.load(units + unit * 4 + 2)
    flag = tl.load(units + unit * 4 + 3)
    entry = targets + target * _FIELDS
    rows = tl.load(entry + _ROWS)
    cols8 = (tl.load(entry + _COLS) // 8).to(tl.int32)
    # counters of the block of rows, whatever row they lie in; a tile meets two rows at most
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
    while tl.atomic_add(ready + flag, 0, sem="acquire") != epoch:
        pass
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
    COPIES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Standard deviations of all rows and, with ``COPIES``, the noisy copies."""
    program = tl.program_id(0)
    if COPIES:
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
                DTYPE, R, TILES, C8, INTERPRET,
            )  # fmt: skip
    else:
        _norm_unit(
            targets, factors, units, partial, arrived, ready, program, epoch, sigma,
            DTYPE, ADAPTER, RP, R, KC, BK, INTERPRET,
        )  # fmt: skip
