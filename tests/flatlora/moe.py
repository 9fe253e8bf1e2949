"""Tiny mixtures of experts, made on the spot, with adapters on their experts."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.utils.generic import ModelOutput

from flatlora import FlatLora, FlatLoraConfig
from flatlora.config import Memory

VOCAB = 61
STEP, STEPS, SIGMA, SEED, DRAW = 5, 8, 0.3, 11, 2
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(**options: Any) -> nn.Module:
    """Its experts are stored ``out x in``."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
            num_experts_per_tok=2, max_position_embeddings=32, **options,
        )
    )  # fmt: skip


def gpt_oss(**options: Any) -> nn.Module:
    """Its experts are stored ``in x out``."""
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=12, num_local_experts=4,
            num_experts_per_tok=2, sliding_window=8, max_position_embeddings=32,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            pad_token_id=0, eos_token_id=1, **options,
        )
    )  # fmt: skip


BASES: dict[str, Callable[..., nn.Module]] = {"mixtral": mixtral, "gpt_oss": gpt_oss}


def base_model(kind: str, *, experts_implementation: str = "eager") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BASES[kind](experts_implementation=experts_implementation)
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:  # far from zero, so that experts differ
                nn.init.normal_(parameter, std=0.2)
        return model


def adapted(base: nn.Module, *, checkpointing: str | None = None, **lora: Any) -> PeftModel:
    """With an adapter that already changes its targets (B is not zero)."""
    options: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": [],
        "target_parameters": EXPERTS,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(**(options | lora)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    assert isinstance(model, PeftModel)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model.train()


def moe(kind: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    lora = {"target_modules": ["q_proj", "v_proj"]} | options
    return adapted(base_model(kind).to(dtype), **lora).to(dtype)


class One(nn.Module):
    """A single module whose output makes a loss; stays in float64, which no language model does."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.routed = isinstance(experts, MixtralExperts)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x: Tensor) -> ModelOutput:
        if self.routed:
            tokens = torch.arange(len(x))
            index = torch.stack([tokens % 3, (tokens + 1) % 3], dim=1)
            out = self.experts(x, index, torch.full(index.shape, 0.5, dtype=x.dtype))
        else:
            out = self.experts(x)
        return ModelOutput(loss=out.square().mean())  # type: ignore[no-untyped-call]


def one_mixtral() -> One:
    config = MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
    config._experts_implementation = "eager"
    return One(MixtralExperts(config)).double()


def one_llama4() -> One:
    config = Llama4TextConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
    return One(Llama4TextExperts(config)).double()


def one_linear() -> One:
    return One(nn.Linear(8, 6)).double()


# Llama 4's experts are stored in x out, and PEFT takes them to be stored out x in.
ONES: dict[str, tuple[Callable[[], One], list[str], bool]] = {
    "mixtral": (one_mixtral, EXPERTS, False),
    "llama4": (one_llama4, EXPERTS, True),
    "linear": (one_linear, ["experts.weight"], False),
}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(12, 8, generator=generator, dtype=torch.float64)}


def engine(
    model: nn.Module, memory: Memory = "resident", *, sigma: float = SIGMA, seed: int = SEED
) -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=sigma, seed=seed, memory=memory), STEPS)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def traces_left(flat: FlatLora) -> list[str]:
    return [
        target.name
        for target in flat.targets
        if {"forward", "_old_forward"} & {*vars(target.base), *vars(target.layer)}
        or parametrize.is_parametrized(target.base)
        or type(target.base).__name__.startswith("Parametrized")
    ]
