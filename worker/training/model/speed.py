"""How long a run takes, roughly, from what it computes and what the device is known to do.

On a GPU three things take time: products of the frozen weights with each token, once forward and
once for the gradient of their input; reading and writing what lies between the products; and the
host, which launches some hundred kernels for each layer and pass whatever their size. The first two
add up, and a small model waits for the host instead.
"""

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from shutil import which
from typing import Any

import torch
from torch import Tensor

from worker.training.model.memory import kept_per_token
from worker.training.model.shape import DecoderLayer, ModelShape
from worker.training.plan import Plan

# Fitted to Llamas of 1, 3 and 8 billion weights and a Qwen3 of 4 billion on an H100, whose nominal
# rate is that of its matrix units at its highest clock.
PRODUCTS = 0.74
"""Of a GPU's nominal rate, that its large products reach."""

OPERATIONS_PER_BYTE = 6400
"""Nominal operations in the time that a byte takes which is kept for the backward pass."""

AGAIN = 1.35
"""How many times as long that takes with activation checkpointing."""

CALLS_PER_LAYER, CALLS_PER_ADAPTER, CALLS_AGAIN = 115, 27, 1.65
"""Small autograd functions that take the host as long as a layer does; with checkpointing more."""

CPU_PRODUCTS = 0.5
"""Of the rate of one large product on a CPU, that a run reaches."""

EVALUATING = 0.5
"""Of either's nominal rate, that evaluations reach."""

FLOPS_PER_CYCLE = {
    (7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 7): 1024, (8, 9): 1024,
    (9, 0): 4096, (10, 0): 8192, (10, 3): 8192, (12, 0): 1024, (12, 1): 1024,
}  # fmt: skip
"""Of a multiprocessor's matrix units in 16 bits, by compute capability; GeForce cards do half."""

NOISE_PER_FLOP = 4e-4
"""Noisy weights that are written in the time of a nominal operation."""

QUANTISED = 8
"""How many times as long that takes where weights are stored as codes, measured as above."""


@dataclass(frozen=True)
class Device:
    """What computes.

    Attributes:
        name: For a person.
        is_gpu: Whether it is a GPU.
        dtype: What the base model computes in.
        nominal: Operations a second that its data sheet promises, or that a large product reaches.
        call_seconds: What one small autograd function takes the host.
        total_bytes: Its memory.
        free_bytes: What of it nobody has taken, if that is known.
    """

    name: str
    is_gpu: bool
    dtype: torch.dtype
    nominal: float
    call_seconds: float
    total_bytes: int
    free_bytes: int | None = None


@dataclass(frozen=True)
class Work:
    """What a run computes, all ranks together.

    Attributes:
        steps: Optimizer steps.
        passes: Forward and backward passes of a step.
        tokens: Trained on, over all steps.
        targets: Of them in the loss.
        row_length: How many tokens a row has where a token stands, on average.
        evaluation_tokens: Evaluated, in all evaluations together.
    """

    steps: int
    passes: int
    tokens: int
    targets: int
    row_length: float
    evaluation_tokens: int


@dataclass(frozen=True)
class Duration:
    """How long a run takes, roughly.

    Attributes:
        seconds: Training and evaluation, without loading and saving.
        tokens_per_second: While it trains.
    """

    seconds: float
    tokens_per_second: float


def estimate_seconds(
    shape: ModelShape,
    plan: Plan,
    work: Work,
    device: Device,
    *,
    is_perturbed: bool = True,
    ranks: int = 1,
) -> Duration:
    """How long a run takes.

    Args:
        shape: The model with its adapter.
        plan: How a step is computed.
        work: How much there is to do.
        device: What does it; each rank has one.
        is_perturbed: Whether there is noise: sigma is above 0.
        ranks: Processes that share the passes of a step.
    """
    layers = sum(map(_weights, shape.layers)) + shape.adapter
    attention = _attention(shape, work.row_length)
    head = 2 * shape.vocabulary * shape.hidden
    again = plan.activation_checkpointing
    per_token: float = (6 if again else 4) * layers + 2 * shape.adapter
    per_token += (4.5 if again else 3.5) * attention
    operations = work.tokens * per_token + 2 * head * work.targets
    computing = operations / (device.nominal * (PRODUCTS if device.is_gpu else CPU_PRODUCTS))
    if device.is_gpu:
        kept = kept_per_token(shape, plan, dtype=device.dtype, on_gpu=True)
        moving = work.tokens * kept * (AGAIN if again else 1)
        computing += moving * OPERATIONS_PER_BYTE / device.nominal
    training = max(computing, work.steps * work.passes * _launching(shape, plan, device))
    if is_perturbed:
        training += _noise(shape, plan, work) / (NOISE_PER_FLOP * device.nominal)
    evaluated = work.evaluation_tokens * (2 * layers + attention + head)
    evaluating = evaluated / (device.nominal * EVALUATING)
    return Duration(
        seconds=(training + evaluating) / ranks,
        tokens_per_second=work.tokens * ranks / max(training, 1e-9),
    )


