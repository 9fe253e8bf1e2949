"""The loss on rows that are not trained on, and what follows from it."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from worker.training.batches import Batch
from worker.training.config import Evaluation
from worker.training.data.examples import Example, targets_of
from worker.training.model.base import set_mode
from worker.training.model.head import scores
from worker.training.packing import micro_batches
from worker.training.plan import Plan
from worker.training.ranks import Ranks

Found = Mapping[str, float]


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    plan: Plan,
    device: torch.device,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Mean loss and accuracy over the target tokens, in memory that does not grow with the rows.

    Args:
        model: A base model that answers with the loss. Put into evaluation mode for this, and back
            into its mode afterwards.
        examples: Rows that are not trained on.
        plan: How many of them a forward pass takes.
        device: Where the model is.
        ranks: Each takes its share of the rows.
    """
    ranks = ranks or Ranks(device)
    was_training = model.training
    set_mode(model, training=False)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    passes = micro_batches(examples, plan, ranks.size)
    for sequences, is_counted in ranks.share(passes):
        found = scores(model, Batch.of(sequences, device, end_to_end=plan.varlen))
        loss += found.loss * is_counted
        correct += found.correct * is_counted
    set_mode(model, training=was_training)
    total, hits = ranks.sum(loss.item(), float(correct.item()))
    count = int(targets_of(examples).sum())
    return {"loss": total / count, "accuracy": hits / count}


def best_of(found: Sequence[Found], min_delta: float = 0.0) -> Found | None:
    """The first evaluation with the lowest loss; that of the base model, at step 0, is none.

    Args:
        found: In order.
        min_delta: By how much a loss must be lower than the lowest before it to count.
    """
    best: Found | None = None
    for one in found:
        if one["step"] and (best is None or one["loss"] < best["loss"] - min_delta):
            best = one
    return best


def is_exhausted(found: Sequence[Found], settings: Evaluation) -> bool:
    """Whether ``patience`` evaluations in a row were no better than the best before them."""
    if settings.patience is None:
        return False
    best = best_of(found, settings.min_delta)
    since = sum(1 for one in found if best and one["step"] > best["step"])
    return since >= settings.patience
