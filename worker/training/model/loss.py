"""Cross-entropy on hidden states, so that the logits of a batch are never all there.

Logits are by far the largest tensor of a training step: 4,096 tokens of a vocabulary of 128,256 are
2 GiB in float32. Here they are made a chunk of tokens at a time, and their gradient, which the
chunk's own logits determine, is multiplied into that of the hidden states at once.
"""

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
    if hidden.is_cuda and (liger := _liger()):
        arguments = (hidden, weight, targets, None, None, IGNORED, 0.0, 0.0, "sum")
        return cast(Tensor, liger.apply(*arguments)[0])
    loss: Any = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


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


def _liger() -> Any:
    """Liger's function for GPUs, or None where it is not installed."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyFunction
