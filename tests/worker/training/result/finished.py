"""A finished adapter without the training: chosen weights, and a run's history made up."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from tests.worker.training.conftest import ROWS
from worker.training.config import (
    BaseModel,
    Data,
    DataFile,
    Evaluation,
    Lora,
    Training,
    TrainingJob,
)
from worker.training.data.dataset import prepare
from worker.training.data.rendering import Renderer
from worker.training.files import sha256_of
from worker.training.model.base import attach_adapter, load_base, load_tokenizer
from worker.training.plan import Plan
from worker.training.result.adapter import save_adapter
from worker.training.result.manifest import MANIFEST
from worker.training.result.verify import write_probe
from worker.training.state import State

INPUTS = {"dataset": {"sha256": "d" * 64}, "settings": {"sigma": 0.05}}


def job_on(base: Path, rows: Path) -> TrainingJob:
    """The job of ``make_job``, for a fixture that outlives a test."""
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TrainingJob(
        job_id="job_test",
        base_model=BaseModel("org/base", base, revision="abc123"),
        dataset=DataFile("file:rows.jsonl", rows, rows.name, sha256_of(rows)),
        validation=None,
        sigma=0.05,
        seed=7,
        lora=Lora(rank=4, alpha=8.0, dropout=0.1),
        data=Data(max_length=128),
        training=Training(epochs=None, max_steps=8, batch_size=4, micro_batch_size=2),
        evaluation=Evaluation(max_rows=3, every_steps=4),
    )


def made_up_result(**more: Any) -> dict[str, Any]:
    return {
        "held_out": {
            "rows": 3,
            "tokens": 17,
            "dtype": "float32",
            "before": {"loss": 5.5, "accuracy": 0.01},
            "after": {"loss": 2.25, "accuracy": 0.5},
        },
        "steps": 8,
        "stopped_early": False,
        "kept": "last",
        "kept_step": 8,
        "epochs": 0.8,
        "train_tokens": 1234,
        "sigma": 0.05,
        "perturbed_layers": 14,
        "trainable_parameters": 5000,
        "parameters": 20000,
        "precision": "float32",
        "plan": Plan(max_length=128, micro_batch_size=2).to_json(),
        **more,
    }


def made_up_state() -> State:
    return State(
        step=8,
        tokens=1234,
        losses=[[step, 5.5 - 0.4 * step] for step in range(1, 9)],
        held_out=[
            {"step": 0, "loss": 5.5, "accuracy": 0.01},
            {"step": 4, "loss": 3.5, "accuracy": 0.25},
            {"step": 8, "loss": 2.25, "accuracy": 0.5},
        ],
    )


def adapted(job: TrainingJob, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The base with an adapter that does something."""
    how = job.training.quantization
    model = attach_adapter(load_base(job.base_model, torch.device("cpu"), dtype, how), job)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return model.eval()


def report_of(job: TrainingJob) -> dict[str, Any]:
    return prepare(job, Renderer(load_tokenizer(job.base_model), job.data.loss_on)).report


def finish(
    job: TrainingJob,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    report: Mapping[str, Any] | None = None,
    change: Callable[[PreTrainedTokenizerBase], object] = lambda _: None,
) -> Path:
    """Write ``folder/adapter`` and the probe as a run of the job would; returns the adapter's."""
    model, tokenizer = adapted(job, dtype), load_tokenizer(job.base_model)
    prepared = prepare(job, Renderer(tokenizer, job.data.loss_on))
    change(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    reported = {**prepared.report, **(report or {})}
    save_adapter(
        folder / "adapter",
        model,
        tokenizer,
        job,
        INPUTS,
        made_up_result(),
        made_up_state(),
        reported,
    )
    write_probe(folder, model, prepared.held_out)
    return folder / "adapter"


def reseal(adapter: Path) -> None:
    """Let the manifest agree with whatever was done to the files."""
    manifest = json.loads((adapter / MANIFEST).read_text())
    manifest["files"] = {
        path.name: sha256_of(path) for path in adapter.iterdir() if path.name != MANIFEST
    }
    (adapter / MANIFEST).write_text(json.dumps(manifest))
