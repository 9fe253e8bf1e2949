"""What the preflight report says of a run's memory and time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.worker.training.model.shapes import EIGHT_B, rank_16
from worker.training.config import TrainingJob
from worker.training.data.dataset import describe_report, prepare
from worker.training.data.rendering import Renderer
from worker.training.estimates import estimates
from worker.training.model.base import load_tokenizer
from worker.training.model.shape import describe_model
from worker.training.model.speed import Device
from worker.training.plan import Plan

GIB = 2**30
H100 = Device("NVIDIA H100", True, torch.bfloat16, 1.07e15, 27e-6, 80 * GIB, 79 * GIB)
PLAN = Plan(4096, 4, packing=True, varlen=True, perturbation_memory="resident")


def prepared(job: TrainingJob) -> dict[str, Any]:
    return prepare(job, Renderer(load_tokenizer(job.base_model), job.data.loss_on)).report


@pytest.fixture
def job(make_job: Callable[..., TrainingJob]) -> TrainingJob:
    job = make_job()
    return replace(job, training=replace(job.training, micro_batch_size=None))


def of_8b(job: TrainingJob, device: Device) -> dict[str, Any]:
    shape = rank_16(LlamaConfig, EIGHT_B)
    plan, sections = estimates(job, shape, PLAN, prepared(job), device=device)
    assert plan.to_json() | {"in_words": plan.in_words()} == sections["plan"]
    return prepared(job) | sections


def test_a_job_on_a_cpu_is_told_its_memory_and_time(job: TrainingJob) -> None:
    shape = describe_model(job.base_model, job.lora)
    cpu = Device("CPU", False, torch.float32, 1e11, 1e-5, 8 * GIB)
    _, sections = estimates(job, shape, Plan(128, 2), prepared(job), device=cpu)
    report = prepared(job) | sections
    assert shape is not None
    assert report["memory"]["weights_bytes"] == 4 * shape.parameters
    assert report["memory"]["fits"]
    assert report["time"]["seconds"] > 0
    told = dict(describe_report(report))
    assert told["memory"].startswith("roughly ")
    assert "tokens/s" in told["time"]
    assert told["each step"].startswith("2 rows of up to 128 tokens")


def test_the_plan_that_is_told_fits_the_gpu(job: TrainingJob) -> None:
    roomy = of_8b(job, replace(H100, total_bytes=200 * GIB, free_bytes=None))
    tight = of_8b(job, replace(H100, free_bytes=24 * GIB))
    assert roomy["plan"]["micro_batch_size"] == 4
    assert tight["plan"]["activation_checkpointing"]
    assert tight["memory"]["total_bytes"] < 24 * GIB < roomy["memory"]["total_bytes"]
    assert tight["memory"]["fits"]
    assert tight["warnings"] == prepared(job)["warnings"]


def test_a_run_that_no_plan_fits_is_warned_of(job: TrainingJob) -> None:
    report = of_8b(job, replace(H100, free_bytes=12 * GIB))
    assert not report["memory"]["fits"]
    assert report["plan"]["micro_batch_size"] == 1
    warning = report["warnings"][-1]
    assert "NVIDIA H100 has 12.0 GiB free" in warning
    assert "quantization" in warning
    assert ("", "it does not fit the 80.0 GiB of NVIDIA H100") in describe_report(report)


def test_what_the_job_has_fixed_is_not_given_up(job: TrainingJob) -> None:
    fixed = replace(
        job, training=replace(job.training, micro_batch_size=4, activation_checkpointing=False)
    )
    report = of_8b(fixed, replace(H100, free_bytes=24 * GIB))
    assert report["plan"]["micro_batch_size"] == 4
    assert not report["plan"]["activation_checkpointing"]
    assert not report["memory"]["fits"]


def test_a_run_without_noise_needs_none(job: TrainingJob) -> None:
    report = of_8b(replace(job, sigma=0.0), replace(H100, free_bytes=200 * GIB))
    assert report["memory"]["noise_bytes"] == 0


def test_a_model_that_is_not_known_leaves_its_plan_alone(job: TrainingJob) -> None:
    plan, found = estimates(job, None, PLAN, prepared(job), device=H100)
    assert plan == PLAN
    assert list(found) == ["plan"]
    assert describe_report(prepared(job) | found)[-1][0] == "each step"


def test_tokens_of_a_step_follow_batch_tokens(make_job: Callable[..., TrainingJob]) -> None:
    job = make_job(training={"batch_tokens": 200})
    report = prepared(job)
    assert report["length"]["p50"] <= report["tokens_per_step"] <= 200
