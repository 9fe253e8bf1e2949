"""A battery of hypotheses on the noise: its bits, its normals, and the law of the noisy copy.

Every hypothesis ends as one score that is standard normal if it holds, whatever the number of
draws. The battery passes if no score is beyond what all of them together would reach by chance
once in 10,000 runs; with fixed seeds a run is a repetition, and chance has no second try.
"""

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import torch
from torch import Tensor

from flatlora.ops import Stream, noise_key
from tests.flatlora import law

FALSE_ALARM = 1e-4
"""Probability that a battery rejects anything although every hypothesis holds."""
WORD_LAGS = (1, 4, 32, 4096)
NORMAL_LAGS = (1, 2, 7, 8, 64, 4096)
TAILS = (2.0, 3.0, 4.0, 4.5)
# 51 bins of about equal probability; an odd number, as 0, an atom of the lattice, can be no edge.
EDGES = torch.tensor([NormalDist().inv_cdf(k / 51) for k in range(1, 51)])
BITS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).double()

VARIANCE = law.moment(2)
SPREAD = law.moment(4) - VARIANCE**2
"""Variance of a squared normal."""

Source = Callable[[Stream, int], Tensor]
"""The standard normals 0 to count of a stream, float32."""
NoisyCopy = Callable[..., Tensor]
"""`flatlora.ops.noisy_copy`, or one that is to be found out."""


class Evidence:
    """Sums over many draws, by hypothesis; chunks of draws only add to them."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, float]] = {}
        self._counts: dict[str, tuple[Tensor, Tensor]] = {}
        self._squares: dict[str, tuple[Tensor, float]] = {}
        self._faults: dict[str, int] = {}

    def sums(self, name: str, deviations: Tensor, variance: float) -> None:
        """Sums whose mean is 0 and whose variance is known, one hypothesis each."""
        total, known = self._sums.get(name, (torch.zeros(()), 0.0))
        # float64: a billion terms are added up
        self._sums[name] = (total.to(deviations.device) + deviations.double(), known + variance)

    def counts(self, name: str, counts: Tensor, probabilities: Tensor) -> None:
        """Counts in categories of known probability (last dimension); a chi-square per row."""
        total, _ = self._counts.get(name, (torch.zeros((), dtype=torch.int64), probabilities))
        self._counts[name] = (total.to(counts.device) + counts, probabilities.to(counts.device))

    def squares(self, name: str, scores: Tensor) -> None:
        """Standard normal scores, too many to look at each: their sum of squares (last dim)."""
        total, degrees = self._squares.get(name, (torch.zeros(()), 0.0))
        value = scores.double().square().sum(dim=-1)
        self._squares[name] = (total.to(value.device) + value, degrees + scores.shape[-1])

    def never(self, name: str, faults: Tensor) -> None:
        """Something that must not happen at all, and how often it did."""
        self._faults[name] = self._faults.get(name, 0) + int(faults)

    def scores(self) -> dict[str, float]:
        """One score for every hypothesis."""
        found: dict[str, float] = {}
        for name, (total, variance) in self._sums.items():
            found |= _numbered(name, total / math.sqrt(variance))
        for name, (counts, probabilities) in self._counts.items():
            expected = counts.sum(dim=-1, keepdim=True) * probabilities
            value = ((counts - expected).square() / expected).sum(dim=-1)
            found |= _numbered(name, _chi_square_score(value, probabilities.shape[-1] - 1))
        for name, (value, degrees) in self._squares.items():
            found |= _numbered(name, _chi_square_score(value, degrees))
        return found | {name: math.inf if n else 0.0 for name, n in self._faults.items()}


def rejected(scores: dict[str, float]) -> dict[str, float]:
    """The hypotheses whose score is too large by Bonferroni's bound, worst first."""
    limit = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * len(scores)))
    worst = sorted(scores.items(), key=lambda item: -abs(item[1]))
    return {name: score for name, score in worst if not abs(score) <= limit}


