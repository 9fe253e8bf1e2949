"""The operations on weights, and the rule for who computes them.

The rule is `kernels_serve`; `flatlora.ops.quantised` and `flatlora.swept`, which have kernels of
their own, ask it too.

The reference in plain PyTorch serves every device and dtype and defines what is correct. The Triton
kernels serve CUDA, for float16, bfloat16 and float32; they draw the same integers and agree with
the reference to rounding. ``FLATLORA_KERNELS=0`` in the environment, or `use` in a program, forces
the reference.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flatlora.ops import reference
from flatlora.ops.philox import Stream, noise_key
from flatlora.ops.reference import merged_row_std, row_square_norm

__all__ = [
    "Backend",
    "Stream",
    "backend",
    "clock_of",
    "kernels_serve",
    "merged_row_std",
    "noise_key",
    "noisy_copy",
    "noisy_copy_at",
    "row_square_norm",
    "use",
]

Backend = Literal["auto", "reference", "triton"]

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def backend_of(environment: Mapping[str, str]) -> Backend:
    """The backend that an environment asks for with ``FLATLORA_KERNELS``."""
    return "reference" if environment.get("FLATLORA_KERNELS") == "0" else "auto"


_backend = backend_of(os.environ)


@contextmanager
def use(chosen: Backend) -> Iterator[None]:
    """Choose who computes inside the block, in all threads.

    Args:
        chosen: ``"auto"`` takes the kernels where they serve, ``"reference"`` never does,
            ``"triton"`` always does: on a CPU that works under ``TRITON_INTERPRET=1`` alone, and
            for float64 it is an error.

    Raises:
        ValueError: If the backend is not one of these.
    """
    global _backend  # noqa: PLW0603  # the one place where the choice is kept
    if chosen not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {chosen!r}")
    before, _backend = _backend, chosen
    try:
        yield
    finally:
        _backend = before


def backend() -> Backend:
    """Who computes at present, see `use`."""
    return _backend


def kernels_serve(weight: Tensor) -> bool:
    """Whether the Triton kernels compute for this tensor.

    Raises:
        ValueError: If they are forced to and do not know its dtype.
    """
    known = weight.dtype in _KERNEL_DTYPES
    if _backend == "auto":
        return weight.is_cuda and known and _has_triton()
    if _backend == "triton" and not known:
        raise ValueError(f"the Triton kernels do not know {weight.dtype}; use the reference")
    return _backend == "triton"


@cache
def _has_triton() -> bool:
    # the kernels are written in NVIDIA's assembly in part, and ROCm's devices are "cuda" too
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


def noisy_copy(
    weight: Float[Tensor, "*stack rows cols"],
    std: Float[Tensor, "*stack #rows #cols"],
    stream: Stream,
    *,
    out: Float[Tensor, "*stack rows cols"],
) -> Float[Tensor, "*stack rows cols"]:
    """Write ``W + std * z`` to ``out``; ``W`` is only read.

    Args:
        weight: Frozen base weight as stored, contiguous; a stack of experts has a first dimension.
        std: Standard deviation of the noise, see `merged_row_std`: one value per row or, for a
            weight that is stored transposed, per column of each matrix.
        stream: Address of the layer's noise.
        out: Where the noisy weight goes, with the weight's shape, dtype and device.

    Returns:
        ``out``.

    Raises:
        ValueError: If the standard deviations are neither one per row nor one per column.
    """
    return noisy_copy_at(weight, std, stream.key, clock_of(stream, weight.device), out=out)


def noisy_copy_at(
    weight: Float[Tensor, "*stack rows cols"],
    std: Float[Tensor, "*stack #rows #cols"],
    key: tuple[int, int],
    clock: Int64[Tensor, "2"],
    *,
    out: Float[Tensor, "*stack rows cols"],
) -> Float[Tensor, "*stack rows cols"]:
    """`noisy_copy` that reads step and draw from a tensor on the weight's device.

    Args:
        weight: As in `noisy_copy`.
        std: As in `noisy_copy`.
        key: Key words of the layer's noise.
        clock: Step and draw.
        out: As in `noisy_copy`.

    Returns:
        ``out``.

    Raises:
        ValueError: If the standard deviations are neither one per row nor one per column.
    """
    rows, cols = weight.shape[-2:]
    if std.shape not in ((*weight.shape[:-2], rows, 1), (*weight.shape[:-2], 1, cols)):
        raise ValueError(
            f"std of shape {tuple(std.shape)} has neither one value per row nor one per column of "
            f"a weight of shape {tuple(weight.shape)}"
        )
    torch.ops.flatlora.noisy_copy(weight, std, *key, clock, out)
    return out


def clock_of(stream: Stream, device: torch.device) -> Int64[Tensor, "2"]:
    """Step and draw of a stream, on a device; not to be written to."""
    return _clock(stream.step, stream.draw, device)


def _noisy_copy(
    weight: Tensor, std: Tensor, key0: int, key1: int, clock: Tensor, out: Tensor
) -> None:
    if weight.numel() == 0:
        return
    if kernels_serve(weight):
        from flatlora.ops.kernels import launch_noisy_copy

        launch_noisy_copy(weight, std, (key0, key1), clock, out)
    else:
        step, draw = clock.tolist()
        reference.noisy_copy(weight, std, Stream((key0, key1), step, draw), out=out)
    torch.autograd.graph.increment_version(out)


# Defined by hand: what torch.library.custom_op wraps around a call takes longer than the kernel.
_library = torch.library.Library("flatlora", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "noisy_copy(Tensor weight, Tensor std, int key0, int key1, Tensor clock, Tensor(a!) out) -> ()"
)
_library.impl("noisy_copy", _noisy_copy, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("flatlora::noisy_copy", lambda *_: None, lib=_library)


@lru_cache(maxsize=64)
def _clock(step: int, draw: int, device: torch.device) -> Tensor:
    return torch.tensor([step, draw], dtype=torch.int64, device=device)
