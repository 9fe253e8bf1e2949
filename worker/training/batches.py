"""Examples as padded tensors, and the loss on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own abbreviation
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from worker.training.data.rendering import Example

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows padded at their end to the longest. Padding is masked, so its id does not matter."""

    input_ids: Int64[Tensor, "rows length"]
    attention_mask: Bool[Tensor, "rows length"]
    labels: Int64[Tensor, "rows length"]

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device) -> "Batch":
        """Pad examples to one length. Labels are ids in the loss, ``IGNORED`` elsewhere."""
        shape = len(examples), max(len(example.ids) for example in examples)
        ids = torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, example in enumerate(examples):
            length = len(example.ids)
            values = torch.from_numpy(example.ids).long()
            ids[row, :length] = values
            mask[row, :length] = True
            labels[row, :length] = values.where(torch.from_numpy(example.in_loss), IGNORED)
        return cls(ids.to(device), mask.to(device), labels.to(device))

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return int(self.attention_mask.sum())


def target_logits(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "targets vocab"], Tensor]:
    """Logits (float32) at the places that predict a token in the loss, and those tokens' ids."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    targets = batch.labels[:, 1:]
    is_target = targets != IGNORED
    return logits[:, :-1][is_target].float(), targets[is_target]


def summed_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy summed over the batch's target tokens, in float32."""
    logits, targets = target_logits(model, batch)
    return F.cross_entropy(logits, targets, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[Example], size: int, device: torch.device
) -> dict[str, float]:
    """Mean loss and accuracy over the target tokens, in memory that does not grow with the rows.

    Args:
        model: Put into evaluation mode for this, and back into its mode afterwards.
        examples: Rows that are not trained on.
        size: Rows per forward pass.
        device: Where the model is.
    """
    was_training = model.training
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for start in range(0, len(examples), size):
        batch = Batch.of(examples[start : start + size], device)
        logits, targets = target_logits(model, batch)
        loss += F.cross_entropy(logits, targets, reduction="none").double().sum().item()
        correct += int((logits.argmax(dim=-1) == targets).sum())
        count += len(targets)
    model.train(was_training)
    return {"loss": loss / count, "accuracy": correct / count}
