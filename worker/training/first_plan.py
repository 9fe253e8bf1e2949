"""The plan that a run begins with, if no earlier attempt has left one."""

import math
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from worker.training.config import TrainingJob
from worker.training.data.dataset import Prepared
from worker.training.data.examples import lengths_of
from worker.training.errors import ConfigInvalid
from worker.training.model.attention import ISOLATES_ROWS, can_use_varlen
from worker.training.place import Place
from worker.training.plan import Plan

ROWS_ON_CPU = 8
"""Rows per pass where memory is not what limits them: more compute no faster on a CPU."""

TOKENS_ON_GPU = 65_536
"""Tokens per pass that even a small model needs no more of to keep a large GPU busy."""


def first_plan(
    job: TrainingJob,
    base: PreTrainedModel,
    prepared: Prepared,
    place: Place,
) -> Plan:
    """What the job asks for, and for the rest the fastest that may fit.

    Args:
        job: Its settings win.
        base: The base model.
        prepared: The rows.
        place: Where it is going to compute.

    Raises:
        ConfigInvalid: If the model is not known to keep packed rows apart, and they must be.
    """
    settings, device, ranks = job.training, place.device, job.resources.gpus
    varlen = can_use_varlen(base, device)
    packing = _packing(job, base, varlen=varlen)
    longest = max(int(lengths_of(rows).max()) for rows in (prepared.train, prepared.held_out))
    must_stream = place.divided or settings.perturbation_memory == "streamed"
    plan = Plan(
        max_length=prepared.report["length"]["limit"] if packing else longest,
        micro_batch_size=settings.micro_batch_size or 1,
        packing=packing,
        varlen=varlen,
        activation_checkpointing=bool(settings.activation_checkpointing),
        perturbation_memory="streamed" if must_stream else "resident",
    )
    if place.divided:  # for models so large the least, as ranks cannot try together
        is_kept = settings.activation_checkpointing is False
        return replace(plan, activation_checkpointing=not is_kept)
    if settings.micro_batch_size:
        return plan
    rows_of_step = settings.batch_size if settings.batch_tokens is None else ROWS_ON_CPU
    if device.type != "cuda":
        return replace(plan, micro_batch_size=max(1, min(rows_of_step // ranks, ROWS_ON_CPU)))
    tokens = settings.batch_tokens or prepared.report["tokens_per_step"]
    useful = math.ceil(tokens / ranks / plan.max_length)
    return replace(plan, micro_batch_size=max(1, min(useful, TOKENS_ON_GPU // plan.max_length)))


def _packing(job: TrainingJob, base: PreTrainedModel, *, varlen: bool) -> bool:
    wanted = job.training.packing
    if wanted is None:
        return varlen
    config: Any = base.config.get_text_config()
    if wanted and config.model_type not in ISOLATES_ROWS:
        raise ConfigInvalid(
            f"training.packing is on, and models of the family {config.model_type} are not known "
            "to keep packed rows apart.",
            f"Leave training.packing out. It is known of {', '.join(sorted(ISOLATES_ROWS))}.",
        )
    return wanted
