"""The laws hold for layers of bitsandbytes, and their noise is that of a dense layer."""

import contextlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from flatlora import Target, find_targets, sigma_at
from flatlora import memory as memory_module
from flatlora.config import Memory
from flatlora.ops import Stream, noise_key
from flatlora.ops.reference import standard_normals
from tests.flatlora.quantising import (
    CPU,
    INT8,
    NF4,
    SEED,
    SIGMA,
    STEP,
    STEPS,
    Format,
    MakeBatch,
    MakeModel,
    all_formats,
    base_hash,
    both_memories,
    both_widths,
    clean_weight,
    dense_twin,
    engine,
    gradients,
    loss_of,
    noisy_weight,
    one,
    quantised,
)
from tests.flatlora.quantising import model_of as model_of


class TestTheLaws:
    """Laws 1, 2 and 5, on a whole model."""

    @all_formats
    @both_memories
    def test_training_leaves_every_byte_of_the_base(
        self, model_of: MakeModel, make_batch: MakeBatch, how: Format, memory: Memory
    ) -> None:
        model = model_of(how)
        flat = engine(model, memory=memory)
        before = base_hash(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for step in range(STEPS):
            with flat.perturbed(step):
                torch.autograd.backward(loss_of(model, make_batch(step)))
            optimizer.step()
        assert base_hash(model) == before
        assert not any("forward" in vars(target.base) for target in flat.targets)

    @both_widths
    @both_memories
    def test_a_body_that_raises_leaves_the_base_and_no_forward(
        self, model_of: MakeModel, make_batch: MakeBatch, how: Format, memory: Memory
    ) -> None:
        model = model_of(how)
        flat = engine(model, memory=memory)
        before, clean = base_hash(model), loss_of(model, make_batch())
        with contextlib.suppress(KeyboardInterrupt), flat.perturbed(STEP):
            assert not torch.equal(loss_of(model, make_batch()), clean)
            raise KeyboardInterrupt
        assert base_hash(model) == before
        assert torch.equal(loss_of(model, make_batch()), clean)

    @all_formats
    def test_sigma_zero_is_plain_lora_bit_for_bit(
        self, model_of: MakeModel, make_batch: MakeBatch, how: Format
    ) -> None:
        plain, flat = model_of(how), model_of(how)
        torch.autograd.backward(loss_of(plain, make_batch()))
        with engine(flat, sigma=0.0).perturbed(STEP):
            torch.autograd.backward(loss_of(flat, make_batch()))
        for (name, a), (_, b) in zip(
            plain.named_parameters(), flat.named_parameters(), strict=True
        ):
            assert (a.grad is None) == (b.grad is None), name
            assert a.grad is None or (b.grad is not None and torch.equal(a.grad, b.grad)), name

    @all_formats
    @both_memories
    def test_gradients_equal_those_of_the_dense_reference(
        self, model_of: MakeModel, make_batch: MakeBatch, how: Format, memory: Memory
    ) -> None:
        expected_loss, expected = dense_reference(model_of(how), make_batch())
        loss, found = gradients(model_of(how), make_batch(), memory)
        # 8 bits: the noisy copy has float16's digits, and the model of the reference has not
        tolerance = 2e-4 if how.bits == 4 else 3e-3
        torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
        assert found.keys() == expected.keys()
        assert len(found) == 12
        for name, gradient in found.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(
                gradient.double(), expected[name], rtol=tolerance, atol=tolerance * scale, msg=name
            )

    @all_formats
    def test_memory_and_checkpointing_change_no_bit(
        self, model_of: MakeModel, make_batch: MakeBatch, how: Format
    ) -> None:
        _, expected = gradients(model_of(how), make_batch(), "resident")
        for memory in ("resident", "streamed"):
            for checkpointing in (False, True):
                model = model_of(how, checkpointing=checkpointing)
                _, found = gradients(model, make_batch(), memory)
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in found)

    @both_widths
    @both_memories
    def test_a_stale_graph_raises_instead_of_using_the_next_steps_noise(
        self, model_of: MakeModel, make_batch: MakeBatch, how: Format, memory: Memory
    ) -> None:
        model = model_of(how)
        flat = engine(model, memory=memory)
        with flat.perturbed(2):
            loss = loss_of(model, make_batch())
        with flat.perturbed(3):
            loss_of(model, make_batch())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(loss)

    @both_widths
    def test_auto_counts_the_dense_copies(
        self, model_of: MakeModel, monkeypatch: pytest.MonkeyPatch, how: Format
    ) -> None:
        model = model_of(how)
        size = 2 if how.bits == 8 else 4
        dense = sum(t.lora_b.shape[0] * t.lora_a.shape[1] * size for t in find_targets(model))
        for free, expected in ((2 * dense, "resident"), (2 * dense - 2, "streamed")):
            monkeypatch.setattr(memory_module, "free_memory", lambda device, free=free: free)
            assert engine(model, memory="auto").memory == expected


