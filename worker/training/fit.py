"""Find a plan that fits the device's memory, by computing the largest pass of the run once.

The longest rows go first, under noise and with room for the optimizer's moments, so that a run that
does not fit is found out before its first step and not at its nine hundredth.
"""

import gc
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from flatlora import FlatLora, FlatLoraConfig, Memory
from worker.training.batches import Batch
from worker.training.config import Training, TrainingJob
from worker.training.data.examples import Example, lengths_of
from worker.training.errors import OutOfGpuMemory
from worker.training.model.base import checkpoint_activations
from worker.training.model.head import summed_loss
from worker.training.model.lora import forget_inputs
from worker.training.packing import Sequences, length
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
    plan = lighter(run.plan, freedom_of(run.job, run.model))
    if plan is None:
        raise out_of_memory(run)
    run.optimizer.zero_grad(set_to_none=True)
    forget_inputs(run.model)
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    reporter.event("job.replanned", f"Memory did not suffice; now {plan.in_words()}.")
    return follow(run, plan)


def freedom_of(job: TrainingJob, model: torch.nn.Module | None = None) -> Freedom:
    """What a job has left to us, and its model can do."""
    settings = job.training
    can_checkpoint = bool(getattr(model, "supports_gradient_checkpointing", True))
    return Freedom(
        micro_batch_size=settings.micro_batch_size is None,
        activation_checkpointing=settings.activation_checkpointing is None and can_checkpoint,
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
            sequences = largest_pass(run.train, run.plan, run.job.training)
            batch = Batch.of(sequences, run.device, end_to_end=run.plan.varlen)
            summed_loss(run.base, batch).backward()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(run.device)
    finally:
        del moments
        run.optimizer.zero_grad(set_to_none=True)


def largest_pass(rows: Sequence[Example], plan: Plan, training: Training) -> Sequences:
    """A pass as large as any of the run can be, of its longest rows.

    No pass has more tokens than its sequences hold, nor more than the step that it is a part of.

    Args:
        rows: To learn from.
        plan: What a pass takes.
        training: Says how large a step is.
    """
    lengths = lengths_of(rows)
    longest = np.argsort(-lengths, kind="stable")
    if training.batch_tokens is None:
        longest = longest[: training.batch_size]
        left = int(lengths[longest].sum())
    else:
        left = max(training.batch_tokens, int(lengths[longest[0]]))
    if not plan.packing:
        return [[rows[row]] for row in longest[: plan.sequences] if lengths[row] <= left]
    sequences: Sequences = []
    for row in map(rows.__getitem__, itertools.cycle(longest)):  # cut ones leave room for more
        if not sequences or length(sequences[-1]) == plan.capacity:
            if len(sequences) == plan.sequences or not left:
                return sequences
            sequences.append([])
        size = min(len(row.ids), plan.capacity - length(sequences[-1]), left)
        if not size:
            return sequences
        sequences[-1].append(row.cut(size))
        left -= size
    return sequences


def out_of_memory(run: Run) -> OutOfGpuMemory:
    """What the job's author is told."""
    where = "the memory"
    if run.device.type == "cuda":
        total = torch.cuda.get_device_properties(run.device).total_memory / 2**30
        where = f"the GPU's {total:.0f} GiB"
    ways = ["lower data.max_length or rank"]
    if run.job.training.quantization is None:
        ways.append("set training.quantization to 4bit")
    if freedom_of(run.job) != Freedom(True, True, True):
        ways.append(
            "leave training.micro_batch_size, activation_checkpointing and perturbation_memory to "
            "the service"
        )
    hint = ", or ".join(ways)
    return OutOfGpuMemory(
        f"A pass of {run.plan.in_words()} does not fit {where}.", f"{hint[0].upper()}{hint[1:]}."
    )
