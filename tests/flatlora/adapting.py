"""Steps of models with several adapters, and the noise that their merged weights ask for."""

import math
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from flatlora import FlatLora, FlatLoraConfig, Target, sigma_at
from flatlora.config import Memory
from flatlora.ops import Stream, noise_key
from flatlora.ops.reference import standard_normals

Trained = dict[str, Tensor]
STEP, STEPS, SIGMA, SEED = 3, 6, 0.2, 5


def engine(model: nn.Module, memory: Memory = "resident") -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=SIGMA, seed=SEED, memory=memory), STEPS)


def factors(target: Target) -> tuple[Tensor, Tensor]:
    """A and B as PEFT stores them."""
    layer: Any = target.layer
    return layer.lora_A[target.adapter].weight, layer.lora_B[target.adapter].weight


def step_of(
    model: nn.Module, flat: FlatLora, batch: dict[str, Tensor], step: int = STEP
) -> tuple[Tensor, Trained]:
    """Loss and gradients of one perturbed step."""
    model.zero_grad()
    with flat.perturbed(step):
        loss: Tensor = model(**batch).loss
        torch.autograd.backward(loss)
    return loss.detach(), {
        f"{target.name}.{name}": factor.grad
        for target in flat.targets
        for name, factor in zip("AB", factors(target), strict=True)
        if factor.grad is not None
    }


def assert_same(one: tuple[Tensor, Trained], other: tuple[Tensor, Trained]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


def linear_noise(flat: FlatLora) -> dict[str, Tensor]:
    """The noise of every target, all of them ``nn.Linear``, read off by the unit vectors."""

    def weights() -> dict[str, Tensor]:
        with torch.no_grad():
            return {t.name: t.base(torch.eye(t.weight.shape[1])).T for t in flat.targets}

    clean = weights()
    with flat.perturbed(STEP):
        noisy = weights()
    return {name: noisy[name] - clean[name] for name in clean}


def assert_noise_of_the_merged_weights(flat: FlatLora) -> None:
    """The noise is what the merged weight ``W + s B A``, built densely, asks for."""
    for name, noise in linear_noise(flat).items():
        target = next(target for target in flat.targets if target.name == name)
        a, b = factors(target)
        layer: Any = target.layer
        merged = (target.weight + layer.scaling[target.adapter] * b @ a).detach().double()
        std = sigma_at(STEP, STEPS, SIGMA) / math.sqrt(merged.shape[1]) * merged.norm(dim=1)
        stream = Stream(noise_key(SEED, name), STEP, 0)
        z = standard_normals(stream, 0, noise.numel(), noise.device).view_as(noise)
        scale = float(std.max())
        torch.testing.assert_close(
            noise.double(), std[:, None] * z, rtol=1e-3, atol=1e-4 * scale, msg=name
        )


def add(model: Any, name: str, *, std: float = 0.5, **lora: Any) -> None:
    """Another adapter, far from the first; it is not active yet."""
    config = model.peft_config["default"]
    options: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 7,
        "target_modules": config.target_modules,
        "target_parameters": config.target_parameters,
        "fan_in_fan_out": config.fan_in_fan_out,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model.add_adapter(name, LoraConfig(**(options | lora)))
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:
                nn.init.normal_(parameter, std=std)
