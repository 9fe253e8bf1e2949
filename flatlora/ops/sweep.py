"""All targets of a model at once: standard deviations and noisy copies in two short launches.

One launch per layer would cost more than the work in it for small steps, and reading the weights
once for the norms and once more for the copies would cost twice the memory traffic.
`flatlora.ops.sweep_kernels` says how one pass does both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from flatlora.ops import sweep_kernels as kernels
from flatlora.ops.kernels import INTERPRETED, on_device_of

MAX_RANK = 64

# Measured best on an H100, with the lag: 1.27 times a copy; other sizes near these take up to 1.5.
_ROWS = 32  # of a unit
_COLS = 1024
_DEPTH = 128  # columns of one matrix product
_STAGES = 3
_COUNTERS = 256  # of a tile of the copy
_TILES = _ROWS * _COLS // (8 * _COUNTERS)

_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@dataclass(frozen=True)
class SweptWeight:
    """One target of a sweep.

    Attributes:
        weight: Frozen weight ``(out, in)``.
        square_norm: ``||W_i||^2``, float32 ``(out,)``.
        lora_a: ``(rank, in)``.
        lora_b: ``(out, rank)``.
        scaling: LoRA's ``s``.
        key: Key words of the noise.
        std: Where the standard deviations go, float32 ``(out, 1)``.
        copy: Where the noisy weight goes, or None.
    """

    weight: Float[Tensor, "out in"]
    square_norm: Float[Tensor, " out"]
    lora_a: Float[Tensor, "rank in"]
    lora_b: Float[Tensor, "out rank"]
    scaling: float
    key: tuple[int, int]
    std: Float[Tensor, "out 1"]
    copy: Float[Tensor, "out in"] | None


def sweepable(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether a target can be part of a sweep; others are served one by one."""
    tensors = (weight, lora_a, lora_b)
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and lora_a.dtype in _DTYPES
        and lora_b.dtype == lora_a.dtype
        and weight.shape[1] % 8 == 0
        and lora_a.shape[0] <= MAX_RANK
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
        and all(tensor.device == weight.device for tensor in tensors)
    )


def is_narrow(weight: Tensor) -> bool:
    """Whether a tile of the copy can meet more than two rows, which takes a division to tell."""
    return weight.shape[1] < 8 * _COUNTERS


