"""The noise by its published definition, and the exact distribution of what it can be.

A second implementation, apart from the library's: `flatlora.ops` says in words what it computes,
and this module computes that in the plainest way, and counts through all 2**32 words what follows.
"""

import math
from functools import cache

import torch
from torch import Tensor

from flatlora.ops import Stream

LEVELS = 1 << 16
MASK = 0xFFFFFFFF
LARGEST = math.sqrt(-2 * math.log(0.5 / LEVELS))


def philox(index: Tensor, stream: Stream, rounds: int = 7) -> Tensor:
    """Philox4x32.

    Args:
        index: Block numbers, int64.
        stream: Key, step and draw.
        rounds: The library's noise takes 7.

    Returns:
        blocks x 4 words below 2**32, int64.
    """
    c0, c1 = index & MASK, index >> 32
    c2, c3 = torch.full_like(index, stream.step), torch.full_like(index, stream.draw)
    k0, k1 = stream.key
    for _ in range(rounds):
        # the product wraps, which leaves its 64 bits right; only their sign must be masked off
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) ^ c1 ^ k0) & MASK,
            p1 & MASK,
            ((p0 >> 32) ^ c3 ^ k1) & MASK,
            p0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack([c0, c1, c2, c3], dim=1)


def normals_of(words: Tensor) -> Tensor:
    """Two normals of every word by Box-Muller: radius of the low half, angle of the high one.

    Args:
        words: blocks x 4.

    Returns:
        8 * blocks normals, float32.
    """
    low, high = (words & (LEVELS - 1)).double(), (words >> 16).double()
    radius = torch.sqrt(-2 * torch.log((low + 0.5) / LEVELS))
    angle = high * (2 * math.pi / LEVELS) - math.pi
    pair = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pair.float().flatten()


def words_of(normals: Tensor) -> Tensor:
    """The words that normals were made of; their float32 tells neighbouring half words apart.

    So what is said of the generator's bits can be tried on an implementation that shows only
    normals.

    Args:
        normals: As `normals_of` returns them.

    Returns:
        blocks x 4 words below 2**32, int64.
    """
    pair = normals.view(-1, 4, 2).double()
    x, y = pair[..., 0], pair[..., 1]
    low = torch.exp(-(x * x + y * y) / 2).mul_(LEVELS).sub_(0.5).round_().clamp_(0, LEVELS - 1)
    high = torch.atan2(y, x).add_(math.pi).mul_(LEVELS / (2 * math.pi)).round_()
    return (high.long() % LEVELS << 16) | low.long()


def moment(power: int) -> float:
    """The exact mean of ``z**power``; the odd ones vanish."""
    if power % 2:
        return 0.0
    radius, cosine = _lattice()
    return float((radius**power).mean() * (cosine**power).mean())


@cache
def beyond(threshold: float) -> float:
    """The exact probability of ``z > threshold``."""
    radius, cosine = _lattice()
    at_most = torch.searchsorted(cosine, threshold / radius, right=True)
    return 1 - float(at_most.double().mean()) / LEVELS


@cache
def _lattice() -> tuple[Tensor, Tensor]:
    """All radii and, sorted, all cosines; the sines are the same numbers."""
    number = torch.arange(LEVELS, dtype=torch.float64)
    radius = torch.sqrt(-2 * torch.log((number + 0.5) / LEVELS))
    cosine = torch.cos(number * (2 * math.pi / LEVELS) - math.pi)
    return radius, cosine.sort().values
