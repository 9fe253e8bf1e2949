"""Law 4: the noise has the law's moments, and nothing is correlated with anything.

Sums of N independent terms stay within K standard errors of the law; with fixed seeds these tests
are exact repetitions, so K needs no room for luck beyond the first run.
"""

import math

import pytest
import torch
from torch import Tensor

from flatlora.ops import Stream, noise_key, noisy_copy
from flatlora.ops.reference import standard_normals

K = 4
N = 1 << 21
CPU = torch.device("cpu")


def normals(name: str = "a", step: int = 1, draw: int = 0, seed: int = 0, count: int = N) -> Tensor:
    return standard_normals(Stream(noise_key(seed, name), step, draw), 0, count, CPU).double()


def correlation(a: Tensor, b: Tensor) -> float:
    return float((a * b).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("power", "expected", "variance"),
    [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)],
    ids=["mean", "variance", "skewness", "kurtosis"],
)
def test_moments_are_those_of_a_normal(seed: int, power: int, expected: int, variance: int) -> None:
    moment = float((normals(seed=seed) ** power).mean())
    assert abs(moment - expected) < K * math.sqrt(variance / N)


@pytest.mark.parametrize("threshold", [0.5, 1, 2, 3, 4])
def test_tails_are_those_of_a_normal(threshold: float) -> None:
    share = math.erfc(threshold / math.sqrt(2))
    found = float((normals().abs() > threshold).double().mean())
    assert abs(found - share) < K * math.sqrt(share / N)


def test_no_value_exceeds_the_stated_bound() -> None:
    assert float(normals().abs().max()) <= 4.855


def test_every_place_in_a_block_is_standard_normal() -> None:
    places = normals().view(-1, 8)
    assert float(places.mean(dim=0).abs().max()) < K / math.sqrt(N / 8)
    assert float((places.var(dim=0) - 1).abs().max()) < K * math.sqrt(2 / (N / 8))


def test_places_in_a_block_are_uncorrelated_also_in_size() -> None:
    places = normals().view(-1, 8)
    for x in (places, (places.square() - 1) / math.sqrt(2)):
        products = (x.T @ x) / len(x) - torch.eye(8, dtype=torch.float64)
        assert float(products.fill_diagonal_(0).abs().max()) < K / math.sqrt(N / 8)


@pytest.mark.parametrize("lag", [1, 2, 4, 7, 8, 64, 4096])
def test_neighbours_and_rows_are_uncorrelated(lag: int) -> None:
    z = normals()
    assert abs(correlation(z[lag:], z[:-lag])) < K / math.sqrt(N)


@pytest.mark.parametrize(
    "other",
    [{"name": "b"}, {"step": 2}, {"draw": 1}, {"seed": 1}],
    ids=["layers", "steps", "draws", "seeds"],
)
def test_addresses_are_uncorrelated(other: dict[str, int]) -> None:
    a, b = normals(), normals(**other)  # type: ignore[arg-type]  # a name is the one string
    assert abs(correlation(a, b)) < K / math.sqrt(N)
    assert abs(correlation(a.square() - 1, b.square() - 1) / 2) < K / math.sqrt(N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_row_has_its_own_standard_deviation(dtype: torch.dtype) -> None:
    rows, cols = 16, 1 << 16
    std = torch.linspace(0.5, 8, rows)[:, None]
    weight = torch.zeros(rows, cols, dtype=dtype)
    noisy = noisy_copy(weight, std, Stream((1, 2), 3, 4), out=torch.empty_like(weight)).double()
    ratio = noisy.std(dim=1, keepdim=True) / std
    rounding = torch.finfo(dtype).eps ** 2
    assert float((ratio - 1).abs().max()) < K / math.sqrt(2 * cols) + rounding
