"""A whole job on a GPU: it learns, it resumes bit for bit, and its adapter passes the check.

Run by hand with ``pytest -m gpu``.
"""

from tests.flatlora.interpreter import DEVICE as GPU  # isort: skip # before the kernels, see there

import random
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.worker.training.conftest import Recorder, chat, folder_bytes
from tests.worker.training.killing import describe, finish, kill_at_random
from tests.worker.training.packed import ROWS as EXAMPLES
from tests.worker.training.packed import make_model
from worker.training.batches import Batch
from worker.training.config import TrainingJob
from worker.training.data.examples import Example
from worker.training.errors import OutOfGpuMemory, Stopped
from worker.training.model.attention import ISOLATES_ROWS, use_varlen_attention
from worker.training.model.head import summed_loss
from worker.training.model.kernels import use_fused_kernels
from worker.training.model.lora import fast_adapters
from worker.training.packing import best_fit
from worker.training.result.verify import verify
from worker.training.run import run

pytestmark = pytest.mark.gpu

Make = Callable[..., TrainingJob]


@pytest.mark.parametrize(
    "training",
    [
        {"perturbation_memory": "resident"},
        {"perturbation_memory": "streamed"},
        {"activation_checkpointing": True},
        {"packing": False},
        {"precision": "fp32"},
    ],
    ids=str,
)
def test_a_drained_job_goes_on_bit_for_bit(
    make_job: Make, tmp_path: Path, training: dict[str, Any]
) -> None:
    job = make_job(training={"micro_batch_size": None, **training})
    result = run(job, tmp_path / "unbroken", Recorder(), Recorder())
    assert result["plan"]["varlen"] == (result["precision"] == "bfloat16")
    assert result["held_out"]["after"]["loss"] < result["held_out"]["before"]["loss"]
    for step in (0, 3, 7):
        folder = tmp_path / f"drained-{step}"
        recorder = Recorder(stop=(step, "drain"))
        with pytest.raises(Stopped):
            run(job, folder, recorder, recorder)
        run(job, folder, Recorder(), Recorder())
        assert folder_bytes(folder / "adapter") == folder_bytes(tmp_path / "unbroken" / "adapter")


def test_killed_twenty_times_it_makes_the_same_adapter(make_job: Make, tmp_path: Path) -> None:
    """Five runs side by side, each killed four times."""
    job = make_job(training={"micro_batch_size": None})
    run(job, tmp_path / "unbroken", Recorder(), Recorder())
    seed = secrets.randbelow(10**6)

    def chain(number: int) -> dict[str, bytes]:
        folder = tmp_path / f"killed-{number}"
        describe(job, folder)
        kill_at_random(folder, random.Random(seed + number), times=4)
        assert finish(folder) == 0
        return folder_bytes(folder / "adapter")

    with ThreadPoolExecutor(5) as pool:
        for found in pool.map(chain, range(5)):
            assert found == folder_bytes(tmp_path / "unbroken" / "adapter"), f"seed {seed}"


# bitsandbytes says so of each 4-bit layer whose width is not a multiple of 64, as ours.
@pytest.mark.filterwarnings("ignore:inner dimension:UserWarning")
@pytest.mark.parametrize(
    "training",
    [
        {"precision": "bf16"},
        {"precision": "fp32"},
        {"quantization": "4bit"},
        {"quantization": "8bit"},
    ],
    ids=str,
)
def test_the_finished_adapter_passes_its_check(
    make_job: Make, tmp_path: Path, training: dict[str, Any]
) -> None:
    if "quantization" in training:
        pytest.importorskip("bitsandbytes")
    job = make_job(training=training)
    recorder = Recorder()
    run(job, tmp_path, recorder, recorder)
    verify(job, tmp_path)
    assert recorder.steps[-1]["gpu_memory_bytes"] > 0