class Sweep:
    """Targets of one device, one weight dtype and one adapter dtype, all narrow or none.

    The merged norm is that of the adapter with ``A`` rounded to the weights' dtype, as a matrix
    product under autocast rounds it: for bfloat16 and 4,096 columns a standard deviation differs
    from the reference's by some 1e-5 of itself.

    Args:
        weights: At least one target; either all have a copy or none has. Their tensors' addresses
            must stay as they are.

    Attributes:
        weights: As given.
        device: Where they are.
    """

    def __init__(self, weights: Sequence[SweptWeight]) -> None:
        first = weights[0]
        self.weights = tuple(weights)
        self.device = first.weight.device
        self._copies = first.copy is not None
        self._narrow = is_narrow(first.weight)
        rank = max(16, triton.next_power_of_2(max(swept.lora_a.shape[0] for swept in weights)))
        self._constants = {
            "DTYPE": _DTYPES[first.weight.dtype],
            "ADAPTER": _DTYPES[first.lora_a.dtype],
            "RP": rank,
            "INTERPRET": INTERPRETED,
        }
        self._rounded = [
            first.weight.new_empty(rank, swept.weight.shape[1]) if self._copies else None
            for swept in weights
        ]
        self._gram = self._zeros(len(weights), rank, rank)
        self._targets = torch.tensor(
            [self._entry(i, swept) for i, swept in enumerate(weights)],
            dtype=torch.int64,
            device="cpu",
        ).to(self.device)
        self._factors = torch.tensor(
            [(swept.scaling, 1 / math.sqrt(swept.weight.shape[1])) for swept in weights],
            dtype=torch.float32,
            device="cpu",
        ).to(self.device)
        if self._copies:
            self._prepare_copies(first.weight.itemsize)
        else:
            self._blocks = _blocks(weights).to(self.device)

    def run(self, sigma: float, clock: Int64[Tensor, "2"]) -> None:
        """Write every target's standard deviations and, if they have one, its noisy copy.

        Args:
            sigma: Strength at this step.
            clock: Step and draw, on the targets' device.
        """
        with on_device_of(self._targets):
            kernels.adapters_kernel[(len(self.weights),)](
                self._targets, **self._constants, BK=128, ROUNDED=self._copies,
                num_warps=4, num_stages=4,
            )  # fmt: skip
            if self._copies:
                self._run_with_copies(sigma, clock)
            else:
                kernels.norms_kernel[(len(self._blocks),)](
                    self._targets, self._factors, self._blocks, sigma, **self._constants,
                    R=_ROWS, KC=_COLS, BK=_DEPTH, num_warps=4, num_stages=_STAGES,
                )  # fmt: skip
        written = [swept.std for swept in self.weights]
        written += [swept.copy for swept in self.weights if swept.copy is not None]
        torch.autograd.graph.increment_version(written)  # torch has not seen the writing

    def _prepare_copies(self, itemsize: int) -> None:
        units, blocks = _units(self.weights)
        self._units = units.to(self.device)
        self._parts = self._zeros(len(units), _ROWS)
        self._arrived = self._zeros(blocks, dtype=torch.int32)
        self._ready = self._zeros(blocks, dtype=torch.int32)
        self._epoch = 0
        # A block's copy waits for all of its units, so these have to start before it.
        chunks = max(triton.cdiv(swept.weight.shape[1], _COLS) for swept in self.weights)
        cached = _lag_bytes(self.device) // (_ROWS * _COLS * itemsize)
        self._lag = min(len(units), max(chunks, cached))

    def _run_with_copies(self, sigma: float, clock: Int64[Tensor, "2"]) -> None:
        self._epoch += 1  # the flags of the launch before are stale, and need no reset
        count = len(self._units)
        kernels.sweep_kernel[((count + self._lag) * (_TILES + 1),)](
            self._targets, self._factors, self._units, self._parts, self._arrived, self._ready,
            clock, count, self._lag, self._epoch, sigma, **self._constants,
            R=_ROWS, KC=_COLS, BK=_DEPTH, C8=_COUNTERS, TILES=_TILES,
            NARROW=self._narrow,
            num_warps=4, num_stages=_STAGES,
        )  # fmt: skip

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _entry(self, i: int, swept: SweptWeight) -> list[int]:
        entry = [0] * kernels.FIELDS
        entry[kernels.WEIGHT] = swept.weight.data_ptr()
        entry[kernels.COPY] = 0 if swept.copy is None else swept.copy.data_ptr()
        entry[kernels.STD] = swept.std.data_ptr()
        entry[kernels.SQUARE_NORM] = swept.square_norm.data_ptr()
        entry[kernels.A] = swept.lora_a.data_ptr()
        entry[kernels.B] = swept.lora_b.data_ptr()
        rounded = self._rounded[i]
        entry[kernels.A16] = 0 if rounded is None else rounded.data_ptr()
        entry[kernels.GRAM] = self._gram[i].data_ptr()
        entry[kernels.KEY0], entry[kernels.KEY1] = swept.key
        entry[kernels.ROWS], entry[kernels.COLS] = swept.weight.shape
        entry[kernels.RANK] = swept.lora_a.shape[0]
        return entry


def _lag_bytes(device: torch.device) -> int:
    """How much is read between a unit's two visits.

    Less, and programs wait for units under way; more, and the unit has left the cache.
    """
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size // 3


def _blocks(weights: Sequence[SweptWeight]) -> Tensor:
    """The table of blocks of rows, ``(blocks, 2)``: target and number of the block in it."""
    tables = []
    for i, swept in enumerate(weights):
        block = torch.arange(
            triton.cdiv(swept.weight.shape[0], _ROWS), dtype=torch.int32, device="cpu"
        )
        tables.append(torch.stack([torch.full_like(block, i), block], dim=1))
    return torch.cat(tables)


def _units(weights: Sequence[SweptWeight]) -> tuple[Tensor, int]:
    """The table of units, ``(units, 4)``: target, block of rows, chunk of columns, flag.

    Returns:
        The table and the number of flags, one for each block of rows.
    """
    tables, flags = [], 0
    for i, swept in enumerate(weights):
        out, features = swept.weight.shape
        blocks, chunks = triton.cdiv(out, _ROWS), triton.cdiv(features, _COLS)
        block = torch.arange(blocks, dtype=torch.int32, device="cpu").repeat_interleave(chunks)
        chunk = torch.arange(chunks, dtype=torch.int32, device="cpu").repeat(blocks)
        target = torch.full_like(block, i)
        tables.append(torch.stack([target, block, chunk, block + flags], dim=1))
        flags += blocks
    return torch.cat(tables), flags
