"""Law 5: one and the same noise in forward, backward and recomputation.

The reference is dense: float64, every target's ``W + noise + s B A`` built as a matrix and
differentiated by autograd alone.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

from flatlora import FlatLora, FlatLoraConfig, Target, sigma_at
from flatlora.config import Memory
from flatlora.ops import Stream, noise_key
from flatlora.ops.reference import standard_normals

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]
STEP, STEPS, SIGMA, SEED, DRAW = 5, 8, 0.3, 11, 2


class Dense(nn.Module):
    """A layer with its merged, perturbed weight as one float64 matrix ``(out, in)``."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        weight = target.weight.detach().double()
        key = noise_key(SEED, target.name)
        z = standard_normals(Stream(key, STEP, DRAW), 0, weight.numel(), weight.device).double()
        z = z.view(weight.shape)
        if target.transposed:
            weight, z = weight.T, z.T
        self.a = nn.Parameter(target.lora_a.detach().double())
        self.b = nn.Parameter(target.lora_b.detach().double())
        self.scaling = target.scaling
        merged = weight + self.scaling * (self.b @ self.a).detach()
        std = sigma_at(STEP, STEPS, SIGMA) / math.sqrt(weight.shape[1]) * merged.norm(dim=1)
        self.noisy = weight + std[:, None] * z
        bias = target.base.bias
        self.bias = bias.detach().double() if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.noisy + self.scaling * self.b @ self.a, self.bias)


class Stack(nn.Module):
    """Two layers that stay in float64, as language models do not (their norms use float32)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [(7, 63), (63, 5)]
        if kind == "linear":
            self.layers = nn.ModuleList(nn.Linear(n, m, bias=m == 5) for n, m in sizes)
        else:
            self.layers = nn.ModuleList(Conv1D(m, n) for n, m in sizes)  # type: ignore[no-untyped-call]
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Tensor) -> ModelOutput:
        loss = self.layers[1](self.layers[0](x).tanh()).square().mean()
        return ModelOutput(loss=loss)  # type: ignore[no-untyped-call]


def dense_reference(model: PeftModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradients of A and B by target."""
    targets = engine(model, "streamed").targets
    base = copy.deepcopy(model).double().get_base_model()
    layers = {target.name: Dense(target) for target in targets}
    for name, layer in layers.items():
        base.set_submodule(name, layer)
    loss: Tensor = base(**batch).loss
    torch.autograd.backward(loss)
    return loss.detach(), {
        f"{name}.{factor}": parameter.grad
        for name, layer in layers.items()
        for factor, parameter in (("a", layer.a), ("b", layer.b))
        if parameter.grad is not None
    }


def engine(model: PeftModel, memory: Memory) -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=SIGMA, seed=SEED, memory=memory), STEPS)


def flat_gradients(
    model: PeftModel, batch: dict[str, Tensor], memory: Memory
) -> tuple[Tensor, dict[str, Tensor]]:
    flat = engine(model, memory)
    with flat.perturbed(STEP, DRAW):
        loss: Tensor = model(**batch).loss
        torch.autograd.backward(loss)
    return loss.detach(), {
        f"{target.name}.{factor}": tensor.grad
        for target in flat.targets
        for factor, tensor in (("a", target.lora_a), ("b", target.lora_b))
        if tensor.grad is not None
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)], ids=["f64", "f32"]
)
def test_gradients_equal_those_of_the_dense_reference(
    peft_model: MakeModel,
    make_batch: MakeBatch,
    kind: str,
    memory: Memory,
    checkpointing: str | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    model = peft_model(kind, dtype=dtype, checkpointing=checkpointing).to(dtype)
    expected = dense_reference(peft_model(kind, dtype=dtype).to(dtype), make_batch())
    assert_equal(flat_gradients(model, make_batch(), memory), expected, tolerance)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_gradients_equal_the_reference_to_float64(kind: str, memory: Memory) -> None:
    lora = LoraConfig(r=3, target_modules=r"layers\.\d", fan_in_fan_out=kind == "conv1d")
    model = get_peft_model(Stack(kind), lora)
    assert isinstance(model, PeftModel)
    model = model.double()
    for target in engine(model, memory).targets:
        nn.init.normal_(target.lora_b)
    x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = dense_reference(model, {"x": x})
    assert_equal(flat_gradients(model, {"x": x}, memory), expected, 1e-12)


def assert_equal(
    found: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    tolerance: float,
) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    for name, gradient in found[1].items():
        scale = float(expected[1][name].abs().max())
        assert scale > 0
        torch.testing.assert_close(
            gradient.double(), expected[1][name], rtol=tolerance, atol=tolerance * scale, msg=name
        )


def test_the_reference_itself_is_noisy(peft_model: MakeModel, make_batch: MakeBatch) -> None:
    model = peft_model(dtype=torch.float64)
    noisy, _ = dense_reference(model, make_batch())
    clean = model(**make_batch()).loss.detach()
    assert abs(float(noisy - clean)) > 1e-4


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_bit(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory, checkpointing: str
) -> None:
    loss, gradients = flat_gradients(peft_model(), make_batch(), memory)
    again_loss, again = flat_gradients(
        peft_model(checkpointing=checkpointing), make_batch(), memory
    )
    assert torch.equal(loss, again_loss)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())
