"""A rung of the ladder that TRL's trainer computes."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import ladder
from benchmarks.ladder import Base, Measured, Rung
from benchmarks.sequences import Data
from benchmarks.timing import Ticks
from benchmarks.trl_trainer import make_trainer


class Watch(TrainerCallback):
    """Ticks after each step, without waiting for the device, and keeps the first gradients."""

    def __init__(self, device: torch.device, warm: int) -> None:
        self.ticks, self.gradient = Ticks(device), torch.empty(0)
        self._warm, self._step = warm, 0

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        if self._step == 0:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.gradient = ladder.gradient_of(trained)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._step += 1
        if self._step >= self._warm:
            self.ticks.tick()


def run(base: Base, rung: Rung, data: Data, warm: int, folder: Path) -> Measured:
    """All steps of the data by ``SFTTrainer``, of which the first ``warm`` are not timed."""
    is_gpu = base.device.type == "cuda"
    watch = Watch(base.device, warm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of the Liger switch
        trainer = make_trainer(
            ladder.adapted(base.fresh(), base.device),
            [sequence for step in data.steps for sequence in step],
            folder,
            watch,
            checkpointing=rung.checkpointing,
            per_device_train_batch_size=rung.rows,
            gradient_accumulation_steps=len(data.steps[0]) // rung.rows,
            max_steps=len(data.steps),
            max_length=data.length,
            learning_rate=0.0,
            max_grad_norm=ladder.NEVER,
            logging_steps=len(data.steps),
            bf16=is_gpu,
            use_cpu=not is_gpu,
            use_liger_kernel=rung.fused_kernels and is_gpu,
        )
    ladder.reset_peak(base.device)
    trainer.train()
    shares = torch.stack(trainer.shares).view(len(data.steps), -1)
    return Measured(
        watch.ticks.seconds(),
        shares.double().sum(dim=1).tolist(),
        watch.gradient,
        ladder.peak(base.device),
        ["fused kernels"] if rung.fused_kernels and not is_gpu else [],
    )
