"""The kernels of quantised weights agree with their reference, on odd sizes and in every dtype.

On a GPU where there is one, otherwise in Triton's interpreter.
"""

import math

import pytest
import torch
from torch import Tensor

from flatlora import ops
from flatlora.ops import Stream, noisy_copy
from flatlora.ops.quantised import (
    QUANT_TYPES,
    EightBit,
    FourBit,
    NestedScale,
    Quantised,
    dequantise,
    levels_of,
    noisy_dequantise,
)
from tests.flatlora.interpreter import DEVICE, KERNELS
from tests.flatlora.quantising import Format, MakeBatch, MakeModel, all_formats, gradients
from tests.flatlora.quantising import model_of as model_of

pytestmark = KERNELS

STREAM = Stream(key=(123, 2**32 - 456), step=7, draw=1)
# rows of whole counters: one, an odd number, and more than a program has
EVEN = [(1, 8), (5, 264), (3, 1032)]
ODD = [(1, 1), (7, 63), (33, 100), (3, 5)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALES = ["plain", "nested"]

sizes = pytest.mark.parametrize("size", EVEN + ODD, ids=str)
even_sizes = pytest.mark.parametrize("size", EVEN, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
scales = pytest.mark.parametrize("scales", SCALES)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def four_bit(
    size: tuple[int, int], scales: str, *, quant_type: str = "nf4", blocksize: int = 64
) -> FourBit:
    """Random codes; the second level of scales has blocks of eight, so that there are several."""
    elements, random = math.prod(size), generator()
    blocks = -(-elements // blocksize)
    nested = None
    scale = torch.rand(blocks, generator=random) + 0.5
    if scales == "nested":
        nested = NestedScale(
            levels=torch.linspace(-1, 1, 256).to(DEVICE),
            scale=torch.rand(-(-blocks // 8), generator=random).to(DEVICE),
            blocksize=8,
            offset=torch.tensor(1.7, device=DEVICE),
        )
        scale = torch.randint(256, (blocks,), dtype=torch.uint8, generator=random)
    packed = torch.randint(256, ((elements + 1) // 2,), dtype=torch.uint8, generator=random)
    return FourBit(
        packed.to(DEVICE), levels_of(quant_type, DEVICE), scale.to(DEVICE), blocksize, nested
    )


def eight_bit(size: tuple[int, int]) -> EightBit:
    codes = torch.randint(-127, 128, size, dtype=torch.int8, generator=generator())
    return EightBit(codes.to(DEVICE), torch.rand(size[0], generator=generator()).to(DEVICE))


def std_of(size: tuple[int, int]) -> Tensor:
    return torch.rand(size[0], 1, generator=generator()).to(DEVICE)


def nans(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.full(size, math.nan, dtype=dtype, device=DEVICE)


def clean(weight: Quantised, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return dequantise(weight, out=nans(size, dtype))


def noisy(weight: Quantised, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    clock = ops.clock_of(STREAM, DEVICE)
    return noisy_dequantise(weight, std_of(size), STREAM.key, clock, out=nans(size, dtype))


def assert_noise_agrees(found: Tensor, expected: Tensor, size: tuple[int, int]) -> None:
    """To rounding: 1e-4 of a standard deviation, and the last bit of the dtype."""
    bound = 1e-4 * std_of(size) + torch.finfo(found.dtype).eps * expected.abs().float()
    assert bool(((found.double() - expected.double()).abs() <= bound).all())


@sizes
@dtypes
@scales
def test_dequantised_codes_are_the_references_bits(
    size: tuple[int, int], dtype: torch.dtype, scales: str
) -> None:
    weight = four_bit(size, scales)
    with ops.use("reference"):
        expected = clean(weight, size, dtype)
    with ops.use("triton"):
        assert torch.equal(clean(weight, size, dtype), expected)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@scales
def test_every_type_and_blocksize_is_understood(
    quant_type: str, blocksize: int, scales: str
) -> None:
    size = (9, 1024)
    weight = four_bit(size, scales, quant_type=quant_type, blocksize=blocksize)
    with ops.use("reference"):
        expected = clean(weight, size, torch.float32)
        perturbed = noisy(weight, size, torch.float32)
    with ops.use("triton"):
        assert torch.equal(clean(weight, size, torch.float32), expected)
        assert_noise_agrees(noisy(weight, size, torch.float32), perturbed, size)


@sizes
@dtypes
@scales
def test_the_noisy_copy_of_4_bits_agrees_with_the_reference(
    size: tuple[int, int], dtype: torch.dtype, scales: str
) -> None:
    weight = four_bit(size, scales)
    with ops.use("reference"):
        expected = noisy(weight, size, dtype)
    with ops.use("triton"):
        assert_noise_agrees(noisy(weight, size, dtype), expected, size)


@sizes
@dtypes
def test_the_noisy_copy_of_8_bits_agrees_with_the_reference(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = eight_bit(size)
    with ops.use("reference"):
        expected = noisy(weight, size, dtype)
    with ops.use("triton"):
        assert_noise_agrees(noisy(weight, size, dtype), expected, size)


@even_sizes
@dtypes
@pytest.mark.parametrize("kind", [*SCALES, "8 bits"])
def test_one_pass_writes_the_bits_of_two(
    size: tuple[int, int], dtype: torch.dtype, kind: str
) -> None:
    weight = eight_bit(size) if kind == "8 bits" else four_bit(size, kind)
    with ops.use("triton"):
        dense = clean(weight, size, dtype)
        expected = noisy_copy(dense, std_of(size), STREAM, out=nans(size, dtype))
        assert torch.equal(noisy(weight, size, dtype), expected)


@scales
def test_codes_that_do_not_start_at_a_word_are_read_as_bytes(scales: str) -> None:
    size = (5, 1000)
    weight = four_bit(size, scales)
    unaligned = torch.cat([weight.packed[:1], weight.packed])[1:]
    shifted = FourBit(unaligned, weight.levels, weight.scale, weight.blocksize, weight.nested)
    assert unaligned.data_ptr() % 4
    with ops.use("triton"):
        expected = noisy(weight, size, torch.bfloat16)
        assert torch.equal(noisy(shifted, size, torch.bfloat16), expected)


@scales
def test_nothing_of_the_weight_is_written(scales: str) -> None:
    size = (3, 264)
    weight = four_bit(size, scales)
    before = weight.packed.clone(), weight.scale.clone()
    with ops.use("triton"):
        noisy(weight, size, torch.bfloat16)
    assert all(map(torch.equal, (weight.packed, weight.scale), before))


def test_writing_raises_the_version_that_autograd_looks_at() -> None:
    size = (3, 264)
    versions, out = [0], nans(size, torch.float32)
    clock = ops.clock_of(STREAM, DEVICE)
    with ops.use("triton"):
        dequantise(four_bit(size, "plain"), out=out)
        versions.append(out._version)
        noisy_dequantise(eight_bit(size), std_of(size), STREAM.key, clock, out=out)
        versions.append(out._version)
    assert versions[0] < versions[1] < versions[2]


@all_formats
def test_the_kernels_gradients_agree_with_the_references(
    model_of: MakeModel, make_batch: MakeBatch, how: Format
) -> None:
    batch = {name: value.to(DEVICE) for name, value in make_batch().items()}
    found = {}
    for backend in ("reference", "triton"):
        model = model_of(how, device=DEVICE).to(DEVICE)
        with ops.use(backend):
            _, found[backend] = gradients(model, batch, "streamed")
    for name, gradient in found["triton"].items():
        expected = found["reference"][name]
        tolerance = 2e-3 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance, msg=name)
