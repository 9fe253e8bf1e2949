"""Cross-entropy in chunks is cross-entropy, and chunks are as large as we say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from worker.training.model import loss
from worker.training.model.loss import (
    chunk_rows,
    liger_chunk,
    liger_cross_entropy,
    liger_rows,
    linear_cross_entropy,
)

TARGETS, VOCABULARY, HIDDEN = 150, 320, 16
Computed = Callable[[Tensor, Tensor, Tensor], Tensor]


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers how many rows of logits were made at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and made.shape[1] == VOCABULARY:
            self.rows.append(len(made))
        return made


@pytest.fixture(params=["ours", "Liger's"])
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Computed:
    """Ours, and Liger's as its kernel is interpreted; both with few logits at a time."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 64 * 4 * VOCABULARY)
    if request.param == "ours":
        return linear_cross_entropy
    return liger_cross_entropy


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TARGETS, HIDDEN, requires_grad=True)
    return hidden, torch.randn(VOCABULARY, HIDDEN), torch.randint(VOCABULARY, (TARGETS,))


def test_loss_and_gradient_are_those_of_all_logits_at_once(
    computed: Computed, drawn: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, targets = drawn
    (3 * computed(hidden, weight, targets)).backward()  # type: ignore[no-untyped-call]
    found, hidden.grad = hidden.grad, None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (3 * expected).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(computed(hidden, weight, targets), expected)
    torch.testing.assert_close(found, hidden.grad)


def test_logits_are_made_for_as_many_targets_at_once_as_memory_is_told(
    computed: Computed, drawn: tuple[Tensor, Tensor, Tensor]
) -> None:
    with Products() as products:
        computed(*drawn)
    assert chunk_rows(VOCABULARY) == liger_chunk(TARGETS, VOCABULARY, HIDDEN).rows == 64
    assert products.rows == [64, 64, 22]


@pytest.mark.parametrize("targets", [1, 100, 2000, 8192, 65_536])
@pytest.mark.parametrize(
    ("vocabulary", "hidden"),
    [(128_256, 4096), (151_936, 896), (262_144, 640), (32_000, 4096), (1000, 2048)],
)
def test_ligers_chunks_are_large_but_no_larger_than_elsewhere_if_its_rule_allows(
    targets: int, vocabulary: int, hidden: int
) -> None:
    most, chunk = chunk_rows(vocabulary), liger_chunk(targets, vocabulary, hidden)
    by_itself = liger_rows(targets, vocabulary, hidden)
    assert chunk.rows <= max(most, by_itself)
    assert chunk.rows >= min(targets, max(by_itself, most // 2))
    assert liger_rows(targets, vocabulary, hidden, chunk.budget) == chunk.rows