def _launching(shape: ModelShape, plan: Plan, device: Device) -> float:
    """Seconds that a pass takes the host."""
    calls: float = CALLS_PER_LAYER * len(shape.layers) + CALLS_PER_ADAPTER * len(shape.targets)
    if plan.activation_checkpointing:
        calls *= CALLS_AGAIN
    return calls * device.call_seconds


def _weights(layer: DecoderLayer) -> int:
    """Weights that a token is multiplied by."""
    experts = 0
    if not any(linear.reads == "product" for linear in layer.linears):
        hidden = layer.linears[0].inputs if layer.linears else 0
        experts = layer.experts * 3 * layer.inner * hidden
    return sum(linear.size for linear in layer.linears) + experts


def _attention(shape: ModelShape, row_length: float) -> float:
    """Operations per token, forward: with half of its row, on average, for scores and values."""
    return 2 * row_length * shape.heads * shape.head_dim * len(shape.layers)


def _noise(shape: ModelShape, plan: Plan, work: Work) -> float:
    """Noisy weights that are written, a quantised one counted as often as it takes longer."""
    once = sum(linear.size for linear in shape.targets)
    once *= QUANTISED if shape.quantization else 1
    if plan.perturbation_memory == "resident":
        return work.steps * once
    return work.steps * work.passes * once * (3 if plan.activation_checkpointing else 2)


def find_device(device: torch.device, dtype: torch.dtype) -> Device:
    """What is known of a device. Of a GPU's memory nothing is taken for it; a CPU is tried."""
    if device.type == "cuda":
        return _gpu(torch.cuda.get_device_properties(device), dtype, _seconds_per_call())
    return Device(
        name="CPU",
        is_gpu=False,
        dtype=dtype,
        nominal=_product_rate(dtype),
        call_seconds=_seconds_per_call(),
        total_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )


def _gpu(properties: Any, dtype: torch.dtype, call_seconds: float) -> Device:
    per_cycle = FLOPS_PER_CYCLE.get((properties.major, properties.minor), 1024)
    if "GeForce" in properties.name:
        per_cycle //= 2
    if dtype == torch.float32:  # no matrix units
        per_cycle = 256 if (properties.major, properties.minor) != (8, 0) else 128
    hertz = 1e3 * getattr(properties, "clock_rate", 1_700_000)
    nominal = properties.multi_processor_count * per_cycle * hertz
    return Device(
        name=properties.name,
        is_gpu=True,
        dtype=dtype,
        nominal=nominal,
        call_seconds=call_seconds,
        total_bytes=properties.total_memory,
        free_bytes=_free_bytes(getattr(properties, "uuid", None)),
    )


def _free_bytes(uuid: object) -> int | None:
    """Asked of the driver: torch would take half a gigabyte of the memory in order to ask."""
    command = which("nvidia-smi")
    if command is None or uuid is None:
        return None
    query = ["--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", f"GPU-{uuid}"]
    try:
        asked = subprocess.run(  # noqa: S603 - as the driver has installed it
            [command, *query], capture_output=True, text=True, check=True, timeout=10
        )
        return int(asked.stdout) << 20
    except (OSError, ValueError, subprocess.SubprocessError):  # a part of a GPU, for one
        return None


def _product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large product on the CPU, tried for some 50 ms."""
    size = 512
    matrix = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _best(lambda: matrix @ matrix, seconds=0.05)


def _seconds_per_call() -> float:
    """A small autograd function on the CPU, forward and backward."""
    calls, weight = 100, torch.eye(4)

    def chain() -> None:
        y = torch.ones(4, 4, requires_grad=True)
        for _ in range(calls):
            y = _Call.apply(y, weight)  # type: ignore[no-untyped-call]
        torch.autograd.backward(y.sum())

    return _best(chain, seconds=0.02) / calls


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.t(), None


def _best(work: Callable[[], object], seconds: float) -> float:
    """The shortest of as many tries as go into the time, and two at least."""
    work()
    best, ends = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def passes_of(tokens: float, capacity: int) -> int:
    """Passes of a step of so many tokens."""
    return max(1, ceil(tokens / capacity))
