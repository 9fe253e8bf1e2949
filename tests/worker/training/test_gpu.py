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

import pytest
import torch

from tests.worker.training.conftest import Recorder, chat, folder_bytes
from tests.worker.training.killing import describe, finish, kill_at_random
from tests.worker.training.packed import ROWS as EXAMPLES
from tests.worker.training.packed import make_model
from worker.training.batches import Batch
from worker.training.config import TrainingJob
from worker.training.errors import OutOfGpuMemory, Stopped
from worker.training.model.attention import ISOLATES_ROWS, use_varlen_attention
from worker.training.model.head import summed_loss
from worker.training.model.kernels import use_fused_kernels
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


@pytest.mark.parametrize("family", sorted(ISOLATES_ROWS))
def test_rows_end_to_end_have_the_loss_of_the_rows_alone(family: str) -> None:
    """In bfloat16 with fused kernels, against plain float64 on the CPU."""
    exact = make_model(family)
    alone = sum(
        summed_loss(exact, Batch.of([[row]], torch.device("cpu"))).item() for row in EXAMPLES
    )
    model = make_model(family).to(GPU, torch.bfloat16)  # type: ignore[arg-type]
    use_fused_kernels(model, GPU)
    assert use_varlen_attention(model, GPU)
    batch = Batch.of(best_fit(EXAMPLES, 64), GPU, end_to_end=True)
    assert summed_loss(model, batch).item() == pytest.approx(alone, rel=5e-3)


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


LONG = [chat(f"Say {n} again and again.", f"{n} " * 25) for n in range(200)]


class TestMemory:
    def test_a_run_that_does_not_fit_takes_smaller_passes(
        self, make_job: Make, tmp_path: Path, small_gpu: Callable[[int], None]
    ) -> None:
        """And an attempt that goes on from its checkpoint computes as it did."""
        training = {"micro_batch_size": None, "batch_size": 64, "packing": False}
        job = make_job(rows=LONG, training=training)
        small_gpu(48 << 20)
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
