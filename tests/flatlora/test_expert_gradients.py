"""Gradients of experts' adapters: laws 2 and 5, for PEFT's ``target_parameters``.

The reference is dense and knows nothing of the library's views: in float64, every
``W + noise + s B A`` is built expert by expert and handed to the plain base model.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.func import functional_call

from flatlora import (
    FlatLora,
    find_targets,
    sigma_at,
)
from flatlora.config import Memory
from flatlora.ops import Stream, noise_key
from flatlora.ops.reference import standard_normals
from tests.flatlora.moe import (
    DRAW,
    ONES,
    SEED,
    SIGMA,
    STEP,
    STEPS,
    adapted,
    base_model,
    engine,
    inputs,
    loss_of,
    moe,
    traces_left,
)

MakeBatch = Callable[..., dict[str, Tensor]]
Gradients = dict[str, Tensor]

both_memories = pytest.mark.parametrize("memory", ["resident", "streamed"])
both_kinds = pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])


def gradients_of(flat: FlatLora) -> Gradients:
    """Gradients of A and B as PEFT stores them."""
    return {
        f"{target.name}.{factor}": weight.grad
        for target in flat.targets
        for factor in ("lora_A", "lora_B")
        if (weight := getattr(target.layer, factor)[target.adapter].weight).grad is not None
    }


def flat_gradients(
    model: PeftModel, batch: dict[str, Tensor], memory: Memory
) -> tuple[Tensor, Gradients]:
    flat = engine(model, memory)
    with flat.perturbed(STEP, DRAW):
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
    return loss.detach(), gradients_of(flat)


def update(weight: Tensor, a: Tensor, b: Tensor, *, as_in_out: bool) -> Tensor:
    """``B A`` in the shape of a stored weight, from A and B as PEFT stores them."""
    if weight.ndim == 2:
        return b @ a
    experts = len(weight)
    rank = len(a) // experts
    parts = [b[:, e::experts] @ a[e * rank : (e + 1) * rank] for e in range(experts)]
    return torch.stack([part.T if as_in_out else part for part in parts])


def dense_reference(
    model: PeftModel,
    base: nn.Module,
    batch: dict[str, Tensor],
    *,
    peft_says_in_out: bool,
    in_out: bool,
) -> tuple[Tensor, Gradients]:
    """Loss and gradients in float64.

    Args:
        model: The adapted model.
        base: The same model without adapter.
        batch: Its input.
        peft_says_in_out: Whether PEFT takes stacks to be stored ``in x out``.
        in_out: Whether they are.
    """
    weights: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    for target in find_targets(model):
        layer: Any = target.layer
        a, b = (
            factor[target.adapter].weight.detach().double().requires_grad_()
            for factor in (layer.lora_A, layer.lora_B)
        )
        weight = target.weight.detach().double()
        change = target.scaling * update(weight, a, b, as_in_out=peft_says_in_out)
        inputs = weight.ndim - (2 if in_out and weight.ndim == 3 else 1)
        norm = (weight + change).detach().norm(dim=inputs, keepdim=True)
        std = sigma_at(STEP, STEPS, SIGMA) / math.sqrt(weight.shape[inputs]) * norm
        stream = Stream(noise_key(SEED, target.name), STEP, DRAW)
        z = standard_normals(stream, 0, weight.numel(), weight.device).view(weight.shape)
        name = target.name if type(layer) is ParamWrapper else f"{target.name}.weight"
        weights[name] = weight + std * z + change
        factors |= {f"{target.name}.lora_A": a, f"{target.name}.lora_B": b}
    loss = functional_call(base.double().train(), weights, kwargs=batch).loss
    torch.autograd.backward(loss)
    return loss.detach(), {
        name: leaf.grad for name, leaf in factors.items() if leaf.grad is not None
    }


def assert_equal(
    found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients], tolerance: float
) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    for name, gradient in found[1].items():
        scale = float(expected[1][name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            gradient.double(), expected[1][name], rtol=tolerance, atol=tolerance * scale, msg=name
        )


def assert_same_bits(one: tuple[Tensor, Gradients], other: tuple[Tensor, Gradients]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


@both_kinds
@both_memories
@pytest.mark.parametrize(
    ("dtype", "tolerance", "checkpointing"),
    [
        (torch.float32, 5e-4, None),
        (torch.float64, 1e-5, None),
        (torch.float64, 1e-5, "reentrant"),
        (torch.float64, 1e-5, "non-reentrant"),
    ],
)
def test_gradients_equal_those_of_the_dense_reference(
    make_batch: MakeBatch,
    kind: str,
    memory: Memory,
    dtype: torch.dtype,
    tolerance: float,
    checkpointing: str | None,
) -> None:
    model, batch = moe(kind, dtype=dtype, checkpointing=checkpointing), make_batch()
    in_out = kind == "gpt_oss"
    expected = dense_reference(
        moe(kind, dtype=dtype), base_model(kind), batch, peft_says_in_out=in_out, in_out=in_out
    )
    assert_equal(flat_gradients(model, batch, memory), expected, tolerance)


@both_memories
@pytest.mark.parametrize("name", ONES)
def test_gradients_equal_the_reference_to_float64(name: str, memory: Memory) -> None:
    make, parameters, in_out = ONES[name]
    model = adapted(make(), target_parameters=parameters).double()
    expected = dense_reference(model, make(), inputs(), peft_says_in_out=False, in_out=in_out)
    assert_equal(flat_gradients(model, inputs(), memory), expected, 1e-12)
    clean = loss_of(model, inputs()).detach()
    assert abs(float(clean - expected[0])) > 1e-3 * float(clean)  # the reference is noisy


@both_kinds
def test_both_memories_and_checkpointing_agree_to_the_bit(make_batch: MakeBatch, kind: str) -> None:
    first = flat_gradients(moe(kind), make_batch(), "resident")
    assert_same_bits(flat_gradients(moe(kind), make_batch(), "streamed"), first)
    for checkpointing in ("reentrant", "non-reentrant"):
        for memory in ("resident", "streamed"):
            again = flat_gradients(moe(kind, checkpointing=checkpointing), make_batch(), memory)
            assert_same_bits(again, first)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_compute_experts_meets_the_noise(make_batch: MakeBatch, experts: str) -> None:
    model = adapted(base_model("mixtral", experts_implementation=experts))
    expected = dense_reference(
        model, base_model("mixtral"), make_batch(), peft_says_in_out=False, in_out=False
    )
    assert_equal(flat_gradients(model, make_batch(), "streamed"), expected, 5e-4)


@both_kinds
@both_memories
def test_the_noise_keeps_nothing_more_for_the_backward_pass(
    make_batch: MakeBatch, kind: str, memory: Memory
) -> None:
    model = moe(kind, target_modules=[])
    flat = engine(model, memory)

    def kept() -> dict[int, int]:
        """Sizes of the storages that the graph keeps, by address."""
        storages: list[torch.UntypedStorage] = []  # alive, so that no address serves twice

        def pack(tensor: Tensor) -> Tensor:
            storages.append(tensor.untyped_storage())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model, make_batch())
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    clean = kept()
    with flat.perturbed(STEP):
        noisy = kept()
    assert sum(noisy.values()) == sum(clean.values())
    assert all(target.weight.untyped_storage().data_ptr() not in noisy for target in flat.targets)


@both_kinds
@both_memories
@pytest.mark.parametrize(("sigma", "step"), [(0.0, STEP), (SIGMA, 0)], ids=["config", "schedule"])
def test_sigma_zero_is_plain_lora_bit_for_bit(
    make_batch: MakeBatch, kind: str, memory: Memory, sigma: float, step: int
) -> None:
    plain, model = moe(kind), moe(kind)
    loss = loss_of(plain, make_batch())
    torch.autograd.backward(loss)
    flat = engine(model, memory, sigma=sigma)
    with flat.perturbed(step):
        assert traces_left(flat) == []
        found = loss_of(model, make_batch())
        torch.autograd.backward(found)
    assert_same_bits((found, gradients_of(flat)), (loss, gradients_of(engine(plain))))
