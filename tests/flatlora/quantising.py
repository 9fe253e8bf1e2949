"""Models on quantised layers, for the tests of these."""

import copy
import hashlib
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from flatlora import FlatLora, FlatLoraConfig, Target
from flatlora.config import Memory
from flatlora.quantised import QuantisedWeight, quantised_weight

# its own types contradict themselves
bnb: Any = importlib.import_module("bitsandbytes")

MakeBase = Callable[[str], nn.Module]
MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]

CPU = torch.device("cpu")
STEP, STEPS, SIGMA, SEED = 3, 4, 0.3, 11
NAMES = ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class Format:
    """How a layer is quantised."""

    bits: int = 4
    quant_type: str = "nf4"
    nested: bool = False
    compute_dtype: torch.dtype | None = None
    storage: torch.dtype = torch.uint8

    def __str__(self) -> str:
        nested = "-nested" if self.nested else ""
        return "int8" if self.bits == 8 else f"{self.quant_type}{nested}"


NF4, INT8 = Format(), Format(bits=8)
FORMATS = [NF4, Format(nested=True), Format(quant_type="fp4"), INT8]

all_formats = pytest.mark.parametrize("how", FORMATS, ids=str)
both_widths = pytest.mark.parametrize("how", [Format(nested=True), INT8], ids=str)
both_memories = pytest.mark.parametrize("memory", ["resident", "streamed"])


def unquantised(linear: nn.Linear, how: Format) -> nn.Linear:
    """A layer of bitsandbytes that holds a float weight still."""
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.data.clone().cpu()  # from there bitsandbytes quantises
    if how.bits == 8:
        layer: Any = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            *sizes,
            bias=bias,
            compute_dtype=how.compute_dtype,
            compress_statistics=how.nested,
            quant_type=how.quant_type,
            quant_storage=how.storage,
        )
        layer.weight.data = weight
    layer.bias = copy.deepcopy(linear.bias)
    return layer.train(linear.training)  # type: ignore[no-any-return]


def quantised(linear: nn.Linear, how: Format, device: torch.device = CPU) -> nn.Linear:
    return unquantised(linear, how).to(device)


def quantise(model: nn.Module, how: Format, device: torch.device = CPU) -> nn.Module:
    """Quantise a model's targets, and let PEFT know."""
    for name, module in list(model.named_modules()):
        if name.endswith(NAMES):
            assert isinstance(module, nn.Linear)
            model.set_submodule(name, quantised(module, how, device))
    setattr(model, f"is_loaded_in_{how.bits}bit", True)
    return model


@pytest.fixture
def model_of(base_model: MakeBase) -> MakeModel:
    """A tiny PEFT model on quantised layers, with an adapter that already changes them."""

    def make(
        how: Format,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        checkpointing: bool = False,
        told: bool = True,
        **lora: Any,
    ) -> PeftModel:
        base: Any = quantise(base_model("llama").to(device, dtype), how, device)
        if not told:
            base.is_loaded_in_4bit = base.is_loaded_in_8bit = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = LoraConfig(r=3, lora_alpha=5, target_modules=list(NAMES), **lora)
            model = get_peft_model(base, config)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.02)
        assert isinstance(model, PeftModel)
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        return model.train()

    return make


def engine(model: nn.Module, sigma: float = SIGMA, memory: Memory = "resident") -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=sigma, seed=SEED, memory=memory), STEPS)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def base_hash(model: nn.Module) -> str:
    """Of everything frozen, and of what the codes need to be understood."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def clean_weight(target: Target) -> Tensor:
    stored = target.stored
    assert isinstance(stored, QuantisedWeight)
    out = torch.full(stored.shape, math.nan, dtype=stored.dtype, device=stored.tensor.device)
    stored.write_dense(out)
    return out


def gradients(
    model: PeftModel, batch: dict[str, Tensor], memory: Memory
) -> tuple[Tensor, dict[str, Tensor]]:
    with engine(model, memory=memory).perturbed(STEP):
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
    return loss.detach(), {
        name.removeprefix("base_model.model."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> ModelOutput:
        return ModelOutput(loss=self.layer(x).float().square().mean())  # type: ignore[no-untyped-call]


def one(layer: nn.Linear, **lora: Any) -> PeftModel:
    model = get_peft_model(One(layer), LoraConfig(r=2, target_modules=["layer"], **lora))
    assert isinstance(model, PeftModel)
    return model.train()


def dense_twin(layer: nn.Linear) -> nn.Linear:
    """An ordinary layer with the matrix that a quantised one means."""
    stored = quantised_weight(layer)
    assert stored is not None
    twin = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=stored.dtype)
    twin.to(stored.tensor.device)
    stored.write_dense(twin.weight.data)
    return twin


def noisy_weight(target: Target) -> Tensor:
    """The noisy copy, written anew, of a target that is perturbed at the moment."""
    forward: Any = vars(target.base)["forward"]
    stored, noise = target.stored, forward.noise
    out = torch.full(stored.shape, math.nan, dtype=stored.dtype, device=stored.tensor.device)
    stored.write_noisy(stored.tensor, noise.std, noise.key, noise.clock, out)
    return out
