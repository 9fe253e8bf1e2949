"""A plan gives way to lighter ones, and all attempts of a job compute by the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import worker.training.loop as loop
from tests.worker.training.conftest import Recorder, folder_bytes
from worker.training.config import TrainingJob
from worker.training.errors import OutOfGpuMemory, Stopped
from worker.training.model.head import summed_loss
from worker.training.plan import Freedom, Plan, lighter, read_plan, write_plan
from worker.training.run import run

Make = Callable[..., TrainingJob]
ALL = Freedom(micro_batch_size=True, activation_checkpointing=True, perturbation_memory=True)


class TestLighter:
    def test_passes_give_way_first_while_they_keep_a_gpu_busy(self) -> None:
        plan = Plan(max_length=2048, micro_batch_size=8, perturbation_memory="resident")
        tried = []
        while (plan := lighter(plan, ALL) or plan) not in tried:
            tried.append(plan)
        assert [
            (one.micro_batch_size, one.perturbation_memory, one.activation_checkpointing)
            for one in tried
        ] == [
            (4, "resident", False),
            (2, "resident", False),
            (2, "streamed", False),
            (2, "streamed", True),
            (1, "streamed", True),
        ]

    def test_what_the_job_has_fixed_stays(self) -> None:
        plan = Plan(max_length=2048, micro_batch_size=8, perturbation_memory="resident")
        assert lighter(plan, Freedom(False, False, False)) is None


class TestWritten:
    def test_it_is_that_of_the_same_run_alone(self, tmp_path: Path) -> None:
        plan = Plan(max_length=8, micro_batch_size=2)
        write_plan(tmp_path, "this", plan, from_step=3)
        written = read_plan(tmp_path, "this")
        assert written
        assert (written.plan, written.from_step) == (plan, 3)
        assert read_plan(tmp_path, "other") is None

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": "this", "plan": {"a": 1}}'])
    def test_a_torn_one_is_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "plan.json").write_text(text)
        assert read_plan(tmp_path, "this") is None


class Crowded:
    """Runs out of memory in passes of more rows than one, from some pass on."""

    def __init__(self, passes: int) -> None:
        self._left = passes

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        self._left -= 1
        if self._left < 0 and len(batch.inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("no more")
        return summed_loss(model, batch)


class TestFallback:
    """Memory that runs out in the middle of a run; on a CPU it does so only if told to."""

    @pytest.fixture
    def job(self, make_job: Make) -> TrainingJob:
        job = make_job(training={"micro_batch_size": None, "batch_size": 4})
        return replace(job, training=replace(job.training, activation_checkpointing=False))

    @pytest.mark.parametrize("passes", [1, 5])
    def test_the_run_goes_on_with_smaller_passes_and_so_does_one_that_is_resumed(
        self, job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
    ) -> None:
        """Before and after its first checkpoint, which it has after step 2."""
        monkeypatch.setattr(loop, "summed_loss", Crowded(passes))
        recorder = Recorder()
        result = run(job, tmp_path / "unbroken", recorder, recorder)
        assert result["plan"]["micro_batch_size"] == 1
        assert "job.replanned" in [type_ for type_, _ in recorder.events]
        monkeypatch.setattr(loop, "summed_loss", Crowded(passes))
        stopper = Recorder(stop=(7, "drain"))
        with pytest.raises(Stopped):
            run(job, tmp_path / "broken", stopper, stopper)
        monkeypatch.undo()  # there is memory again, and still it computes by the lighter plan
        assert run(job, tmp_path / "broken", Recorder(), Recorder()) == result
        assert folder_bytes(tmp_path / "broken" / "adapter") == folder_bytes(
            tmp_path / "unbroken" / "adapter"
        )

    def test_the_lighter_plan_is_written_down_before_it_is_followed(
        self, job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loop, "summed_loss", Crowded(5))
        told = []

        class Watching(Recorder):
            def step(self, step: int, total: int, metrics: Any) -> None:
                super().step(step, total, metrics)
                record = json.loads((tmp_path / "plan.json").read_text())
                told.append((step, record["plan"]["micro_batch_size"], record["from_step"]))

        run(job, tmp_path, Watching(), Recorder())
        assert told[0] == (1, 4, 0)
        assert told[-1] == (8, 1, 4)

    def test_one_that_may_give_nothing_up_is_told(
        self, make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fixed = {"activation_checkpointing": False, "perturbation_memory": "streamed"}
        monkeypatch.setattr(loop, "summed_loss", Crowded(1))
        with pytest.raises(OutOfGpuMemory, match="2 rows of up to"):
            run(make_job(training=fixed), tmp_path, Recorder(), Recorder())
