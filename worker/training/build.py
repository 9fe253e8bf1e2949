"""The model with its adapter and all that a step needs, by a plan that fits the device."""

import logging
from dataclasses import replace
from typing import Any

import torch

from flatlora import Memory, UnsupportedLayer
from worker.training.config import TrainingJob
from worker.training.data.dataset import Prepared
from worker.training.errors import ConfigInvalid
from worker.training.estimates import estimates
from worker.training.first_plan import first_plan
from worker.training.fit import largest_pass, perturbation
from worker.training.model.attention import use_varlen_attention
from worker.training.model.base import (
    attach_adapter,
    check_quantization,
    check_targets,
    checkpoint_activations,
    load_base,
)
from worker.training.model.head import answer_with_loss
from worker.training.model.kernels import use_fused_kernels
from worker.training.model.lora import fast_adapters
from worker.training.model.shape import describe_model, read_config, without_weights
from worker.training.model.sharding import shard
from worker.training.model.speed import find_device
from worker.training.optimizer import make_optimizer
from worker.training.packing import length
from worker.training.place import Place
from worker.training.plan import Plan
from worker.training.state import Run

log = logging.getLogger(__name__)

NOT_DESCRIBED = "Memory and time cannot be told of this model before it is loaded."


def look_ahead(
    job: TrainingJob, prepared: Prepared, place: Place
) -> tuple[Plan | None, dict[str, Any]]:
    """How the run is going to compute, and what it needs: known from the model's config alone.

    Returns:
        A plan, and what the preflight report says of it; a warning where the config is unknown.

    Raises:
        ConfigInvalid: If the model lacks what the job names, or the machine what it asks for.
    """
    check_quantization(job.training.quantization)
    try:
        model = without_weights(read_config(job.base_model), place.dtype)
    except Exception:  # whatever a config may lead to; loading the model says it better
        log.warning("the model cannot be described", exc_info=True)
        return None, {"warnings": [*prepared.report["warnings"], NOT_DESCRIBED]}
    check_targets(model, job)
    shape = describe_model(job.base_model, job.lora, job.training.quantization, model)
    if shape is None:
        return None, {"warnings": [*prepared.report["warnings"], NOT_DESCRIBED]}
    plan = first_plan(job, model, prepared, place)
    return estimates(
        job,
        shape,
        plan,
        prepared.report,
        device=find_device(place.device, place.dtype),
        tokens_per_pass=sum(map(length, largest_pass(prepared.train, plan, job.training))),
        shards=job.resources.gpus if place.divided else 1,
    )


def build(
    job: TrainingJob,
    prepared: Prepared,
    place: Place,
    plan: Plan | None,
    *,
    is_settled: bool = False,
) -> Run:
    """The model with its adapter, and all that a step needs.

    Args:
        job: What to do.
        prepared: Its rows.
        place: Where.
        plan: How steps are computed; None: one is chosen.
        is_settled: Whether an earlier attempt has computed so.

    Raises:
        BaseModelUnavailable: If the model cannot be loaded.
        ConfigInvalid: If the settings do not fit it.
    """
    settings, device = job.training, place.device
    loaded_on = torch.device("cpu") if place.divided else device
    base = load_base(job.base_model, loaded_on, place.dtype, settings.quantization)
    answer_with_loss(base)
    use_fused_kernels(base, device)
    plan = plan or first_plan(job, base, prepared, place)
    if plan.varlen and not use_varlen_attention(base, device):
        plan = replace(plan, varlen=False)
    model = attach_adapter(base, job)
    fast_adapters(model)
    if place.divided:
        shard(model, device, place.ranks)
    checkpoint_activations(base, on=plan.activation_checkpointing)
    total_steps = prepared.report["steps"]
    # of a CPU's memory the engine itself knows what is free
    is_open = not is_settled and device.type == "cpu" and settings.perturbation_memory == "auto"
    memory: Memory = "auto" if is_open else plan.perturbation_memory
    try:
        flat = perturbation(model, job, total_steps, memory)
        if is_open:
            is_resident = place.ranks.first_tells(flat.memory) == "resident"
            plan = replace(plan, perturbation_memory="resident" if is_resident else "streamed")
            flat = perturbation(model, job, total_steps, plan.perturbation_memory)
    except UnsupportedLayer as error:
        raise ConfigInvalid(str(error), "Choose other lora.target_modules.") from error
    return Run(
        job=job,
        model=model.train(),
        flat=flat,
        optimizer=make_optimizer(model, settings, device),
        train=prepared.train,
        held_out=prepared.held_out,
        total_steps=total_steps,
        device=device,
        plan=plan,
        ranks=place.ranks,
    )
