"""The training loop, whole: one optimizer step of Flat-LoRA is what ``train`` shows.

Everything that a step depends on is a function of the step's number and of ``State``: the rows, the
learning rate, the strength and the bits of the noise, what dropout draws. That is why a run that
was killed goes on from a checkpoint as if nothing had happened.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatlora import sigma_at
from worker.training.batches import Batch
from worker.training.checkpoints import Checkpoints
from worker.training.data.examples import Example, lengths_of
from worker.training.errors import LossDiverged, Stopped
from worker.training.evaluation import best_of, evaluate, is_exhausted
from worker.training.model.head import summed_loss
from worker.training.optimizer import learning_rate_at, set_learning_rate
from worker.training.order import RowOrder, evaluation_every
from worker.training.packing import micro_batches
from worker.training.reporter import Control, Reporter, Wish
from worker.training.state import Run, State, copy_of_adapter

LOSSES_KEPT = 200  # points of the curve that goes into the model card


def train(
    run: Run, state: State, checkpoints: Checkpoints, reporter: Reporter, control: Control
) -> None:
    """Train from where ``state`` stands to the last step, or until it gets no better.

    Raises:
        Stopped: At a step boundary, if ``control`` wishes so.
        LossDiverged: After ``max_bad_losses`` steps in a row without a finite loss, or if the loss
            on the held-out rows is not finite.
        torch.OutOfMemoryError: If a step does not fit; ``state`` is not that of any step then.
    """
    job, settings = run.job, run.job.training
    order = RowOrder(lengths_of(run.train), settings, job.seed)
    evaluate_every = evaluation_every(job, run.total_steps)
    checkpoint_every = settings.checkpoint_steps or max(10, math.ceil(run.total_steps / 10))
    adapter = list(run.adapter.values())
    if not state.held_out:
        _evaluate(run, state, reporter)
    pace = Pace()
    run.model.train()
    while state.step < run.total_steps and not is_exhausted(state.held_out, job.evaluation):
        if wish := _agreed_wish(run, control):
            if wish == "drain":
                checkpoints.save(run, state)
            raise Stopped(wish)

        started = time.monotonic()
        rows = [run.train[row] for row in order.rows_of(state.step)]
        learning_rate = learning_rate_at(state.step, run.total_steps, settings)
        seed_step(job.seed, state.step, run.ranks.rank)
        share = _forward_backward(run, state.step, rows)
        run.ranks.sum_gradients(adapter)
        norm = nn.utils.clip_grad_norm_(adapter, settings.max_grad_norm)
        loss, grad_norm = torch.stack((share, norm.detach())).tolist()  # the host waits here alone
        (loss,) = run.ranks.sum(loss)
        is_good = math.isfinite(loss) and math.isfinite(grad_norm)
        state.bad_losses = 0 if is_good else state.bad_losses + 1
        if is_good:
            set_learning_rate(run.optimizer, learning_rate)
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

        sigma = sigma_at(state.step, run.total_steps, job.sigma)
        tokens = sum(len(row.ids) for row in rows)
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
    if state.step < run.total_steps:
        _tell_early_end(run, state, reporter)


def _forward_backward(run: Run, step: int, rows: Sequence[Example]) -> Tensor:
    """Gradients of the mean loss over all target tokens of the step; this rank's part of the loss.

    The noise is on for exactly this: every forward and backward pass of the step.
    """
    targets = sum(row.targets for row in rows)
    loss = torch.zeros((), device=run.device)
    passes = micro_batches(rows, run.plan, run.ranks.size)
    with run.flat.perturbed(step):
        for sequences, is_counted in run.ranks.share(passes):
            batch = Batch.of(sequences, run.device, end_to_end=run.plan.varlen)
            share = summed_loss(run.base, batch) * (is_counted / targets)
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
    return loss


def seed_step(seed: int, step: int, rank: int) -> None:
    """Begin torch's random numbers of a step, which dropout draws from, anew.

    No checkpoint has to keep a generator's state, and a step that is done again draws the same.
    """
    digest = hashlib.sha256(f"dropout {seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def _agreed_wish(run: Run, control: Control) -> Wish | None:
    """What somebody wants of the first rank: all ranks stop at the same step."""
    wishes: list[Wish | None] = [None, "drain", "cancel"]
    return wishes[run.ranks.first_says(wishes.index(control.wish()))]


def _check_losses(run: Run, state: State) -> None:
    if state.bad_losses >= run.job.training.max_bad_losses:
        raise LossDiverged(
            f"The loss was not finite in {state.bad_losses} steps in a row, up to step "
            f"{state.step} of {run.total_steps}.",
            "Lower training.learning_rate or sigma, and look at the rows.",
        )


def _evaluate(run: Run, state: State, reporter: Reporter) -> None:
    reporter.phase("evaluating")
    found = evaluate(run.base, run.held_out, run.plan, run.device, run.ranks)
    if not math.isfinite(found["loss"]):
        raise LossDiverged(
            f"The loss on the held-out rows is not finite after step {state.step}.",
            "Lower training.learning_rate or sigma. After step 0 it is the base model's own loss: "
            "try training.precision fp32.",
        )
    latest = {"step": state.step, **found}
    state.held_out.append(latest)
    settings = run.job.evaluation
    if settings.keep == "best" and best_of(state.held_out) is latest:
        state.best_adapter = copy_of_adapter(run)
    reporter.held_out(state.step, found)
    reporter.phase("training")


def _tell_early_end(run: Run, state: State, reporter: Reporter) -> None:
    settings, last = run.job.evaluation, state.held_out[-1]
    best = best_of(state.held_out, settings.min_delta)
    assert best  # else patience has nothing to count from
    reporter.event(
        "job.stopped_early",
        f"Stopped early, after step {state.step} of {run.total_steps}: the held-out loss is "
        f"{last['loss']:.4f}, and was {best['loss']:.4f} after step {best['step']:g}.",
        step=state.step,
        total_steps=run.total_steps,
        loss=last["loss"],
        best_step=int(best["step"]),
        best_loss=best["loss"],
        patience=settings.patience,
    )


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