def adapted(family: str, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """Weights so large that what attention does shows in the loss, in float64 on the CPU."""
    base = make_model(family)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    base.to(device, dtype)  # type: ignore[arg-type] # transformers' own signature lost its self
    if device.type == "cuda":
        use_fused_kernels(base, device)
        assert use_varlen_attention(base, device)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    fast_adapters(model)
    return model.train()


def losses_and_gradients(
    model: PeftModel, passes: list[Batch]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for batch in passes:
        loss = summed_loss(model.get_base_model(), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    named = model.named_parameters()
    found = {name: p.grad.double().cpu() for name, p in named if p.grad is not None}
    return losses, found


@pytest.mark.parametrize("family", sorted(ISOLATES_ROWS))
def test_rows_end_to_end_have_the_gradients_of_the_rows_alone(family: str) -> None:
    """In bfloat16 with fused kernels, against plain float64 on the CPU; and others do not."""
    cpu = torch.device("cpu")
    exact = adapted(family, cpu, torch.float64)
    losses, alone = losses_and_gradients(exact, [Batch.of([[row]], cpu) for row in EXAMPLES])
    exact.zero_grad()
    joined = [Example(np.concatenate([row.ids for row in EXAMPLES]),
                      np.concatenate([row.in_loss for row in EXAMPLES]))]  # fmt: skip
    _, leaking = losses_and_gradients(exact, [Batch.of([joined], cpu)])
    model = adapted(family, GPU, torch.bfloat16)
    batch = Batch.of(best_fit(EXAMPLES, 64), GPU, end_to_end=True)
    packed, found = losses_and_gradients(model, [batch])
    rounding = adapted(family, cpu, torch.bfloat16)
    _, rounded = losses_and_gradients(rounding, [Batch.of(best_fit(EXAMPLES, 64), cpu)])
    assert packed[0] == pytest.approx(sum(losses), rel=2e-2)
    allowed = 2 * apart(rounded, alone) + 0.01
    assert apart(found, alone) < allowed < apart(leaking, alone)


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Length of the difference of two gradients, a share of the second's."""
    squares = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return float((squares / sum(float(g.square().sum()) for g in expected.values())) ** 0.5)


@pytest.fixture
def small_gpu() -> Iterator[Callable[[int], None]]:
    """Let the process have so many bytes of the GPU, beside what it has."""
    total = torch.cuda.get_device_properties(GPU).total_memory

    def limit(size: int) -> None:
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved(GPU) + size
        torch.cuda.set_per_process_memory_fraction(allowed / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


LONG = [chat(f"Say {n} again and again.", f"{n} " * 25) for n in range(600)]


class TestMemory:
    def test_a_run_that_does_not_fit_takes_smaller_passes(
        self, make_job: Make, tmp_path: Path, small_gpu: Callable[[int], None]
    ) -> None:
        """And an attempt that goes on from its checkpoint computes as it did."""
        training = {"micro_batch_size": None, "batch_size": 500, "packing": False}
        job = make_job(rows=LONG, training=training)
        recorder = Recorder()
        run(job, tmp_path / "roomy", recorder, recorder)
        planned = recorder.data_of("job.planned")
        assert planned
        small_gpu(int(0.6 * planned["peak_bytes"]))
        recorder = Recorder()
        result = run(job, tmp_path / "unbroken", recorder, recorder)
        assert "job.replanned" in [type_ for type_, _ in recorder.events]
        stopper = Recorder(stop=(5, "drain"))
        with pytest.raises(Stopped):
            run(job, tmp_path / "broken", stopper, stopper)
        assert run(job, tmp_path / "broken", Recorder(), Recorder()) == result
        assert folder_bytes(tmp_path / "broken" / "adapter") == folder_bytes(
            tmp_path / "unbroken" / "adapter"
        )

    def test_one_that_cannot_fit_is_told_before_its_first_step(
        self, make_job: Make, tmp_path: Path, small_gpu: Callable[[int], None]
    ) -> None:
        job = make_job(rows=LONG, training={"micro_batch_size": 64, "batch_size": 64})
        small_gpu(24 << 20)
        recorder = Recorder()
        with pytest.raises(OutOfGpuMemory, match="does not fit the GPU's"):
            run(job, tmp_path, recorder, recorder)
        assert recorder.steps == []
