"""A whole job on a GPU: it learns, it resumes bit for bit, and its adapter passes the check.

Run by hand with ``pytest -m gpu``.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worker.training.conftest import Recorder, folder_bytes
from worker.training.config import TrainingJob
from worker.training.errors import Stopped
from worker.training.result.verify import verify
from worker.training.run import run

pytestmark = pytest.mark.gpu

Make = Callable[..., TrainingJob]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_drained_job_goes_on_bit_for_bit(make_job: Make, tmp_path: Path, memory: str) -> None:
    job = make_job(training={"perturbation_memory": memory})
    result = run(job, tmp_path / "unbroken", Recorder(), Recorder())
    assert result["precision"] == "bfloat16"
    assert result["held_out"]["after"]["loss"] < result["held_out"]["before"]["loss"]
    for step in (0, 3, 7):
        folder = tmp_path / f"drained-{step}"
        recorder = Recorder(stop=(step, "drain"))
        with pytest.raises(Stopped):
            run(job, folder, recorder, recorder)
        run(job, folder, Recorder(), Recorder())
        assert folder_bytes(folder / "adapter") == folder_bytes(tmp_path / "unbroken" / "adapter")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_finished_adapter_passes_its_check(
    make_job: Make, tmp_path: Path, precision: str
) -> None:
    job = make_job(training={"precision": precision})
    recorder = Recorder()
    run(job, tmp_path, recorder, recorder)
    verify(job, tmp_path)
    assert recorder.steps[-1]["gpu_memory_bytes"] > 0
