"""The training loop, whole: one optimizer step of Flat-LoRA is what ``train`` shows.

Everything that a step depends on is a function of the step's number and of ``State``: the rows, the
learning rate, the strength and the bits of the noise. That is why a run that was killed goes on
from a checkpoint as if nothing had happened.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flatlora import sigma_at
from worker.training.batches import Batch, evaluate, summed_loss
from worker.training.checkpoints import Checkpoints
from worker.training.config import Training
from worker.training.data.rendering import Example
from worker.training.errors import LossDiverged, Stopped
from worker.training.order import RowOrder, micro_batches
from worker.training.reporter import Control, Reporter
from worker.training.state import Run, State

LOSSES_KEPT = 50  # points of the curve that goes into the model card


def train(
    run: Run, state: State, checkpoints: Checkpoints, reporter: Reporter, control: Control
) -> None:
    """Train from where ``state`` stands to the last step.

    Raises:
        Stopped: At a step boundary, if ``control`` wishes so.
        LossDiverged: After ``max_bad_losses`` steps in a row without a finite loss, or if the loss
            on the held-out rows is not finite.
    """
    settings, order = run.job.training, RowOrder(len(run.train), run.job.training, run.job.seed)
    evaluate_every = run.job.evaluation.every_steps or max(20, math.ceil(run.total_steps / 4))
    checkpoint_every = settings.checkpoint_steps or max(10, math.ceil(run.total_steps / 10))
    if not state.held_out:
        _evaluate(run, state, reporter)
    pace = Pace()
    run.model.train()
    while state.step < run.total_steps:
        if wish := control.wish():
            if wish == "drain":
                checkpoints.save(run, state)
            raise Stopped(wish)

        started = time.monotonic()
        rows = [run.train[row] for row in order.rows_of(state.step)]
        learning_rate = learning_rate_at(state.step, run.total_steps, settings)
        loss, tokens = _forward_backward(run, state.step, rows)
        grad_norm = nn.utils.clip_grad_norm_(run.parameters, settings.max_grad_norm).item()
        is_good = math.isfinite(loss) and math.isfinite(grad_norm)
        state.bad_losses = 0 if is_good else state.bad_losses + 1
        if is_good:
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

        sigma = sigma_at(state.step, run.total_steps, run.job.sigma)
        state.step += 1
        state.tokens += tokens
        is_kept = state.step % math.ceil(run.total_steps / LOSSES_KEPT) == 0
        if is_kept and math.isfinite(loss):
            state.losses.append([state.step, loss])
        reporter.step(
            state.step,
            run.total_steps,
            {
                "loss": _finite(loss),
                "learning_rate": learning_rate,
                "sigma": sigma,
                "grad_norm": _finite(grad_norm),
                "tokens": tokens,
                **pace.after(time.monotonic() - started, run.total_steps - state.step, tokens),
                **_memory(run.device),
            },
        )
        _check_losses(run, state)
        is_last = state.step == run.total_steps
        if is_last or state.step % evaluate_every == 0:
            _evaluate(run, state, reporter)
        if is_last or state.step % checkpoint_every == 0:
            checkpoints.save(run, state)


def _check_losses(run: Run, state: State) -> None:
    if state.bad_losses >= run.job.training.max_bad_losses:
        raise LossDiverged(
            f"The loss was not finite in {state.bad_losses} steps in a row, up to step "
            f"{state.step} of {run.total_steps}.",
            "Lower training.learning_rate or sigma, and look at the rows.",
        )


def _forward_backward(run: Run, step: int, rows: Sequence[Example]) -> tuple[float, int]:
    """Gradients of the mean loss over all target tokens of the step; the loss, and real tokens.

    The noise is on for exactly this: every forward and backward pass of the step.
    """
    targets = sum(example.targets for example in rows)
    loss, tokens = 0.0, 0
    with run.flat.perturbed(step):
        for group in micro_batches(rows, run.job.training.micro_batch_size):
            batch = Batch.of(group, run.device)
            share = summed_loss(run.model, batch) / targets
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.item()
            tokens += batch.tokens
    return loss, tokens


def _evaluate(run: Run, state: State, reporter: Reporter) -> None:
    reporter.phase("evaluating")
    found = evaluate(run.model, run.held_out, run.job.training.micro_batch_size, run.device)
    if not math.isfinite(found["loss"]):
        raise LossDiverged(
            f"The loss on the held-out rows is not finite after step {state.step}.",
            "Lower training.learning_rate or sigma. After step 0 it is the base model's own loss: "
            "try training.precision fp32.",
        )
    state.held_out.append({"step": state.step, **found})
    reporter.held_out(state.step, found)
    reporter.phase("training")


def learning_rate_at(step: int, total: int, settings: Training) -> float:
    """Learning rate of optimizer step ``step``, counted from 0: a linear rise, then the schedule.

    The first step has a rate above 0, and the last one too, so that no step is without effect.
    """
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    match settings.schedule:
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return settings.learning_rate * (1 - done)
        case "constant":
            return settings.learning_rate


class Pace:
    """Tokens per second and the time that is left, from this process's own steps alone."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0

    def after(self, seconds: float, steps_left: int, tokens: int) -> dict[str, Any]:
        """The two numbers, now that a step of ``tokens`` has taken ``seconds``."""
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        return {
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "eta_seconds": round(self._seconds / self._steps * steps_left, 1),
        }


def _finite(value: float) -> float | None:
    """NaN and infinity are not JSON."""
    return value if math.isfinite(value) else None


def _memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {"gpu_memory_bytes": torch.cuda.max_memory_allocated(device)}
