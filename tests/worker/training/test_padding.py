"""What a row computes does not depend on the rows that it is padded with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from worker.training.batches import IGNORED, Batch, evaluate, summed_loss
from worker.training.data.rendering import Example

CPU = torch.device("cpu")
LENGTHS = (3, 17, 40)


@pytest.fixture(scope="module")
def model(base_folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model.train(False)
    return model


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example(random.integers(0, 256, n).astype(np.int32), np.arange(n) >= n // 2)
        for n in LENGTHS
    ]


def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).logits
    return logits


def test_its_logits_are_those_of_the_row_alone(model: PreTrainedModel, rows: list[Example]) -> None:
    together = logits_of(model, Batch.of(rows, CPU))
    for row, found in zip(rows, together, strict=True):
        alone = logits_of(model, Batch.of([row], CPU))[0]
        torch.testing.assert_close(found[: len(row.ids)], alone, rtol=1e-5, atol=1e-6)


def test_its_loss_is_that_of_the_row_alone(model: PreTrainedModel, rows: list[Example]) -> None:
    with torch.no_grad():
        together = summed_loss(model, Batch.of(rows, CPU))
        alone = sum(summed_loss(model, Batch.of([row], CPU)) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    sizes = [evaluate(model, rows, size, CPU) for size in (1, 2, 3)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)
    assert sizes[0] == pytest.approx(sizes[2], rel=1e-6)


def test_what_stands_in_the_padding_is_seen_by_nobody(
    model: PreTrainedModel, rows: list[Example]
) -> None:
    batch = Batch.of(rows, CPU)
    ids = batch.input_ids.where(batch.attention_mask, 99)
    other = Batch(ids, batch.attention_mask, batch.labels)
    assert not torch.equal(ids, batch.input_ids)
    assert (batch.labels[~batch.attention_mask] == IGNORED).all()
    real = batch.attention_mask
    assert torch.equal(logits_of(model, batch)[real], logits_of(model, other)[real])
    assert torch.equal(summed_loss(model, batch), summed_loss(model, other))
