"""Models that are whole or sharded by FSDP2, and what a step of theirs computes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.pytorch_utils import Conv1D

from flatlora import FlatLora, FlatLoraConfig
from flatlora.config import Memory
from tests.flatlora.models import VOCAB, gpt2, llama

SEED, STEP, STEPS = 3, 3, 4
TARGETS = {
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "tiny": ["0", "1"],
}
# What is a unit of its own, beside the whole model.
WRAPPINGS: dict[str, tuple[type[nn.Module], ...]] = {
    "linears": (nn.Linear, Conv1D),
    "adapted": (LoraLinear,),
    "layers": (LlamaDecoderLayer, GPT2Block),
    "root": (),
}


class Found(NamedTuple):
    """What a step computes: logits, and the gradients of the adapter by parameter name."""

    logits: Tensor
    gradients: dict[str, Tensor]


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 1))  # one row: a rank has none of it


# 37 is not divisible by the number of ranks
BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": partial(llama, intermediate_size=37),
    "gpt2": partial(gpt2, n_inner=37),
    "tiny": tiny,
}


def make_model(kind: str = "llama", dtype: torch.dtype = torch.float64) -> PeftModel:
    """A model whose adapter changes its layers already; the same weights every time."""
    base = BASES[kind]
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base(), config).to(dtype)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    assert isinstance(model, PeftModel)
    return model.train()


def shard(model: nn.Module, wrapping: str, **options: Any) -> None:
    """Shard a model in place."""
    for name, module in reversed([*model.named_modules()]):
        if isinstance(module, WRAPPINGS[wrapping]) and "lm_head" not in name:  # it may be tied
            fully_shard(module, **options)
    fully_shard(model, **options)


def sharded_model(kind: str = "llama", wrapping: str = "layers", **options: Any) -> PeftModel:
    model = make_model(kind)
    shard(model, wrapping, **options)
    return model


def engine(model: nn.Module, sigma: float = 0.3, memory: Memory = "auto") -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=sigma, seed=SEED, memory=memory), STEPS)


def tokens(seed: int = 0, sequences: int = 2) -> Tensor:
    return torch.randint(VOCAB, (sequences, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def found(model: nn.Module, draw: int | None = 0, flat: FlatLora | None = None) -> Found:
    with (flat or engine(model)).perturbed(STEP, draw):
        output = model(input_ids=tokens(), labels=tokens())
        output.loss.backward()
    return Found(whole(output.logits), gradients_of(model))


def assert_equal(result: Found, expected: Found, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(result.logits, expected.logits, rtol=tolerance, atol=tolerance)
    assert_equal_tensors(result.gradients, expected.gradients, tolerance)


def assert_equal_tensors(
    result: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11
) -> None:
    assert result.keys() == expected.keys()
    assert len(result) > 0
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            result[name], value, rtol=tolerance, atol=tolerance * scale, msg=name
        )
