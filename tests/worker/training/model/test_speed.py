"""The estimate of time against what an H100 has shown, and what it must never say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tests.worker.training.model.shapes import EIGHT_B, LORA, ONE_B, SIZES, THREE_B, rank_16
from worker.training.model.shape import ModelShape, shape_of
from worker.training.model.speed import Device, Work, estimate_seconds, find_device
from worker.training.plan import Plan

H100 = Device("NVIDIA H100", True, torch.bfloat16, 132 * 4096 * 1.98e9, 27e-6, 80 << 30)
WORK = Work(100, 4, 100 * 4 * 8192, 100 * 4 * 8192, 1500.0, 0)
PLAN = Plan(4096, 2, packing=True, varlen=True)
MEASURED = [
    # sizes, plan, tokens a second
    (EIGHT_B, PLAN, 14_879),
    (EIGHT_B, replace(PLAN, activation_checkpointing=True), 10_669),
    (THREE_B, replace(PLAN, micro_batch_size=4, activation_checkpointing=True), 21_626),
    (ONE_B, replace(PLAN, micro_batch_size=4, activation_checkpointing=True), 52_819),
    (ONE_B, replace(PLAN, max_length=1024, micro_batch_size=1), 9_687),  # it waits for the host
]


@pytest.mark.parametrize("point", MEASURED)
def test_a_rough_time_is_right_within_a_third(point: tuple[dict[str, Any], Plan, int]) -> None:
    pytest.importorskip("liger_kernel")
    sizes, plan, measured = point
    tokens = plan.capacity * WORK.steps * WORK.passes
    work = replace(WORK, tokens=tokens, targets=tokens)
    shape = rank_16(LlamaConfig, sizes)
    found = estimate_seconds(shape, plan, work, H100, is_perturbed=False)
    assert found.tokens_per_second == pytest.approx(measured, rel=0.34)
    assert found.seconds == pytest.approx(tokens / found.tokens_per_second)


def tiny() -> ModelShape:
    return shape_of(LlamaConfig(**SIZES), LORA)


def seconds(plan: Plan = PLAN, work: Work = WORK, **more: Any) -> float:
    return estimate_seconds(rank_16(LlamaConfig, EIGHT_B), plan, work, H100, **more).seconds


def test_noise_takes_time_and_more_of_it_where_it_is_streamed() -> None:
    resident = replace(PLAN, perturbation_memory="resident")
    none = seconds(is_perturbed=False)
    assert none < seconds(resident) < seconds(PLAN) < 1.2 * none


def test_evaluations_take_time_and_ranks_share_it() -> None:
    assert seconds(work=replace(WORK, evaluation_tokens=10**6)) > seconds()
    assert seconds(ranks=4) == pytest.approx(seconds() / 4)


def test_a_cpu_is_tried_and_gives_an_estimate() -> None:
    device = find_device(torch.device("cpu"), torch.float32)
    assert not device.is_gpu
    assert 1e7 < device.nominal < 1e14
    assert 1e-7 < device.call_seconds < 1
    assert device.total_bytes > 1 << 30
    found = estimate_seconds(tiny(), replace(PLAN, varlen=False), WORK, device)
    assert 0 < found.seconds < 86_400
