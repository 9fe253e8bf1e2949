"""Cross-entropy on hidden states, so that the logits of a batch are never all there.

Logits are by far the largest tensor of a training step: 4,096 tokens of a vocabulary of 128,256 are
2 GiB in float32. Here they are made a chunk of tokens at a time, and their gradient, which the
chunk's own logits determine, is multiplied into that of the hidden states at once.
"""

import math
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 1 << 28  # of logits in float32
IGNORED = -100


class Scores(NamedTuple):
    """What a model made of some targets.

    Attributes:
        loss: Cross-entropy summed over the targets, in float64.
        correct: How many targets had the highest logit.
    """

    loss: Float[Tensor, ""]
    correct: Int64[Tensor, ""]


def chunk_rows(vocabulary: int) -> int:
    """Tokens whose logits are there at once; a power of two, for the matrix units' sake."""
    return 1 << max(4, (CHUNK_BYTES // (4 * vocabulary)).bit_length() - 1)


class Chunk(NamedTuple):
    """How Liger's kernel divides the targets.

    Attributes:
        budget: Its ``chunk_mem_const``.
        rows: Targets whose logits are there at once.
    """

    budget: int
    rows: int


def liger_chunk(targets: int, vocabulary: int, hidden: int) -> Chunk:
    """As many rows as elsewhere, as far as its rule allows that.

    By itself it makes as many logits at once as there are hidden states. That is few rows where
    the vocabulary is large beside the hidden states, or the targets are few, and for each few rows
    the whole head is read twice.
    """
    most = chunk_rows(vocabulary)
    parts = max(1, math.ceil(targets / most))
    budget = math.ceil(vocabulary / (hidden * parts))
    rows = liger_rows(targets, vocabulary, hidden, budget)
    if rows > most and budget > 1:
        budget -= 1
        rows = liger_rows(targets, vocabulary, hidden, budget)
    return Chunk(budget, rows)


def liger_rows(targets: int, vocabulary: int, hidden: int, budget: int = 1) -> int:
    """Its own rule."""
    part = math.ceil(targets / math.ceil(vocabulary / (budget * hidden)))
    return min(targets, 1 << max(0, part - 1).bit_length())


def linear_cross_entropy(
    hidden: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, " targets"],
) -> Float[Tensor, ""]:
    """Summed cross-entropy of ``hidden weight^T``; differentiable in ``hidden`` alone.

    Args:
        hidden: Last hidden states at the places that predict a target.
        weight: Of the frozen head, without bias.
        targets: Ids.

    Returns:
        The sum over the targets, in float32.
    """
    if hidden.is_cuda and find_spec("liger_kernel"):
        return liger_cross_entropy(hidden, weight, targets)
    loss: Any = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


def liger_cross_entropy(
    hidden: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, " targets"],
    budget: int | None = None,
) -> Float[Tensor, ""]:
    """The same by Liger's kernel for GPUs, with another ``chunk_mem_const`` if one is named."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    budget = budget or liger_chunk(len(targets), *weight.shape).budget
    as_usual = None, False, None, False, False, False, None, None
    settings = None, None, IGNORED, 0.0, 0.0, "sum", *as_usual, budget
    fused: Any = LigerFusedLinearCrossEntropyFunction.apply
    return cast(Tensor, fused(hidden, weight, targets, *settings)[0])


@torch.no_grad()
def score(
    hidden: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int64[Tensor, " targets"],
) -> Scores:
    """The same loss, and how many targets were hit, without gradients."""
    rows = chunk_rows(len(weight))
    parts = [
        score_logits(at_least_float32(part @ weight.t()), wanted)
        for part, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    loss, correct = (torch.stack(found).sum() for found in zip(*parts, strict=True))
    return Scores(loss, correct)


def score_logits(
    logits: Float[Tensor, "targets vocabulary"], targets: Int64[Tensor, " targets"]
) -> Scores:
    """Summed loss and number of hits."""
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return Scores(losses.double().sum(), (logits.argmax(dim=-1) == targets).sum())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = chunk_rows(len(weight))
        gradient = torch.empty_like(hidden)
        losses = []
        chunks = (torch.split(each, rows) for each in (hidden, targets, gradient))
        for part, wanted, grad in zip(*chunks, strict=True):
            logits = part @ weight.t()
            losses.append(_softmax_minus_target_(logits, wanted))
            torch.mm(logits, weight, out=grad)
        ctx.save_for_backward(gradient)
        found = torch.cat(losses)
        return found.double().sum().to(found.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def at_least_float32(logits: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same in float32, where it is narrower."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _softmax_minus_target_(
    logits: Float[Tensor, "targets vocabulary"], targets: Int64[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """Losses in float32; the logits are replaced by their gradient."""
    wide = at_least_float32(logits)
    lse = wide.logsumexp(dim=-1)
    at = targets[:, None]
    losses = lse - wide.gather(1, at)[:, 0]
    gradient = (wide - lse[:, None]).exp_()
    gradient.scatter_add_(1, at, gradient.new_full(at.shape, -1.0))
    logits.copy_(gradient)
    return losses
