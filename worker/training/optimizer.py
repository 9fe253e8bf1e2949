"""AdamW over the adapter, and its learning rate at each step."""

import math

import torch
from torch import nn

from worker.training.config import Training


def make_optimizer(model: nn.Module, settings: Training, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the weights that are trained, ``B`` at a rate of its own where asked for (LoRA+).

    Args:
        model: With an adapter.
        settings: Gives rates and weight decay.
        device: Where the adapter is; one fused kernel on a GPU.
    """
    parts: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[".lora_B." in name].append(parameter)
    rate, ratio = settings.learning_rate, settings.loraplus_lr_ratio
    groups = [
        {"params": parts[is_b], "lr": rate * scale, "scale": scale}
        for is_b, scale in ((False, 1.0), (True, ratio))
        if parts[is_b]
    ]
    return torch.optim.AdamW(
        groups, lr=rate, weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For the next step; groups keep their ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def learning_rate_at(step: int, total: int, settings: Training) -> float:
    """Learning rate of optimizer step ``step``, counted from 0: a linear rise, then the schedule.

    The first step has a rate above 0, and the last one too, so that no step is without effect.
    """
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    match settings.schedule:
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return settings.learning_rate * (1 - done)
        case "constant":
            return settings.learning_rate
