"""Runs of the real ``Trainer`` on a tiny model."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from flatlora import FlatLoraCallback

MakeModel = Callable[..., PeftModel]
Example = dict[str, Tensor]

SIGMA, SEED = 0.2, 7
BATCH, ACCUMULATION = 2, 4
MICRO_BATCHES = 10  # an epoch ends with a window of two
WINDOWS = [4, 4, 2]


def examples(count: int = BATCH * MICRO_BATCHES) -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(61, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@functools.cache
def shorten_collections() -> None:
    """A trainer that starts collects garbage, and looks through all that was imported each time."""
    gc.collect()
    gc.freeze()


def make_trainer(
    folder: Path,
    model: nn.Module,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Trainer,
    optimizer: torch.optim.Optimizer | None = None,
    data: Any = None,
    **changes: Any,
) -> Trainer:
    """A trainer on the CPU that saves nothing unless it is told to."""
    shorten_collections()
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return kind(
        model,
        TrainingArguments(**settings | changes),
        train_dataset=data or examples(),
        eval_dataset=examples(4),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def callback(sigma: float = SIGMA) -> FlatLoraCallback:
    return FlatLoraCallback(sigma=sigma, seed=SEED)


def adapter(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def sigmas(trainer: Trainer) -> list[float]:
    return [log["flat_lora_sigma"] for log in trainer.state.log_history if "loss" in log]
