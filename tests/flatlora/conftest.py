"""Tiny models, made on the spot: no download, no trained weight."""

# First, as PEFT imports Triton by way of bitsandbytes.
from tests.flatlora.interpreter import DEVICE as DEVICE  # isort: skip

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
import torch._dynamo
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests.flatlora.models import VOCAB, gpt2, llama, wide_llama

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]


_BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "wide": (wide_llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def base_model() -> Callable[[str], nn.Module]:
    """A tiny base model by kind, the same weights every time; leaves the global generator alone."""

    def make(kind: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _BASES[kind][0]()

    return make


@pytest.fixture
def peft_model(base_model: Callable[[str], nn.Module]) -> MakeModel:
    """A tiny PEFT model with an adapter that already changes its layers (B is not zero)."""

    def make(
        kind: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        checkpointing: str | None = None,
        **lora: Any,
    ) -> PeftModel:
        base = base_model(kind)
        config = LoraConfig(**({"r": 3, "lora_alpha": 5, **_BASES[kind][1]} | lora))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT 0.21 reads an attribute that transformers 5.24 has renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            torch.manual_seed(1)
            model = get_peft_model(base.to(dtype), config)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.02)
        assert isinstance(model, PeftModel)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        return model.train()

    return make


@pytest.fixture
def make_batch() -> MakeBatch:
    """A batch of random tokens; the first third of each sequence is not a target."""

    def make(seed: int = 0, *, sequences: int = 3, length: int = 12) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB, (sequences, length), generator=generator)
        labels = tokens.clone()
        labels[:, : length // 3] = -100
        return {"input_ids": tokens, "labels": labels}

    return make


@pytest.fixture
def as_users_compile() -> Iterator[None]:
    """Nothing compiled before, and no run-time checks of shapes, which cannot be compiled."""
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
