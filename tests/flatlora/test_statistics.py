"""Law 4: the noise has the law's distribution, and nothing is correlated with anything.

The battery is shown to find broken generators before it is believed about ours.
"""

import math
import statistics

import pytest
import torch
from torch import Tensor

from flatlora import ops
from flatlora.ops import Stream
from tests.flatlora import battery, law

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COLS = 4096
SMALL = {"chunks": 1, "size": 1 << 19, "avalanche_size": 1 << 13}


class Library:
    """The library's normals: what a noisy copy adds to zeros at a standard deviation of one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, stream: Stream, count: int) -> Tensor:
        zeros = torch.zeros(count // COLS, COLS, device=self.device)
        std = torch.ones(len(zeros), 1, device=self.device)
        return ops.noisy_copy(zeros, std, stream, out=torch.full_like(zeros, math.nan)).flatten()


def words(stream: Stream, count: int, rounds: int = 7) -> Tensor:
    return law.philox(torch.arange(count // 8), stream, rounds)


def normals(stream: Stream, count: int) -> Tensor:
    return law.normals_of(words(stream, count))


def two_rounds(stream: Stream, count: int) -> Tensor:
    return law.normals_of(words(stream, count, rounds=2))


def three_rounds(stream: Stream, count: int) -> Tensor:
    return law.normals_of(words(stream, count, rounds=3))


def six_rounds(stream: Stream, count: int) -> Tensor:
    return law.normals_of(words(stream, count, rounds=6))


def swapped_key(stream: Stream, count: int) -> Tensor:
    return normals(stream._replace(key=stream.key[::-1]), count)


def ignored_key(stream: Stream, count: int) -> Tensor:
    return normals(stream._replace(key=(0, 0)), count)


def step_plus_draw(stream: Stream, count: int) -> Tensor:
    return normals(Stream(stream.key, stream.step + stream.draw & law.MASK, 0), count)


def short_step(stream: Stream, count: int) -> Tensor:
    return normals(stream._replace(step=stream.step & 0xFFFF), count)


def constant_bit(stream: Stream, count: int) -> Tensor:
    return law.normals_of(words(stream, count) | torch.tensor([0, 0, 1 << 21, 0]))


def biased_bit(stream: Stream, count: int) -> Tensor:
    """The lowest bit of each word, always set in one block of 32."""
    drawn = words(stream, count)
    return law.normals_of(drawn | (torch.arange(len(drawn)) % 32 == 0).long()[:, None])


def half_words_tied(stream: Stream, count: int) -> Tensor:
    low = words(stream, count) & (law.LEVELS - 1)
    return law.normals_of(low << 16 | low)


def short_counter(stream: Stream, count: int) -> Tensor:
    return law.normals_of(law.philox(torch.arange(count // 8) & 0x1FF, stream))


def cosines_only(stream: Stream, count: int) -> Tensor:
    return normals(stream, count).view(-1, 2)[:, :1].expand(-1, 2).flatten()


def one_percent_wide(stream: Stream, count: int) -> Tensor:
    return normals(stream, count) * 1.01


def shifted(stream: Stream, count: int) -> Tensor:
    return normals(stream, count) + 0.01


def no_tail(stream: Stream, count: int) -> Tensor:
    return normals(stream, count).clamp(-3, 3)


def same_signs(stream: Stream, count: int) -> Tensor:
    """Neighbouring blocks agree in size, not in sign: their plain correlation is 0."""
    z = normals(stream, count).view(-1, 2, 8)
    return torch.stack([z[:, 0], z[:, 0].copysign(z[:, 1])], dim=1).flatten()


BROKEN = [
    (two_rounds, "words: byte 0 of word 3"),
    (three_rounds, "avalanche, step bit 0: each bit"),
    (six_rounds, "address"),
    (swapped_key, "address"),
    (ignored_key, "normals, next layer: correlation"),
    (ignored_key, "normals, next seed: correlation"),
    (ignored_key, "avalanche, key word 1 bit 31: share of bits"),
    (step_plus_draw, "normals, another step and draw of the same sum: correlation"),
    (short_step, "avalanche, step bit 16: share of bits"),
    (constant_bit, "words: bits of byte 2 of word 2 5"),
    (biased_bit, "words: bits of byte 0 of word 0 0"),
    (half_words_tied, "kurtosis"),
    (short_counter, "avalanche, block 9: share of bits"),
    (short_counter, "normals, lag 4096: correlation"),
    (cosines_only, "correlation of places 0"),
    (one_percent_wide, "variance"),
    (one_percent_wide, "bins"),
    (shifted, "mean"),
    (no_tail, "tail above 3.0"),
    (same_signs, "normals, lag 8: correlation in size"),
]


def wide_copy(weight: Tensor, std: Tensor, stream: Stream, *, out: Tensor) -> Tensor:
    return ops.noisy_copy(weight, std * 1.01, stream, out=out)


def neighbours_std(weight: Tensor, std: Tensor, stream: Stream, *, out: Tensor) -> Tensor:
    return ops.noisy_copy(weight, std.roll(1, dims=0 if len(std) > 1 else 1), stream, out=out)


def same_rows(weight: Tensor, std: Tensor, stream: Stream, *, out: Tensor) -> Tensor:
    zeros, one = torch.zeros_like(weight[:1]), torch.ones_like(std[:1, :1])
    row = ops.noisy_copy(zeros, one, stream, out=torch.empty_like(zeros))
    return out.copy_(weight + row * std.to(weight.dtype))


def same_draws(weight: Tensor, std: Tensor, stream: Stream, *, out: Tensor) -> Tensor:
    return ops.noisy_copy(weight, std, stream._replace(draw=0), out=out)


BROKEN_COPIES = [
    (wide_copy, "rows of float32: variance in all"),
    (wide_copy, "output units of a bfloat16 Conv1D: variance in all"),
    (neighbours_std, "rows of bfloat16: variance of each 1"),
    (neighbours_std, "output units of a float32 Conv1D: variance of each 1"),
    (same_rows, "rows of float32: correlation in value"),
    (same_draws, "layers, steps and draws: correlation in value"),
]


def test_the_law_is_what_the_library_states_of_its_normals() -> None:
    assert math.isclose(law.LARGEST, 4.855, abs_tol=5e-4)
    assert math.isclose(law.moment(2), 1 - 5.3e-6, abs_tol=5e-8)
    assert law.moment(1) == law.moment(3) == 0
    for tail in battery.TAILS:
        assert math.isclose(law.beyond(tail), statistics.NormalDist().cdf(-tail), rel_tol=0.05)
    assert law.beyond(law.LARGEST) == 0
    assert law.beyond(-5.0) == 1


def test_words_come_back_from_their_normals() -> None:
    corners = torch.tensor([0, 1, law.MASK, law.MASK - 1, 1 << 16, 1 << 31, 0xFFFF, 0x7FFF0000])
    drawn = words(Stream((1, 2), 3, 4), 1 << 20)
    for expected in (corners.view(-1, 4), drawn):
        assert torch.equal(law.words_of(law.normals_of(expected)), expected)


def test_the_librarys_noise_passes() -> None:
    scores = battery.examine_generator(Library(CPU), chunks=5, size=1 << 21, avalanche_size=1 << 13)
    assert not battery.rejected(scores)


def test_the_librarys_noisy_copy_passes() -> None:
    scores = battery.examine_noise(ops.noisy_copy, CPU, rows=48, cols=1 << 14)
    assert not battery.rejected(scores)


@pytest.mark.gpu
def test_a_billion_draws_pass_on_a_gpu() -> None:
    scores = battery.examine_generator(
        Library(CUDA), chunks=16, size=1 << 26, avalanche_size=1 << 20
    )
    assert not battery.rejected(scores)


@pytest.mark.gpu
def test_the_noisy_copy_passes_on_a_gpu() -> None:
    scores = battery.examine_noise(ops.noisy_copy, CUDA, rows=64, cols=1 << 19)
    assert not battery.rejected(scores)


def test_scores_are_standard_normal_where_every_hypothesis_holds() -> None:
    """A battery with error bars too wide would pass anything."""
    scores = battery.examine_generator(normals, **SMALL)
    finite = [score for score in scores.values() if score]
    assert len(finite) > 2000
    assert abs(statistics.fmean(finite)) < 0.1
    assert abs(statistics.pstdev(finite) - 1) < 0.05


@pytest.fixture(scope="module")
def rejections() -> dict[object, dict[str, float]]:
    return {}


@pytest.mark.parametrize(
    ("source", "hypothesis"), BROKEN, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_broken_generator_is_found_out(
    source: battery.Source, hypothesis: str, rejections: dict[object, dict[str, float]]
) -> None:
    if source not in rejections:
        rejections[source] = battery.rejected(battery.examine_generator(source, **SMALL))
    assert any(name.startswith(hypothesis) for name in rejections[source])


@pytest.mark.parametrize(
    ("copy", "hypothesis"), BROKEN_COPIES, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_broken_noisy_copy_is_found_out(copy: battery.NoisyCopy, hypothesis: str) -> None:
    scores = battery.rejected(battery.examine_noise(copy, CPU, rows=16, cols=1 << 14))
    assert hypothesis in scores
