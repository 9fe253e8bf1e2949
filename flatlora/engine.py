"""Flat-LoRA for a training loop."""

from contextlib import AbstractContextManager

import torch.distributed
from torch import nn

from flatlora.config import FlatLoraConfig
from flatlora.memory import MemoryMode
from flatlora.perturbation import Perturbation
from flatlora.schedule import sigma_at
from flatlora.targets import Target, find_targets


class FlatLora:
    """Trains a LoRA adapter in a flat region of the full weight space (arXiv 2409.14396).

    Every frozen weight ``W`` that the adapter targets is replaced in the forward and backward
    passes of a step by ``W + noise``, where row ``i`` of the noise has the standard deviation
    ``sigma_t / sqrt(n) * ||(W + s B A)_i||_2``. The weight itself is never written to, and the
    finished adapter is plain LoRA.

    The noise is a pure function of (seed, step, draw, layer name, element): it needs no state in
    a checkpoint, and a resumed run draws what an unbroken one would have. No global random
    generator is read or written.

    Example::

        flat = FlatLora(peft_model, FlatLoraConfig(sigma=0.05, seed=42), total_steps=1000)
        for step, micro_batches in enumerate(loader):
            with flat.perturbed(step):
                for batch in micro_batches:
                    model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: A PEFT model with one active LoRA adapter, or a module that contains one.
        config: Strength, seed and memory mode.
        total_steps: Number of optimizer steps of the whole run, those before a resume included.

    Attributes:
        config: As given.
        total_steps: As given.

    Raises:
        NoTargets: If the model has no LoRA layer.
        UnsupportedLayer: If any LoRA layer cannot be perturbed; names all of them.
        ValueError: If ``total_steps`` is not positive, or ``memory="resident"`` is asked for and
            weights are sharded.
    """

    def __init__(self, model: nn.Module, config: FlatLoraConfig, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
        self.config = config
        self.total_steps = total_steps
        self._perturbation = Perturbation(
            find_targets(model), seed=config.seed, memory=config.memory
        )

    @property
    def targets(self) -> tuple[Target, ...]:
        """The layers that are perturbed, ordered by name."""
        return self._perturbation.targets

    @property
    def memory(self) -> MemoryMode:
        """How noisy weights are kept at present; what ``"auto"`` chose."""
        return self._perturbation.memory.mode

    @property
    def memory_reason(self) -> str:
        """Why noisy weights are kept that way, in words."""
        return self._perturbation.memory.reason

    def stream(self, reason: str) -> None:
        """Give noisy copies up and stream from the next step on, as after memory has run out.

        Inside a block that has raised ``torch.OutOfMemoryError`` the engine does this itself, if
        the mode was left to it.

        Args:
            reason: Why, for `memory_reason`.

        Raises:
            AlreadyPerturbed: If called inside a block.
        """
        self._perturbation.require_inactive()
        self._perturbation.stream(reason)

    def pause(self) -> None:
        """Compute without noise until `resume` or the block's end; outside a block, do nothing."""
        self._perturbation.pause()

    def resume(self) -> None:
        """Go on with the block's noise after `pause`; does nothing where there was none."""
        self._perturbation.resume()

    def perturbed(self, step: int, draw: int | None = None) -> AbstractContextManager[None]:
        """Perturb the model inside a ``with`` block.

        The block holds the forward and backward passes of one optimizer step, of all its
        micro-batches. The backward passes belong inside: activation checkpointing runs the forward
        again there, and must meet the same weights. Evaluation, saving and the optimizer's step
        belong outside.

        Where FSDP2 has sharded weights, all ranks enter the block together: entering exchanges
        the strength of the rows that each of them has.

        Args:
            step: Index of the optimizer step, counted from 0 over the whole run.
            draw: Which of several independent draws. By default the rank in the default process
                group of ``torch.distributed``, so that data-parallel ranks average over their
                draws, and 0 without one. Enter the block once per micro-batch with a number of
                your own to have each drawn anew.

        Returns:
            A context manager, to be entered once.

        Raises:
            AlreadyPerturbed: On entering, if the model is perturbed already.
            FlatLoraError: On entering, while a CUDA graph is being captured.
            UnsupportedLayer: On entering, if adapters were merged, disabled or switched, or weights
                sharded, since the engine was built.
            TypeError: If the step is not an integer.
            ValueError: If the step lies outside ``0 <= step < total_steps``, or (on entering) the
                draw outside ``0 <= draw < 2**32``.
        """
        if not isinstance(step, int):
            raise TypeError(f"step must be an integer, got {step!r}")
        sigma = sigma_at(step, self.total_steps, self.config.sigma)
        return self._perturbation.applied(sigma, step=step, draw=_rank() if draw is None else draw)


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0