class Dense(nn.Module):
    """A layer with its perturbed weight and its adapter, in float64."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        weight = clean_weight(target).double()
        stream = Stream(noise_key(SEED, target.name), STEP, 0)
        z = standard_normals(stream, 0, weight.numel(), CPU).double().view_as(weight)
        self.lora_a = nn.Parameter(target.lora_a.detach().double())
        self.lora_b = nn.Parameter(target.lora_b.detach().double())
        self.scaling = target.scaling
        merged = weight + self.scaling * (self.lora_b @ self.lora_a).detach()
        std = sigma_at(STEP, STEPS, SIGMA) / math.sqrt(weight.shape[1]) * merged.norm(dim=1)
        self.noisy = weight + std[:, None] * z

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.noisy + self.scaling * self.lora_b @ self.lora_a)


def dense_reference(model: PeftModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    base = model.get_base_model()
    layers = {target.name: Dense(target) for target in find_targets(model)}
    for name, layer in layers.items():
        base.set_submodule(name, layer)
    loss: Tensor = base.double()(**batch).loss
    torch.autograd.backward(loss)
    return loss.detach(), {
        f"{name}.lora_{factor}.default.weight": parameter.grad
        for name, layer in layers.items()
        for factor, parameter in (("A", layer.lora_a), ("B", layer.lora_b))
        if parameter.grad is not None
    }


class TestOneLayer:
    """What a perturbed layer computes."""

    @pytest.mark.parametrize("features", [64, 63], ids=["whole counters", "odd rows"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @all_formats
    @both_memories
    def test_its_noise_is_that_of_a_dense_layer_of_the_same_name(
        self, how: Format, features: int, dtype: torch.dtype, memory: Memory
    ) -> None:
        layer = quantised(nn.Linear(features, 32, bias=False, dtype=dtype), how)
        if how.bits == 8:
            dtype = torch.float16
        weights = []
        for base in (dense_twin(layer), layer):
            model = one(base)
            with engine(model, memory=memory).perturbed(STEP):
                (target,) = find_targets(model)
                weights.append(target.base(torch.eye(features, dtype=dtype)).T)
        assert weights[0].dtype == weights[1].dtype == dtype
        assert torch.equal(*weights)
        assert not torch.equal(weights[1], dense_twin(layer).weight)

    @both_memories
    @pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
    def test_4_bits_compute_in_the_layers_dtype_and_answer_in_the_inputs(
        self, memory: Memory, autocast: bool
    ) -> None:
        layer = quantised(nn.Linear(64, 32), Format(compute_dtype=torch.bfloat16))
        assert layer.bias is not None
        bias = layer.bias.detach().clone()
        model = one(layer)
        (target,) = find_targets(model)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        with engine(model, memory=memory).perturbed(STEP):
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                found = target.base(x)
            noisy = noisy_weight(target)
        expected = nn.functional.linear(x.bfloat16(), noisy.bfloat16(), bias.bfloat16())
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.float())
        assert torch.equal(layer.bias, bias)  # bitsandbytes itself rounds it in place

    @both_memories
    def test_8_bits_compute_in_the_inputs_dtype_and_under_autocast_in_its(
        self, memory: Memory
    ) -> None:
        layer = quantised(nn.Linear(64, 32), INT8)
        model = one(layer)
        (target,) = find_targets(model)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        with engine(model, memory=memory).perturbed(STEP):
            found = target.base(x)
            with torch.autocast("cpu", torch.bfloat16):
                cast = target.base(x)
            noisy = noisy_weight(target)
        assert torch.equal(found, nn.functional.linear(x, noisy.float(), layer.bias))
        expected = nn.functional.linear(x.bfloat16(), noisy.bfloat16(), layer.bias.bfloat16())
        assert cast.dtype == torch.float32
        assert torch.equal(cast, expected.float())

    @both_memories
    def test_8_bits_leave_float64_alone_under_autocast(self, memory: Memory) -> None:
        model = one(quantised(nn.Linear(64, 32), INT8))
        (target,) = find_targets(model)
        x = torch.randn(3, 64, dtype=torch.float64)
        with engine(model, memory=memory).perturbed(STEP):
            expected = target.base(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(target.base(x), expected)

    @both_widths
    @both_memories
    def test_inside_the_block_a_layer_without_its_adapter_is_clean(
        self, how: Format, memory: Memory
    ) -> None:
        model: Any = one(quantised(nn.Linear(64, 32), how))
        (target,) = find_targets(model)
        x = torch.randn(3, 64)
        expected = target.base(x)
        with engine(model, memory=memory).perturbed(STEP):
            assert not torch.equal(target.base(x), expected)
            with model.disable_adapter():
                assert torch.equal(target.base(x), expected)

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, None)],
        ids=str,
    )
    def test_the_first_input_decides_the_compute_dtype_as_without_noise(
        self, dtype: torch.dtype, expected: torch.dtype | None
    ) -> None:
        layers: list[Any] = [quantised(nn.Linear(64, 32, dtype=dtype), NF4) for _ in range(2)]
        x = torch.randn(3, 64, dtype=dtype)
        layers[0](x)
        model = one(layers[1])
        with engine(model).perturbed(STEP):
            (target,) = find_targets(model)
            assert target.base(x).dtype == dtype
        for layer in layers:
            assert layer.compute_type_is_set
            assert layer.compute_dtype == expected

    @both_widths
    @both_memories
    def test_a_trained_bias_and_the_input_have_gradients(self, how: Format, memory: Memory) -> None:
        layer = quantised(nn.Linear(64, 32), how)
        model = one(layer, bias="all")
        (target,) = find_targets(model)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with engine(model, memory=memory).perturbed(STEP):
            target.base(x).sum().backward()
            noisy = noisy_weight(target)
        assert layer.bias.grad is not None
        assert torch.equal(layer.bias.grad, torch.full((32,), 3.0))
        torch.testing.assert_close(x.grad, noisy.float().sum(dim=0).expand(3, -1))

    @all_formats
    def test_its_output_tends_to_the_layers_own_where_the_input_is_not_quantised(
        self, how: Format
    ) -> None:
        layer = quantised(nn.Linear(64, 32), how)
        model = one(layer)
        (target,) = find_targets(model)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        clean = target.base(x)  # a CPU in training multiplies by the matrix for 8 bits too
        with engine(model, sigma=1e-9).perturbed(STEP):
            perturbed = target.base(x)
        tolerance = 1e-5 if how.bits == 4 else 1e-3
        torch.testing.assert_close(perturbed, clean, rtol=0, atol=tolerance)


_COMPILED = """
import torch
from torch import nn
from tests.flatlora.quantising import INT8, NF4, STEP, engine, one, quantised

for how in (NF4, INT8):
    for memory in ("resident", "streamed"):
        torch._dynamo.reset()
        model = one(quantised(nn.Linear(64, 32), how))
        layer = model.get_base_model().layer
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(3, 64, requires_grad=True)
        with engine(model, memory=memory).perturbed(STEP):
            found, expected = compiled(x), layer(x)
            gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (found, expected)]
        assert torch.equal(found, expected) and torch.equal(*gradients), (how, memory)
"""


@pytest.mark.slow
def test_a_compiled_layer_has_the_same_noise_in_one_graph() -> None:
    # in a process of its own, as the compiler cannot look through the type checks of tests
    subprocess.run([sys.executable, "-c", _COMPILED], check=True, cwd=Path(__file__).parents[2])
