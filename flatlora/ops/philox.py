"""The random integers behind the noise: a counter-based generator and its address scheme.

The generator is Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011; 7 rounds is the smallest count that passes BigCrush there). It maps a 128-bit
counter and a 64-bit key to four 32-bit words and has no state, so any element's noise can be
computed alone, in any order, on any device.

The address of a block of noise is part of the library's contract; these bits never change:

- key: BLAKE2b, 8 bytes of digest, personalised with ``b"flatlora.noise.1"``, of the seed (8 bytes,
  little-endian) followed by the layer's name (UTF-8). The first 4 bytes of the digest,
  little-endian, are key word 0, the last 4 are key word 1.
- counter: (block index mod 2**32, block index div 2**32, step, draw).
"""

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

ROUNDS = 7

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_PERSON = b"flatlora.noise.1"

Words = tuple[
    Int64[Tensor, " lanes"],
    Int64[Tensor, " lanes"],
    Int64[Tensor, " lanes"],
    Int64[Tensor, " lanes"],
]


class Stream(NamedTuple):
    """Address of one layer's noise at one step.

    Attributes:
        key: The two key words of (seed, layer name); see `noise_key`.
        step: Index of the optimizer step, below ``2**32``.
        draw: Which of several independent draws at that step, below ``2**32``.
    """

    key: tuple[int, int]
    step: int
    draw: int


def noise_key(seed: int, name: str) -> tuple[int, int]:
    """Key words of one layer's noise.

    Args:
        seed: Seed of the run, ``0 <= seed < 2**64``.
        name: Name of the layer in the base model.

    Returns:
        Two words below ``2**32``.
    """
    message = seed.to_bytes(8, "little") + name.encode()
    digest = hashlib.blake2b(message, digest_size=8, person=_PERSON).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox4x32_(counter: Words, key: tuple[int, int], *, rounds: int = ROUNDS) -> Words:
    """Philox4x32 on many counters at once.

    Torch has no unsigned 32-bit multiplication with a 64-bit product, so each word rides in an
    int64 lane. The signed product wraps to the right 64 bits; a word is masked to 32 bits only
    before it is multiplied or returned.

    Args:
        counter: The four counter words, each in ``[0, 2**32)``. Used as scratch: their contents
            are lost.
        key: The two key words.
        rounds: Number of rounds; the library's noise uses 7.

    Returns:
        The four output words, each in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    free = torch.empty_like(c0)
    for _ in range(rounds):
        # A product needs the one free buffer, and frees that of the word it is joined with.
        high1, low1 = _multiply_(c2, _MULTIPLIERS[1], low=free)
        high1.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        high0, low0 = _multiply_(c0, _MULTIPLIERS[0], low=c1)
        high0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c0, c1, c2, c3, free = high1, low1, high0, low0, c3
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _multiply_(
    word: Int64[Tensor, " lanes"], multiplier: int, *, low: Int64[Tensor, " lanes"]
) -> tuple[Int64[Tensor, " lanes"], Int64[Tensor, " lanes"]]:
    """High and low half of a product, both unmasked; the high half replaces the word."""
    torch.mul(word, multiplier, out=low)
    torch.bitwise_right_shift(low, 32, out=word)
    return word, low
