"""What a run is going to need, for its preflight report: memory and time, before any is spent."""

from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any

from worker.training.config import TrainingJob
from worker.training.fit import freedom_of
from worker.training.model.memory import Estimate, estimate, gib
from worker.training.model.shape import ModelShape
from worker.training.model.speed import Device, Work, estimate_seconds, passes_of
from worker.training.order import evaluation_every
from worker.training.plan import Freedom, Plan, lighter

USABLE = 0.95
"""Of a device's memory: the rest is lost between blocks of other sizes."""


def estimates(
    job: TrainingJob,
    shape: ModelShape | None,
    plan: Plan,
    report: Mapping[str, Any],
    *,
    device: Device,
    tokens_per_pass: int | None = None,
    shards: int = 1,
) -> tuple[Plan, dict[str, Any]]:
    """The first plan that fits the device, and sections of the preflight report.

    Args:
        job: The job.
        shape: The model with its adapter; None where it could not be described.
        plan: What the run begins with.
        report: What is said of the data.
        device: What computes.
        tokens_per_pass: Tokens of the largest pass. None: as many as the plan allows.
        shards: Ranks that the base's weights are divided among.

    Returns:
        The plan, or the lightest that the job allows; and ``plan``, ``memory``, ``time`` and the
        longer ``warnings``, to be merged into the report. Without a shape: ``plan`` alone.
    """
    if shape is None:
        return plan, {"plan": plan.to_json() | {"in_words": plan.in_words()}}
    tokens = tokens_per_pass or plan.max_length * plan.micro_batch_size
    share = report["tokens"]["in_loss"] / max(1, report["tokens"]["all"])
    targets = ceil(share * tokens)

    def needed(by: Plan) -> Estimate:
        smaller = by.micro_batch_size / plan.micro_batch_size
        return estimate(
            shape,
            by,
            dtype=device.dtype,
            on_gpu=device.is_gpu,
            tokens_per_pass=ceil(tokens * smaller),
            tokens_in_loss_per_pass=ceil(targets * smaller),
            is_perturbed=job.sigma > 0,
            shards=shards,
        )

    limit = device.total_bytes if device.free_bytes is None else device.free_bytes
    allowed = [plan] if not device.is_gpu else list(_allowed(plan, freedom_of(job)))
    fitting = [by for by in allowed if needed(by).total <= USABLE * limit]
    chosen = fitting[0] if fitting else allowed[-1]
    found = needed(chosen)
    return chosen, {
        "plan": chosen.to_json() | {"in_words": chosen.in_words()},
        "memory": found.to_json()
        | {
            "device": device.name,
            "device_total_bytes": device.total_bytes,
            "device_free_bytes": device.free_bytes,
            "fits": bool(fitting),
            "in_words": found.in_words(),
        },
        "time": _time(job, shape, chosen, report, device),
        "warnings": [*report["warnings"], *_warnings(found, chosen, device, limit, bool(fitting))],
    }


def _allowed(plan: Plan, freedom: Freedom) -> Iterator[Plan]:
    """The plan, and all that may take its place, each lighter than the one before."""
    by: Plan | None = plan
    while by is not None:
        yield by
        by = lighter(by, freedom)


def _time(
    job: TrainingJob, shape: ModelShape, plan: Plan, report: Mapping[str, Any], device: Device
) -> dict[str, Any]:
    ranks, steps = job.resources.gpus, report["steps"]
    tokens = report["tokens_per_step"]
    share = report["tokens"]["in_loss"] / max(1, report["tokens"]["all"])
    capacity = plan.max_length * plan.micro_batch_size
    if not plan.packing:  # a pass has so many rows, however short they are
        mean = report["tokens"]["all"] / max(1, report["rows"]["used"])
        capacity = max(1, round(mean * plan.micro_batch_size))
    work = Work(
        steps=steps,
        passes=ranks * passes_of(tokens / ranks, capacity),
        tokens=steps * tokens,
        targets=round(steps * tokens * share),
        row_length=report["length"]["p90"],  # where tokens are: long rows have more of them
        evaluation_tokens=_evaluated(job, report),
    )
    found = estimate_seconds(shape, plan, work, device, is_perturbed=job.sigma > 0, ranks=ranks)
    return {
        "seconds": round(found.seconds, 1),
        "tokens_per_second": round(found.tokens_per_second, 1),
        "is_rough": True,
    }


def _evaluated(job: TrainingJob, report: Mapping[str, Any]) -> int:
    """Tokens of all evaluations: one before the first step, and as many as the loop does."""
    steps: int = report["steps"]
    every = evaluation_every(job, steps)
    held_out: int = (report.get("validation") or report)["rows"]["held_out"]
    mean: float = report["tokens"]["all"] / max(1, report["rows"]["used"])
    return round((1 + ceil(steps / every)) * held_out * mean)


def _warnings(found: Estimate, plan: Plan, device: Device, limit: int, fits: bool) -> Iterator[str]:
    if fits:
        return
    free = "" if device.free_bytes is None else " free"
    yield (
        f"The run is estimated at {gib(found.total)} even with {plan.in_words()}, and "
        f"{device.name} has {gib(limit)}{free}: lower data.max_length or rank, set "
        "training.quantization to 4bit, or leave training.micro_batch_size, "
        "activation_checkpointing and perturbation_memory to the service."
    )
