"""Find a plan that fits the device's memory, by computing the largest pass of the run once.

The longest rows go first, under noise and with room for the optimizer's moments, so that a run that
does not fit is found out before its first step and not at its nine hundredth.
"""

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from flatlora import FlatLora, FlatLoraConfig, Memory
from worker.training.batches import Batch
from worker.training.config import TrainingJob
from worker.training.data.rendering import Example
from worker.training.errors import OutOfGpuMemory
from worker.training.model.base import checkpoint_activations
from worker.training.model.head import summed_loss
from worker.training.packing import Sequences, length, micro_batches
from worker.training.plan import Freedom, Plan, lighter
from worker.training.reporter import Reporter
from worker.training.state import Run

log = logging.getLogger(__name__)


def follow(run: Run, plan: Plan) -> Run:
    """The same run, computed by another plan; between two steps."""
    checkpoint_activations(run.model.get_base_model(), on=plan.activation_checkpointing)
    flat = perturbation(run.model, run.job, run.total_steps, plan.perturbation_memory)
    return replace(run, plan=plan, flat=flat)


def perturbation(
    model: torch.nn.Module, job: TrainingJob, total_steps: int, memory: Memory
) -> FlatLora:
    """The engine of a run.

    Raises:
        UnsupportedLayer: If a layer cannot be perturbed.
    """
    return FlatLora(model, FlatLoraConfig(job.sigma, job.seed, memory), total_steps)


def fit(run: Run, reporter: Reporter) -> Run:
    """The run with the first plan whose largest pass fits; on a CPU, the run as it is.

    Raises:
        OutOfGpuMemory: If no plan fits that the job allows.
    """
    if run.device.type != "cuda":
        return run
    while True:
        why = ""
        try:
            torch.cuda.reset_peak_memory_stats(run.device)
            rehearse(run)
        except torch.OutOfMemoryError as error:
            why = str(error)
        if run.ranks.agree(ok=not why):
            break
        run = give_way(run, reporter, why or "another rank's memory did not suffice")
    peak = torch.cuda.max_memory_allocated(run.device)
    reporter.event(
        "job.planned",
        f"Each step: {run.plan.in_words()}; {peak / 2**30:.1f} GiB at most.",
        plan=run.plan.to_json(),
        peak_bytes=peak,
    )
    return run


def give_way(run: Run, reporter: Reporter, why: str) -> Run:
    """The run with a plan that needs less memory.

    Raises:
        OutOfGpuMemory: If the job allows none.
    """
    log.warning("does not fit: %s (%s)", run.plan, why)
    plan = lighter(run.plan, freedom_of(run.job))
    if plan is None:
        raise out_of_memory(run)
    run.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    reporter.event("job.replanned", f"Memory did not suffice; now {plan.in_words()}.")
    return follow(run, plan)


def freedom_of(job: TrainingJob) -> Freedom:
    """What a job has left to us."""
    settings = job.training
    return Freedom(
        micro_batch_size=settings.micro_batch_size is None,
        activation_checkpointing=settings.activation_checkpointing is None,
        perturbation_memory=settings.perturbation_memory == "auto",
    )


def rehearse(run: Run) -> None:
    """The largest forward and backward pass of the run; changes nothing.

    Raises:
        torch.OutOfMemoryError: If it does not fit.
    """
    weights = sum(weight.numel() for weight in run.adapter.values())
    moments = torch.empty(2 * weights, device=run.device)  # that AdamW is going to keep
    run.model.train()
    try:
        with run.flat.perturbed(run.total_steps - 1):
            sequences = largest_pass(run.train, run.plan)
            batch = Batch.of(sequences, run.device, end_to_end=run.plan.varlen)
            summed_loss(run.base, batch).backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(run.device)
    finally:
        del moments
        run.optimizer.zero_grad(set_to_none=True)


def largest_pass(rows: Sequence[Example], plan: Plan) -> Sequences:
    """The most tokens that any pass of the run can have: its longest rows, as many as go in."""
    longest = sorted(rows, key=lambda row: -len(row.ids))
    wanted = plan.capacity * plan.sequences
    chosen: list[Example] = []
    tokens = 0
    for row in longest:
        chosen.append(row)
        tokens += len(row.ids)
        if tokens >= 2 * wanted and len(chosen) >= plan.sequences:
            break
    return max(micro_batches(chosen, plan), key=lambda passed: sum(map(length, passed)))


def out_of_memory(run: Run) -> OutOfGpuMemory:
    """What the job's author is told."""
    total = torch.cuda.get_device_properties(run.device).total_memory / 2**30
    return OutOfGpuMemory(
        f"A pass of {run.plan.in_words()} does not fit the GPU's {total:.0f} GiB.",
        "Lower data.max_length or rank, set training.quantization to 4bit, or leave "
        "training.micro_batch_size, activation_checkpointing and perturbation_memory to the "
        "service.",
    )