def examine_generator(
    source: Source, *, chunks: int, size: int, avalanche_size: int
) -> dict[str, float]:
    """Scores of the generator's bits and normals on ``chunks * size`` draws and their neighbours.

    Args:
        source: The generator.
        chunks: How many streams, of one layer at several steps.
        size: Draws of each, a multiple of 4096.
        avalanche_size: Draws that are compared for each flipped bit of an address.

    Returns:
        Scores by hypothesis.
    """
    evidence = Evidence()
    key = noise_key(42, "model.layers.0.self_attn.q_proj")
    for chunk in range(chunks):
        stream = Stream(key, step=5 * chunk + 1, draw=2)
        normals = source(stream, size)
        words = law.words_of(normals)
        blocks = torch.arange(size // 8, device=words.device)
        evidence.never(
            "address: the words are Philox's", (words != law.philox(blocks, stream)).sum()
        )
        uniform_words(evidence, "words", words)
        for lag in WORD_LAGS:
            uniform_words(evidence, f"words, lag {lag}", _at_lag(words, lag))
        standard_normals(evidence, normals.double())
        for name, neighbour in neighbours(stream):
            other = source(neighbour, size)
            uniform_words(evidence, f"words, {name}", words ^ law.words_of(other))
            uncorrelated(evidence, f"normals, {name}", normals.double(), other.double())
    avalanche(evidence, source, Stream(key, step=3, draw=1), avalanche_size)
    return evidence.scores()


def neighbours(stream: Stream) -> Iterator[tuple[str, Stream]]:
    """Addresses that differ as those of one training do."""
    key, step, draw = stream
    yield "next step", Stream(key, step + 1, draw)
    yield "next draw", Stream(key, step, draw + 1)
    # also finds a generator that adds the two, as their sum is the same
    yield "another step and draw of the same sum", Stream(key, step + 1, draw - 1)
    yield "step and draw exchanged", Stream(key, draw, step)
    yield "key words exchanged", Stream((key[1], key[0]), step, draw)
    yield "next layer", Stream(noise_key(42, "model.layers.1.self_attn.q_proj"), step, draw)
    yield "next seed", Stream(noise_key(43, "model.layers.0.self_attn.q_proj"), step, draw)


def uniform_words(evidence: Evidence, name: str, words: Tensor) -> None:
    """Every byte of every place in a block takes its 256 values alike, and every bit both.

    Args:
        evidence: Where to.
        name: Which words.
        words: blocks x 4.
    """
    place = torch.arange(4, device=words.device) << 8
    even = torch.full((256,), 1 / 256, dtype=torch.float64)
    bits = BITS.to(words.device)
    for byte in range(4):
        value = (words >> 8 * byte & 255) + place
        counts = torch.bincount(value.flatten(), minlength=1024).view(4, 256)
        ones = counts.double() @ bits - len(words) / 2
        evidence.counts(f"{name}: byte {byte} of word", counts, even)
        evidence.sums(f"{name}: bits of byte {byte} of word", ones, len(words) / 4)


def standard_normals(evidence: Evidence, z: Tensor) -> None:
    """Moments, tails, bins, and no correlation with neighbours, of normals in float64."""
    n = len(z)
    square = z.square() - VARIANCE
    evidence.sums("mean", z.sum(), n * VARIANCE)
    evidence.sums("variance", square.sum(), n * SPREAD)
    evidence.sums("skewness", (z**3).sum(), n * law.moment(6))
    fourth = law.moment(4)
    evidence.sums("kurtosis", (z**4 - fourth).sum(), n * (law.moment(8) - fourth**2))
    evidence.never(
        "bound: none is larger than the law allows", (z.abs() > law.LARGEST + 1e-4).sum()
    )
    for tail in TAILS:
        for sign, side in ((1, "above"), (-1, "below")):
            share = law.beyond(tail)
            excess = (sign * z > tail).sum() - n * share
            evidence.sums(f"tail {side} {sign * tail}", excess, n * share * (1 - share))
    edges = EDGES.to(z.device).double()
    counts = torch.bincount(torch.bucketize(z, edges), minlength=len(EDGES) + 1)
    evidence.counts("bins", counts, _bin_probabilities())
    for lag in NORMAL_LAGS:
        uncorrelated(evidence, f"normals, lag {lag}", z[lag:], z[:-lag])
    _places(evidence, z.view(-1, 8), square.view(-1, 8))


def _places(evidence: Evidence, z: Tensor, square: Tensor) -> None:
    """Each of the eight places in a block is normal by itself, and knows nothing of the others."""
    evidence.sums("mean by place", z.sum(dim=0), len(z) * VARIANCE)
    evidence.sums("variance by place", square.sum(dim=0), len(z) * SPREAD)
    a, b = torch.triu_indices(8, 8, offset=1, device=z.device)
    evidence.sums("correlation of places", _products(z)[a, b], len(z) * VARIANCE**2)
    evidence.sums("correlation of places in size", _products(square)[a, b], len(z) * SPREAD**2)


def _products(z: Tensor) -> Tensor:
    """``z.T @ z``; in parts, as one product of so few columns would leave a GPU idle."""
    parts = z.view(256, -1, 8)
    return (parts.mT @ parts).sum(dim=0)


def uncorrelated(evidence: Evidence, name: str, a: Tensor, b: Tensor) -> None:
    """Neither the values nor their sizes of two series of normals go together."""
    evidence.sums(f"{name}: correlation", torch.dot(a, b), len(a) * VARIANCE**2)
    sizes = torch.dot(a.square() - VARIANCE, b.square() - VARIANCE)
    evidence.sums(f"{name}: correlation in size", sizes, len(a) * SPREAD**2)


def avalanche(evidence: Evidence, source: Source, stream: Stream, size: int) -> None:
    """One flipped bit of an address flips every bit of the words with probability one half."""
    words = law.words_of(source(stream, size))
    for name, flipped in _flips(stream):
        _half_flipped(evidence, f"avalanche, {name}", words ^ law.words_of(source(flipped, size)))
    blocks = torch.arange(len(words), device=words.device)
    for bit in range((len(words) - 1).bit_length()):
        lower = blocks[(blocks & 1 << bit) == 0]
        lower = lower[lower + (1 << bit) < len(words)]
        _half_flipped(evidence, f"avalanche, block {bit}", words[lower] ^ words[lower + (1 << bit)])


def _flips(stream: Stream) -> Iterator[tuple[str, Stream]]:
    (first, second), step, draw = stream
    for bit in range(32):
        flip = 1 << bit
        yield f"key word 0 bit {bit}", Stream((first ^ flip, second), step, draw)
        yield f"key word 1 bit {bit}", Stream((first, second ^ flip), step, draw)
        yield f"step bit {bit}", Stream((first, second), step ^ flip, draw)
        yield f"draw bit {bit}", Stream((first, second), step, draw ^ flip)


def _half_flipped(evidence: Evidence, name: str, changes: Tensor) -> None:
    n = len(changes)
    shifts = torch.arange(32, device=changes.device)
    flips = (changes[:, :, None] >> shifts & 1).sum(dim=0).double().flatten() - n / 2
    evidence.sums(f"{name}: share of bits", flips.sum(), n * 128 / 4)
    evidence.squares(f"{name}: each bit", flips / math.sqrt(n / 4))


def examine_noise(
    copy: NoisyCopy, device: torch.device, *, rows: int, cols: int
) -> dict[str, float]:
    """Scores of what a noisy copy adds to a weight, row by row and address by address.

    Args:
        copy: Makes noisy copies.
        device: Where the weights are.
        rows: Rows of a weight, each with a standard deviation of its own.
        cols: Its columns.

    Returns:
        Scores by hypothesis.
    """
    evidence = Evidence()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).mul_(0.02).to(device)
    std = torch.linspace(0.005, 0.08, rows, device=device)[:, None]
    stream = Stream(noise_key(42, "model.layers.0.mlp.down_proj"), 7, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # a half precision number has no room for a weight beside its noise
        clean = weight if dtype is torch.float32 else torch.zeros_like(weight, dtype=dtype)
        z = (copy(clean, std, stream, out=_empty(clean)) - clean).double() / std
        name = str(dtype).removeprefix("torch.")
        _law_of_rows(evidence, f"rows of {name}", z)
        stored = clean.T.contiguous()
        noise = copy(stored, std.T.contiguous(), stream, out=_empty(stored)) - stored
        _law_of_rows(evidence, f"output units of a {name} Conv1D", noise.T.double() / std)
    _law_of_addresses(evidence, copy, weight[:1], std[:1])
    return evidence.scores()


def _law_of_rows(evidence: Evidence, name: str, z: Tensor) -> None:
    cols = z.shape[1]
    evidence.sums(f"{name}: variance in all", (z.square() - VARIANCE).sum(), z.numel() * SPREAD)
    evidence.sums(f"{name}: mean of each", z.sum(dim=1), cols * VARIANCE)
    evidence.sums(f"{name}: variance of each", (z.square() - VARIANCE).sum(dim=1), cols * SPREAD)
    _independent(evidence, name, z)


def _law_of_addresses(evidence: Evidence, copy: NoisyCopy, weight: Tensor, std: Tensor) -> None:
    """Layers, steps and draws, each with each."""
    streams = [
        Stream(noise_key(42, f"model.layers.{layer}.mlp.up_proj"), step, draw)
        for layer in range(4)
        for step in range(4)
        for draw in range(4)
    ]
    noise = [copy(weight, std, stream, out=_empty(weight)) - weight for stream in streams]
    _independent(evidence, "layers, steps and draws", torch.cat(noise).double() / std)


def _independent(evidence: Evidence, name: str, z: Tensor) -> None:
    """No two rows go together, in value or in size."""
    square = z.square() - VARIANCE
    a, b = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
    for what, x, spread in (("value", z, VARIANCE), ("size", square, SPREAD)):
        scores = (x @ x.T)[a, b] / (math.sqrt(z.shape[1]) * spread)
        evidence.squares(f"{name}: correlation in {what}", scores)
        evidence.sums(f"{name}: largest correlation in {what}", scores, 1.0)


def _at_lag(words: Tensor, lag: int) -> Tensor:
    """Each word with the one ``lag`` words later; their difference is uniform if both are."""
    series = words.flatten()
    difference = series[lag:] ^ series[:-lag]
    return difference[: len(difference) // 4 * 4].view(-1, 4)


def _bin_probabilities() -> Tensor:
    above = [1.0, *(law.beyond(float(edge)) for edge in EDGES), 0.0]
    return torch.tensor(above, dtype=torch.float64).diff().neg()


def _chi_square_score(value: Tensor, degrees: float) -> Tensor:
    """Wilson and Hilferty: the cube root of a chi-square is all but normal."""
    spread = 2 / (9 * degrees)
    return ((value / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _numbered(name: str, scores: Tensor) -> dict[str, float]:
    if scores.dim() == 0:
        return {name: float(scores)}
    places = torch.cartesian_prod(*map(torch.arange, scores.shape)).view(-1, scores.dim())
    values = scores.flatten().tolist()
    return {
        f"{name} {' '.join(map(str, place))}": score
        for place, score in zip(places.tolist(), values, strict=True)
    }


def _empty(weight: Tensor) -> Tensor:
    return torch.full_like(weight, torch.nan)
