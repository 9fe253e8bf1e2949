"""Layers of bitsandbytes on a GPU: its CUDA code, and our kernels. Run with ``pytest -m gpu``."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from flatlora import find_targets, ops
from flatlora.quantised import FourBitWeight, quantised_weight
from tests.flatlora.quantising import (
    FORMATS,
    INT8,
    STEP,
    Format,
    MakeBatch,
    MakeModel,
    all_formats,
    base_hash,
    bnb,
    dense_twin,
    engine,
    gradients,
    noisy_weight,
    one,
    quantised,
)
from tests.flatlora.quantising import model_of as model_of

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("how", FORMATS[:3], ids=str)
@pytest.mark.parametrize("size", [(64, 128), (300, 264), (7, 63), (33, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_4_bits_mean_what_bitsandbytes_says_bit_for_bit(
    backend: ops.Backend, how: Format, size: tuple[int, int], dtype: torch.dtype
) -> None:
    layer: Any = quantised(nn.Linear(*size[::-1], bias=False, dtype=dtype), how, CUDA)
    stored = FourBitWeight(layer)
    found = torch.full(size, math.nan, dtype=dtype, device=CUDA)
    with ops.use(backend):
        stored.write_dense(found)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(found, expected)


def test_8_bits_mean_what_the_layers_own_backward_multiplies_by() -> None:
    layer = quantised(nn.Linear(64, 40, bias=False), INT8, CUDA)
    x = torch.zeros(40, 64, dtype=torch.float16, device=CUDA, requires_grad=True)
    layer(x).backward(torch.eye(40, dtype=torch.float16, device=CUDA))
    stored = quantised_weight(layer)
    assert stored is not None
    out = torch.full((40, 64), math.nan, dtype=torch.float16, device=CUDA)
    stored.write_dense(out)
    assert x.grad is not None
    assert torch.equal(out, x.grad)


@all_formats
@pytest.mark.parametrize("features", [64, 1032, 63], ids=["tile", "tiles", "odd rows"])
def test_its_noise_is_that_of_a_dense_layer_of_the_same_name(how: Format, features: int) -> None:
    layer = nn.Linear(features, 40, bias=False, dtype=torch.float16)
    layer = quantised(layer, how, CUDA)
    weights = []
    for base in (dense_twin(layer), layer):
        model = one(base)
        with engine(model).perturbed(STEP):
            (target,) = find_targets(model)
            weights.append(noisy_weight(target))
    torch.testing.assert_close(*weights)
    assert not torch.equal(weights[1], dense_twin(layer).weight)


@all_formats
def test_memory_changes_no_bit_and_training_no_byte_of_the_base(
    model_of: MakeModel, make_batch: MakeBatch, how: Format
) -> None:
    found = {}
    for memory in ("resident", "streamed"):
        model = model_of(how, dtype=torch.bfloat16, device=CUDA).to(CUDA)
        before = base_hash(model)
        batch = {name: value.to(CUDA) for name, value in make_batch().items()}
        _, found[memory] = gradients(model, batch, memory)
        assert base_hash(model) == before
    assert len(found["resident"]) == 12
    for name, gradient in found["resident"].items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, found["streamed"][name]), name
