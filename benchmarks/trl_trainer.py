"""TRL's ``SFTTrainer`` on rows that are tokenised already: the reference for numbers and for speed.

It meets the same tokens as our loop, and if asked in the same order.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets  # type: ignore[import-untyped]  # it has no types
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # imported lazily by TRL

from benchmarks.sequences import IGNORED
from worker.training.data.examples import Example


class Watched(SFTTrainer):
    """Takes rows in their order if asked to.

    Attributes:
        in_order: Whether it does; else it shuffles them.
        shares: Loss of every micro-batch, its share of its step's.
    """

    def __init__(self, *args: Any, in_order: bool, **kwargs: Any) -> None:
        self.in_order = in_order
        self.shares: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows: Any = train_dataset or self.train_dataset
        return SequentialSampler(rows) if self.in_order else super()._get_train_sampler(rows)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.shares.append(loss.detach())
        return loss

    def logged(self, name: str) -> list[float]:
        """A number that was logged at every step."""
        return [float(log[name]) for log in self.state.log_history if "grad_norm" in log]


def make_trainer(
    model: nn.Module,
    sequences: Sequence[Sequence[Example]],
    folder: Path,
    *callbacks: TrainerCallback,
    tokenizer: PreTrainedTokenizerBase | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Callable[[int], float] | None = None,
    in_order: bool = True,
    checkpointing: bool = True,
    **settings: Any,
) -> Watched:
    """A trainer that saves nothing and says nothing.

    Args:
        model: With its adapter.
        sequences: Rows, each a sequence of its own, or packed; then TRL keeps them apart.
        folder: Stays empty, or nearly.
        callbacks: Hear of steps.
        tokenizer: Gives the id of the padding; by default 0.
        optimizer: In place of TRL's own.
        schedule: Factor of the learning rate by step, from 0; only with ``optimizer``.
        in_order: Whether rows are taken in their order, and not shuffled.
        checkpointing: Of activations; TRL's default is that they are not kept.
        settings: Of ``SFTConfig``; what is not named has TRL's default.
    """
    datasets.disable_progress_bars()
    quiet: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "packing": any(len(sequence) > 1 for sequence in sequences),
        "dataset_kwargs": {"skip_prepare_dataset": True},
        _checkpointing(): checkpointing,
    }
    trainer = Watched(
        model,
        SFTConfig(**quiet | settings),
        train_dataset=_dataset(sequences),
        processing_class=tokenizer or _blank_tokenizer(),
        callbacks=list(callbacks),
        in_order=in_order,
        optimizers=(optimizer, schedule and optimizer and LambdaLR(optimizer, schedule)),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _checkpointing() -> str:
    """What transformers calls it: it was renamed in 5.24."""
    new = "activation_checkpointing"
    return new if new in SFTConfig.__dataclass_fields__ else "gradient_checkpointing"


def _dataset(sequences: Sequence[Sequence[Example]]) -> Any:
    """As TRL's own packing leaves it: ids, labels that are ``-100`` outside the loss, lengths."""
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[int(i) for row in sequence for i in row.ids] for sequence in sequences],
            "labels": [
                [
                    int(token) if learnt else IGNORED
                    for row in sequence
                    for token, learnt in zip(row.ids, row.in_loss, strict=True)
                ]
                for sequence in sequences
            ],
            "seq_lengths": [[len(row.ids) for row in sequence] for sequence in sequences],
        }
    )


def _blank_tokenizer() -> PreTrainedTokenizerBase:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106 - not a password
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<pad>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
    )
    return tokenizer
