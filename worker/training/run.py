"""One job from its fetched inputs to its finished adapter, in this process."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from flatlora import FlatLora, FlatLoraConfig, UnsupportedLayer
from worker.training.checkpoints import Checkpoints
from worker.training.config import TrainingJob
from worker.training.data.dataset import Prepared, fingerprint, prepare
from worker.training.data.rendering import Renderer
from worker.training.errors import ConfigInvalid, OutOfGpuMemory
from worker.training.loop import train
from worker.training.model.base import (
    attach_adapter,
    choose_device,
    choose_dtype,
    hash_folder,
    load_base,
    load_tokenizer,
    max_positions,
)
from worker.training.order import steps_per_epoch
from worker.training.reporter import Control, Reporter
from worker.training.result.adapter import save_adapter
from worker.training.result.verify import write_probe
from worker.training.state import Run, State


def run(job: TrainingJob, folder: Path, reporter: Reporter, control: Control) -> dict[str, Any]:
    """Train a job and leave ``folder/adapter``, going on from ``folder/checkpoints`` if it can.

    Args:
        job: What to do; its files are local.
        folder: The job's own. Nothing outside it is written.
        reporter: Hears how it goes.
        control: Is asked at every step boundary whether to stop.

    Returns:
        What the job reports of itself, plain JSON. The same for a run that was interrupted.

    Raises:
        JobError: Whatever the job's author has to know.
        Stopped: If ``control`` wished so.
    """
    reporter.phase("validating")
    tokenizer = load_tokenizer(job.base_model)
    renderer = Renderer(tokenizer, job.data.loss_on, today=job.clock)
    prepared = prepare(job, renderer, max_positions(job.base_model))
    reporter.preflight(prepared.report)
    if job.dry_run:
        return {"dry_run": True}
    reporter.phase("loading")
    inputs = describe_inputs(job, prepared)
    identity = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    checkpoints = Checkpoints(folder / "checkpoints", identity, reporter)
    with _deterministic(), _explained_memory(job):
        this_run, model = _build(job, prepared)
        state = checkpoints.restore(this_run) or State()
        reporter.phase("training")
        train(this_run, state, checkpoints, reporter, control)
        result = _result(this_run, model, state)
        save_adapter(folder / "adapter", model, tokenizer, job, inputs, result, state)
        model.eval()
        write_probe(folder, model, prepared.held_out)
    return result


def _build(job: TrainingJob, prepared: Prepared) -> tuple[Run, PeftModel]:
    device = choose_device()
    model = attach_adapter(
        load_base(job.base_model, device, choose_dtype(job.training, device)), job
    )
    total_steps = prepared.report["steps"]
    config = FlatLoraConfig(sigma=job.sigma, seed=job.seed, memory=job.training.perturbation_memory)
    try:
        flat = FlatLora(model, config, total_steps)
    except UnsupportedLayer as error:
        raise ConfigInvalid(str(error), "Choose other lora.target_modules.") from error
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        adapter,
        lr=job.training.learning_rate,
        weight_decay=job.training.weight_decay,
        fused=device.type == "cuda",
    )
    train_rows, held_out = prepared.train, prepared.held_out
    return Run(job, model, flat, optimizer, train_rows, held_out, total_steps, device), model


def describe_inputs(job: TrainingJob, prepared: Prepared) -> dict[str, Any]:
    """All that determines the adapter, by content: settings, and hashes of what went in."""
    settings = asdict(job)
    for group in ("job_id", "base_model", "dataset", "validation", "dry_run", "clock"):
        del settings[group]
    return {
        "base_model": {
            "name": job.base_model.name,
            "revision": job.base_model.revision,
            "files": hash_folder(job.base_model.path),
        },
        "dataset": {"uri": job.dataset.uri, "sha256": job.dataset.sha256},
        "validation": job.validation
        and {"uri": job.validation.uri, "sha256": job.validation.sha256},
        "tokens_sha256": fingerprint(prepared),
        "settings": settings,
    }


def _result(this_run: Run, model: PeftModel, state: State) -> dict[str, Any]:
    job, first, last = this_run.job, state.held_out[0], state.held_out[-1]
    dtype = str(choose_dtype(job.training, this_run.device)).removeprefix("torch.")
    trainable = sum(parameter.numel() for parameter in this_run.parameters)
    return {
        "held_out": {
            "rows": len(this_run.held_out),
            "tokens": sum(example.targets for example in this_run.held_out),
            "dtype": dtype,
            "before": {name: first[name] for name in ("loss", "accuracy")},
            "after": {name: last[name] for name in ("loss", "accuracy")},
        },
        "steps": state.step,
        "epochs": round(state.step / steps_per_epoch(job.training, len(this_run.train)), 4),
        "train_tokens": state.tokens,
        "sigma": job.sigma,
        "perturbed_layers": len(this_run.flat.targets),
        "trainable_parameters": trainable,
        "parameters": sum(parameter.numel() for parameter in model.parameters()) - trainable,
        "precision": dtype,
    }


@contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time, or an error where there is none."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _explained_memory(job: TrainingJob) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated() / 2**30
        raise OutOfGpuMemory(
            f"The GPU's memory did not suffice: {peak:.1f} GiB were in use.",
            f"Lower training.micro_batch_size (now {job.training.micro_batch_size}) or "
            "data.max_length; perturbation_memory: streamed saves a copy of the weights.",
        ) from error
