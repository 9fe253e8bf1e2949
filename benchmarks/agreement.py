"""Checks that come before every ratio: two ways compute the same thing, to a stated tolerance.

The kernels' normals differ from the reference's by the hardware's approximate functions alone.
"""

import torch
from torch import Tensor

from benchmarks.report import Disagreement
from flatlora import ops

Z_TOLERANCE = 1e-4
"""How far a normal may lie from the reference's, absolute."""
STD_TOLERANCE = 1e-4
"""How far a row's standard deviation may lie from the reference's, relative."""
BFLOAT16_STD_TOLERANCE = 2e-2
"""The same for one that is computed in bfloat16 throughout, as the published one is."""
ROUNDED_SHARE = 0.01
"""Share of a noisy copy's elements that may be rounded the other way."""


def require_same_normals(
    shape: tuple[int, int], stream: ops.Stream, device: torch.device
) -> dict[str, float]:
    """The kernel's normals are the reference's; a weight of zeros and a std of one show them.

    Returns:
        The largest difference.

    Raises:
        Disagreement: If any differs by more than `Z_TOLERANCE`.
    """
    zeros = torch.zeros(shape, device=device)
    std = torch.ones(shape[0], 1, device=device)
    found, expected = both_noisy_copies(zeros, std, stream)
    difference = float((found - expected).abs().max())
    if not difference <= Z_TOLERANCE:
        raise Disagreement(f"normals of {shape} differ by {difference:.2e} > {Z_TOLERANCE:.0e}")
    return {"z_error": difference}


def require_same_noisy_copy(weight: Tensor, std: Tensor, stream: ops.Stream) -> dict[str, float]:
    """The kernel's noisy copy is the reference's but for roundings; see `require_rounded_alike`."""
    found, expected = both_noisy_copies(weight, std, stream)
    return require_rounded_alike(found, expected, std)


def require_rounded_alike(found: Tensor, expected: Tensor, std: Tensor) -> dict[str, float]:
    """Two bfloat16 noisy copies are equal, but for a few elements rounded the other way.

    Such an element may be the next bfloat16 above or below. Where noise and weight all but cancel,
    bfloat16s are closer together than the normals agree: there the difference may be
    `Z_TOLERANCE` standard deviations.

    Args:
        found: Noisy copy, bfloat16.
        expected: The reference's.
        std: Standard deviation of the noise, broadcastable to both.

    Returns:
        The share of elements that differ.

    Raises:
        Disagreement: If one differs by more, or `ROUNDED_SHARE` of them differ at all.
    """
    apart = (_rank(found) - _rank(expected)).abs_()
    share = float((apart > 0).float().mean())
    near = (found.float() - expected.float()).abs() <= Z_TOLERANCE * std  # false if not a number
    far = (apart > 1) & ~near
    if bool(far.any()):
        raise Disagreement(f"{int(far.sum())} elements differ by more than one bfloat16")
    if not share < ROUNDED_SHARE:
        raise Disagreement(f"{share:.2%} of the elements differ, more than roundings explain")
    return {"rounded_otherwise": share}


def require_same_std(
    found: Tensor, expected: Tensor, tolerance: float = STD_TOLERANCE
) -> dict[str, float]:
    """Two ways to the rows' standard deviations agree.

    Raises:
        Disagreement: If one differs by more than the tolerance, a share of itself.
    """
    difference = float(((found - expected) / expected).abs().max())
    if not difference <= tolerance:
        raise Disagreement(f"standard deviations differ by {difference:.2e} of themselves")
    return {"std_error": difference}


def both_noisy_copies(weight: Tensor, std: Tensor, stream: ops.Stream) -> tuple[Tensor, Tensor]:
    """A noisy copy as the library makes it, and as the reference does."""
    found = ops.noisy_copy(weight, std, stream, out=torch.full_like(weight, torch.nan))
    with ops.use("reference"):
        expected = ops.noisy_copy(weight, std, stream, out=torch.full_like(weight, torch.nan))
    return found, expected


def _rank(values: Tensor) -> Tensor:
    """Place of each bfloat16 among all of them in order of size, both zeros at 0."""
    bits = values.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)
