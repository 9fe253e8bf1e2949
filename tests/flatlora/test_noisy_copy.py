"""The operations on weights agree with their plain formulas, on odd sizes and in every dtype."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from flatlora import ops
from flatlora.ops import Stream, merged_row_std, noisy_copy, reference, row_square_norm
from flatlora.ops.reference import standard_normals

SIZES = [(1, 1), (1, 63), (63, 1), (63, 100), (100, 63), (7, 1000), (1000, 8)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
STREAM = Stream(key=(123, 456), step=7, draw=1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def nan_like(weight: Tensor) -> Tensor:
    return torch.full_like(weight, math.nan)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_noisy_copy_is_the_weight_plus_scaled_normals_rounded_once(
    size: tuple[int, int], dtype: torch.dtype, transposed: bool
) -> None:
    weight = random(*size, dtype=dtype)
    precise = torch.promote_types(dtype, torch.float32)
    std = random(*((1, size[1]) if transposed else (size[0], 1)), seed=1).abs().to(precise)
    z = standard_normals(STREAM, 0, weight.numel(), weight.device).view(size)
    expected = (weight.to(precise) + std * z.to(precise)).to(dtype)
    before = weight.clone()
    noisy = noisy_copy(weight, std, STREAM, out=nan_like(weight))
    assert torch.equal(noisy, expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("chunk", [1, 64, 999, 4096])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_chunks_change_nothing(
    chunk: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, a, b = random(63, 100), random(3, 100, seed=1), random(63, 3, seed=2)
    stored = weight.T.contiguous() if transposed else weight

    def noise() -> tuple[Tensor, Tensor]:
        norm = row_square_norm(stored, transposed=transposed)
        return norm, merged_row_std(
            stored, norm, a, b, scaling=2.0, sigma=0.1, transposed=transposed
        )

    norm, std = noise()
    noisy = noisy_copy(stored, std, STREAM, out=nan_like(stored))
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    torch.testing.assert_close(noise(), (norm, std))
    assert torch.equal(noisy_copy(stored, std, STREAM, out=nan_like(stored)), noisy)


def test_an_elements_noise_does_not_depend_on_where_one_starts() -> None:
    whole = standard_normals(STREAM, 0, 1000, torch.device("cpu"))
    for start, count in [(0, 1), (3, 7), (8, 8), (63, 101), (999, 1)]:
        part = standard_normals(STREAM, start, count, torch.device("cpu"))
        assert torch.equal(part, whole[start : start + count])


def test_a_weight_that_is_not_contiguous_counts_in_its_own_order() -> None:
    weight, std = random(40, 24), random(24, 1, seed=1).abs()
    noisy = noisy_copy(weight.T, std, STREAM, out=torch.empty(24, 40))
    expected = noisy_copy(weight.T.contiguous(), std, STREAM, out=torch.empty(24, 40))
    assert torch.equal(noisy, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_strengths_that_do_not_fit_the_weight_are_refused(backend: ops.Backend) -> None:
    weight = random(24, 40)
    refused = pytest.raises(ValueError, match="neither one value per row nor one per column")
    with ops.use(backend), refused:
        noisy_copy(weight, torch.ones(1, 1), STREAM, out=nan_like(weight))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 3, 8)], ids=str)
def test_an_empty_weight_has_no_noise(shape: tuple[int, ...]) -> None:
    weight, std = torch.empty(shape), torch.ones(*shape[:-1], 1)
    assert noisy_copy(weight, std, STREAM, out=weight.clone()).shape == shape
    assert row_square_norm(weight, transposed=False).shape == shape[:-1]


def test_the_tables_do_not_depend_on_the_default_device() -> None:
    cpu = torch.device("cpu")
    expected = standard_normals(STREAM, 0, 40, cpu)
    reference._tables.cache_clear()
    with torch.device("meta"):
        found = standard_normals(STREAM, 0, 40, cpu)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [({}, "auto"), ({"FLATLORA_KERNELS": "1"}, "auto"), ({"FLATLORA_KERNELS": "0"}, "reference")],
    ids=str,
)
def test_the_environment_can_force_the_reference(environment: dict[str, str], chosen: str) -> None:
    assert ops.backend_of(environment) == chosen


def test_kernels_do_not_serve_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, serves in ((None, importlib.util.find_spec("triton") is not None), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", version)
        ops._has_triton.cache_clear()
        assert ops._has_triton() == serves
    ops._has_triton.cache_clear()


def test_kernels_that_are_forced_refuse_float64() -> None:
    weight = random(4, 8, dtype=torch.float64)
    with ops.use("triton"), pytest.raises(ValueError, match="do not know torch"):
        noisy_copy(weight, torch.ones(4, 1), STREAM, out=nan_like(weight))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_row_std_equals_that_of_the_dense_merged_weight(
    size: tuple[int, int], dtype: torch.dtype, transposed: bool
) -> None:
    out, features = size
    weight = random(out, features, dtype=dtype)
    a, b = random(5, features, seed=1, dtype=dtype), random(out, 5, seed=2, dtype=dtype)
    stored = weight.T.contiguous() if transposed else weight
    std = merged_row_std(
        stored,
        row_square_norm(stored, transposed=transposed),
        a,
        b,
        scaling=0.7,
        sigma=0.1,
        transposed=transposed,
    )
    merged = weight.double() + 0.7 * b.double() @ a.double()
    expected = 0.1 / math.sqrt(features) * merged.norm(dim=1)
    precise = torch.promote_types(dtype, torch.float32)
    assert std.dtype == precise
    assert std.shape == ((1, out) if transposed else (out, 1))
    # absolute too: where the update all but cancels a row, the identity loses relative digits
    tolerance = 20 * torch.finfo(precise).eps
    scale = float(expected.max())
    torch.testing.assert_close(
        std.flatten().double(), expected, rtol=tolerance, atol=math.sqrt(tolerance) * scale * 1e-2
    )


def test_a_row_that_the_update_cancels_has_no_noise_rather_than_nan() -> None:
    weight = random(50, 1) @ random(1, 40, seed=1)
    a, b = weight[:1] / weight[0].norm(), -weight @ (weight[:1] / weight[0].norm()).T
    std = merged_row_std(
        weight,
        row_square_norm(weight, transposed=False),
        a,
        b,
        scaling=1.0,
        sigma=0.1,
        transposed=False,
    )
    assert not std.isnan().any()
    assert float(std.max()) < 1e-3 * float(weight.norm(dim=1).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_square_norms_keep_float32_precision_on_long_rows(dtype: torch.dtype) -> None:
    weight = (1 + random(3, 200_000) * 0.1).to(dtype)
    expected = weight.double().square().sum(dim=1)
    found = row_square_norm(weight, transposed=False)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
