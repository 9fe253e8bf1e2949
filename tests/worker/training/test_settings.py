"""Each setting of the loop does what it says."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.worker.training.conftest import Recorder, folder_bytes
from worker.training.config import Evaluation, Training, TrainingJob
from worker.training.errors import Stopped
from worker.training.evaluation import best_of, is_exhausted
from worker.training.optimizer import make_optimizer
from worker.training.result.verify import verify
from worker.training.run import run

Make = Callable[..., TrainingJob]


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def trained(job: TrainingJob, folder: Path) -> tuple[dict[str, Any], Recorder]:
    recorder = Recorder()
    return run(job, folder, recorder, recorder), recorder


class TestEvaluations:
    def test_the_best_is_the_lowest_after_the_base_models(self) -> None:
        found = [{"step": n, "loss": loss} for n, loss in enumerate([1.0, 3.0, 2.0, 2.5, 2.0])]
        assert best_of(found) == found[2]
        assert best_of(found, min_delta=1.5) == found[1]
        assert best_of(found[:1]) is None

    def test_patience_counts_evaluations_since_the_best(self) -> None:
        found = [{"step": n, "loss": loss} for n, loss in enumerate([9.0, 3.0, 2.0, 2.5, 2.2])]
        assert is_exhausted(found, Evaluation(patience=2))
        assert not is_exhausted(found[:-1], Evaluation(patience=2))
        assert not is_exhausted(found, Evaluation(patience=None))


@pytest.fixture
def overfitting(make_job: Make) -> TrainingJob:
    """Its held-out loss rises soon: a rate far too high."""
    job = make_job(training={"max_steps": 40, "learning_rate": 0.1, "warmup_ratio": 0.0})
    evaluation = Evaluation(max_rows=3, every_steps=2, patience=2, keep="best", min_delta=1e-4)
    return replace(job, evaluation=evaluation)


class TestBest:
    def test_the_run_ends_early_with_the_adapter_of_the_lowest_loss(
        self, overfitting: TrainingJob, tmp_path: Path
    ) -> None:
        result, recorder = trained(overfitting, tmp_path / "best")
        losses = {step: found["loss"] for step, found in recorder.evaluations if step}
        best = min(losses, key=lambda step: (losses[step], step))
        assert result["stopped_early"]
        assert result["steps"] == best + 4 < 40
        assert result["kept_step"] == best
        told = recorder.data_of("job.stopped_early")
        assert told == {
            "step": best + 4,
            "total_steps": 40,
            "loss": losses[best + 4],
            "best_step": best,
            "best_loss": losses[best],
            "patience": 2,
        }
        assert result["held_out"]["after"]["loss"] == losses[best]
        verify(overfitting, tmp_path / "best")
        other = replace(overfitting, evaluation=replace(overfitting.evaluation, keep="last"))
        trained(other, tmp_path / "last")
        assert folder_bytes(tmp_path / "best" / "adapter") != folder_bytes(
            tmp_path / "last" / "adapter"
        )

    def test_it_outlives_a_resume_on_another_machine(
        self, overfitting: TrainingJob, tmp_path: Path
    ) -> None:
        """The newest checkpoint alone goes there, and holds the best adapter too."""
        result, _ = trained(overfitting, tmp_path / "unbroken")
        recorder = Recorder(stop=(result["steps"] - 1, "drain"))
        here, there = tmp_path / "here", tmp_path / "there"
        with pytest.raises(Stopped):
            run(overfitting, here, recorder, recorder)
        newest = max((here / "checkpoints").iterdir())
        (there / "checkpoints").mkdir(parents=True)
        newest.rename(there / "checkpoints" / newest.name)
        resumed, _ = trained(overfitting, there)
        assert resumed == result
        assert folder_bytes(there / "adapter") == folder_bytes(tmp_path / "unbroken" / "adapter")


class TestOptimizer:
    def test_lora_plus_gives_b_a_rate_of_its_own(self) -> None:
        model = torch.nn.ModuleDict(
            {"lora_A": torch.nn.Linear(2, 2), "lora_B": torch.nn.Linear(2, 2)}
        )
        root = torch.nn.ModuleDict({"layer": model})
        settings = Training(learning_rate=1e-3, loraplus_lr_ratio=16.0)
        groups = make_optimizer(root, settings, torch.device("cpu")).param_groups
        assert [group["lr"] for group in groups] == pytest.approx([1e-3, 16e-3])

    def test_its_rate_is_followed_by_what_is_learnt(self, make_job: Make, tmp_path: Path) -> None:
        """One step at a ratio of 4: B moves four times as far, A (whose gradient is 0) not."""
        adapters = []
        for ratio in (1.0, 4.0):
            folder = tmp_path / str(ratio)
            training = {"max_steps": 1, "loraplus_lr_ratio": ratio, "warmup_ratio": 0.0}
            trained(make_job(training=training), folder)
            adapters.append(adapter_of(folder))
        for name, weight in adapters[0].items():
            scale = 4 if ".lora_B." in name else 1
            torch.testing.assert_close(adapters[1][name], scale * weight, rtol=1e-4, atol=1e-7)


class TestPasses:
    @pytest.mark.parametrize("sigma", [0.0, 0.1])
    def test_activations_that_are_computed_again_change_nothing(
        self, make_job: Make, tmp_path: Path, sigma: float
    ) -> None:
        adapters = []
        for on in (False, True):
            job = make_job(sigma=sigma, training={"activation_checkpointing": on})
            result, _ = trained(job, tmp_path / str(on))
            assert result["plan"]["activation_checkpointing"] is on
            adapters.append(adapter_of(tmp_path / str(on)))
        torch.testing.assert_close(adapters[0], adapters[1], rtol=0, atol=0)

    def test_a_step_may_be_measured_in_tokens(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job(training={"max_steps": None, "epochs": 1.0, "batch_tokens": 200})
        result, recorder = trained(job, tmp_path)
        longest = recorder.report["length"]["max"]
        assert all(step["tokens"] <= max(200, longest) for step in recorder.steps)
        assert result["epochs"] == 1
        assert result["train_tokens"] == recorder.report["tokens"]["all"]
        assert len(recorder.steps) == recorder.report["steps"] == result["steps"]


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_a_quantised_base_learns_resumes_and_is_verified(
    make_job: Make, tmp_path: Path, quantization: str, sigma: float
) -> None:
    training = {"quantization": quantization, "max_steps": 4}
    job = make_job(sigma=sigma, lora={"dropout": 0.0}, training=training)
    result, recorder = trained(job, tmp_path / "unbroken")
    plain = LlamaForCausalLM.from_pretrained(job.base_model.path)
    assert result["parameters"] == sum(weight.numel() for weight in plain.parameters())
    losses = [step["loss"] for step in recorder.steps]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    verify(job, tmp_path / "unbroken")
    stopper = Recorder(stop=(2, "drain"))
    with pytest.raises(Stopped):
        run(job, tmp_path / "broken", stopper, stopper)
    assert trained(job, tmp_path / "broken")[0] == result
    assert adapter_of(tmp_path / "broken").keys() == adapter_of(tmp_path / "unbroken").keys()
    for name, weight in adapter_of(tmp_path / "unbroken").items():
        assert torch.equal(adapter_of(tmp_path / "broken")[name], weight)
