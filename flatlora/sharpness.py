"""How fast the loss rises when the weights around a trained adapter are disturbed."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatlora.config import FlatLoraConfig, Memory
from flatlora.perturbation import Perturbation
from flatlora.targets import find_targets

Batch = Mapping[str, Tensor]

_IGNORED = -100


@dataclass(frozen=True)
class SharpnessPoint:
    """The loss at one strength.

    Attributes:
        sigma: Strength of the noise.
        mean: Mean loss over the draws, nats per target token.
        std: Sample standard deviation of the loss over the draws; divide by the square root of
            their number for the error of the mean.
        losses: Loss of each draw.
    """

    sigma: float
    mean: float
    std: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sharpness:
    """The curve ``E L(W' + sigma * noise)`` over ``sigma``.

    Attributes:
        clean_loss: Loss without noise, nats per target token.
        points: One point per strength, in the order asked for.
    """

    clean_loss: float
    points: tuple[SharpnessPoint, ...]


def sharpness(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    sigmas: Sequence[float],
    draws: int = 4,
    seed: int = 0,
    memory: Memory = "auto",
) -> Sharpness:
    """Measure the loss of a LoRA model under the noise that Flat-LoRA trains with.

    The noise has constant strength and the addresses of step 0, which training never draws with a
    strength above zero. Draw ``k`` is the same for every strength and for every model with
    the same layer names, so curves differ by what is compared and not by luck.

    The model runs in evaluation mode and without gradients; each module's training mode is
    restored. The loss is weighted by target tokens: labels that are not -100, without the first
    of each sequence, which a causal model does not predict.

    Args:
        model: A PEFT model whose output has a ``loss``, the mean over the batch's target tokens.
        batches: Batches with ``labels`` of shape ``(batch, seq)``, read ``1 + sigmas * draws``
            times: a list or a data loader that does not shuffle, not an iterator.
        sigmas: Strengths, not negative.
        draws: Number of independent draws for each strength, at least 2.
        seed: Seed of the noise.
        memory: As in `FlatLoraConfig`.

    Returns:
        The clean loss and one point per strength.

    Raises:
        AlreadyPerturbed: If called inside a perturbation.
        NoTargets: If the model has no LoRA layer.
        UnsupportedLayer: If any LoRA layer cannot be perturbed.
        ValueError: If a value is out of range, ``batches`` can be read only once, or no batch has
            a target token.
    """
    _check_arguments(batches, sigmas, draws)
    config = FlatLoraConfig(seed=seed, memory=memory)
    noise = Perturbation(find_targets(model), seed=config.seed, memory=config.memory)

    def loss(sigma: float, draw: int) -> float:
        with noise.applied(sigma, step=0, draw=draw):
            return _token_mean_loss(model, batches)

    with _evaluation_mode(model), torch.no_grad():
        clean_loss = loss(0.0, 0)
        points = [_point(sigma, [loss(sigma, draw) for draw in range(draws)]) for sigma in sigmas]
    return Sharpness(clean_loss, tuple(points))


def _check_arguments(batches: Iterable[Batch], sigmas: Sequence[float], draws: int) -> None:
    if isinstance(batches, Iterator):
        raise ValueError("batches are read several times: pass a list or loader, not an iterator")
    if not sigmas or any(not math.isfinite(sigma) or sigma < 0 for sigma in sigmas):
        raise ValueError(f"sigmas must be finite and not negative, and at least one; got {sigmas}")
    if draws < 2:
        raise ValueError(f"a spread needs at least 2 draws, got {draws}")


def _point(sigma: float, losses: Sequence[float]) -> SharpnessPoint:
    return SharpnessPoint(sigma, statistics.fmean(losses), statistics.stdev(losses), tuple(losses))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _token_mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for batch in batches:
        count = int((batch["labels"][..., 1:] != _IGNORED).sum())
        if count == 0:  # its mean loss would be 0 / 0
            continue
        output = model(**{name: value.to(device) for name, value in batch.items()})
        total += float(output.loss) * count
        tokens += count
    if tokens == 0:
        raise ValueError("no batch has a target token: every label is -100, or there is no batch")
    return total / tokens
