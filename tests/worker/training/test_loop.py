"""What a step does, and when the loop stops."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.jobs.figures import HeldOut, HeldOutFigures, Result, StepFigures
from tests.worker.training.conftest import Recorder, make_tokenizer
from worker.training.batches import Batch
from worker.training.config import Training, TrainingJob
from worker.training.data.dataset import prepare
from worker.training.data.rendering import Renderer
from worker.training.errors import ConfigInvalid, LossDiverged, Stopped
from worker.training.evaluation import evaluate
from worker.training.loop import seed_step
from worker.training.model.head import answer_with_loss
from worker.training.optimizer import learning_rate_at
from worker.training.order import RowOrder, total_steps
from worker.training.packing import micro_batches
from worker.training.plan import Plan
from worker.training.run import run

Make = Callable[..., TrainingJob]


def plain_lora(job: TrainingJob) -> dict[str, Tensor]:
    """The same training written with PEFT and torch alone."""
    examples = prepare(job, Renderer(make_tokenizer(), "assistant")).train
    base = AutoModelForCausalLM.from_pretrained(job.base_model.path, dtype=torch.float32)
    torch.manual_seed(job.seed)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    order = RowOrder([len(row.ids) for row in examples], job.training, job.seed)
    for step in range(8):
        rows = [examples[i] for i in order.rows_of(step)]
        count = sum(int(row.in_loss[1:].sum()) for row in rows)
        seed_step(job.seed, step, 0)
        for sequences in micro_batches(rows, Plan(max_length=128, micro_batch_size=2)):
            batch = Batch.of(sequences, torch.device("cpu"))
            logits = model(**batch.inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1)[batch.places], batch.targets, reduction="sum"
            )
            (loss / count).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate_at(step, 8, job.training)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


class TestStep:
    def test_without_sigma_it_is_plain_lora(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job(sigma=0.0)
        assert run(job, tmp_path, Recorder(), Recorder())["perturbed_layers"] == 0
        found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        expected = plain_lora(job)
        assert len(found) == len(expected) > 0
        for name, weight in expected.items():
            ours = found[name.replace(".default", "")]
            torch.testing.assert_close(ours, weight, rtol=1e-3, atol=1e-5, msg=name)

    def test_sigma_changes_what_is_learnt(self, make_job: Make, tmp_path: Path) -> None:
        weights = []
        for sigma in (0.0, 0.1):
            folder = tmp_path / str(sigma)
            run(make_job(sigma=sigma), folder, Recorder(), Recorder())
            weights.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
        assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    @pytest.mark.parametrize("training", [{"micro_batch_size": 1}, {"packing": True}])
    def test_the_adapter_does_not_depend_on_the_passes(
        self, make_job: Make, tmp_path: Path, training: dict[str, Any]
    ) -> None:
        adapters: list[dict[str, Tensor]] = []
        for settings in ({"micro_batch_size": 4}, training):
            folder = tmp_path / str(len(adapters))
            job = make_job(lora={"dropout": 0.0}, training=settings)
            run(job, folder, Recorder(), Recorder())
            adapters.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
        torch.testing.assert_close(adapters[0], adapters[1], rtol=1e-3, atol=1e-5)

    def test_evaluation_leaves_the_mode_alone(self, make_job: Make) -> None:
        job = make_job()
        examples = prepare(job, Renderer(make_tokenizer(), "assistant")).train[:5]
        model = AutoModelForCausalLM.from_pretrained(job.base_model.path).train()
        answer_with_loss(model)
        evaluate(model, examples, Plan(max_length=128, micro_batch_size=2), torch.device("cpu"))
        assert model.training

    def test_metrics_hold_loss_rate_sigma_and_norm(self, make_job: Make, tmp_path: Path) -> None:
        recorder = Recorder()
        result = run(make_job(), tmp_path, recorder, recorder)
        assert recorder.data_of("job.stopped_early") is None
        assert result.keys() - {"plan"} == Result.__annotations__.keys() - {"dry_run"}
        assert result["held_out"].keys() == HeldOut.__annotations__.keys()
        assert [step["step"] for step in recorder.steps] == list(range(1, 9))
        assert recorder.steps[0]["sigma"] == 0
        assert recorder.steps[4]["sigma"] == pytest.approx(0.025)
        told = recorder.steps[0].keys() - {"step", "total"} | {"gpu_memory_bytes"}
        assert told == StepFigures.__annotations__.keys(), "clients are promised these names"
        assert recorder.evaluations[0][1].keys() == HeldOutFigures.__annotations__.keys()
        assert [step for step, _ in recorder.evaluations] == [0, 4, 8]
        assert recorder.phases[:3] == ["validating", "loading", "training"]


class TestSchedule:
    def test_it_warms_up_and_then_falls(self) -> None:
        settings = Training(learning_rate=1.0, warmup_ratio=0.2, schedule="cosine")
        rates = [learning_rate_at(step, 20, settings) for step in range(20)]
        assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert rates[4] == 1.0
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert rates[-1] > 0

    @pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.1)])
    def test_other_schedules(self, schedule: str, last: float) -> None:
        settings = Training(learning_rate=1.0, warmup_ratio=0, schedule=schedule)  # type: ignore[arg-type]
        assert learning_rate_at(9, 10, settings) == pytest.approx(last)


LENGTHS = [5, 9, 2, 7, 30, 4, 4, 8, 1, 6]


class TestOrder:
    @pytest.mark.parametrize("training", [Training(batch_size=4), Training(batch_tokens=20)])
    def test_an_epoch_sees_every_row_once_in_an_order_of_its_own(self, training: Training) -> None:
        order = RowOrder(LENGTHS, training, seed=1)
        first, second = order.steps(1), order.steps(2)
        epochs = [
            [int(row) for step in steps for row in order.rows_of(step)]
            for steps in (range(first), range(first, second))
        ]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
        assert epochs[0] != epochs[1]
        assert order.epochs(first) == 1

    @pytest.mark.parametrize("training", [Training(batch_size=4), Training(batch_tokens=20)])
    def test_it_is_a_function_of_seed_and_step(self, training: Training) -> None:
        one, other = (RowOrder(LENGTHS, training, seed=1) for _ in range(2))
        straight = [one.rows_of(step).tolist() for step in range(30)]
        assert [other.rows_of(step).tolist() for step in reversed(range(30))][::-1] == straight

    def test_a_step_of_tokens_takes_as_many_rows_as_fit_and_one_at_least(self) -> None:
        order = RowOrder(LENGTHS, Training(batch_tokens=20), seed=1)
        for step in range(order.steps(3)):
            rows = order.rows_of(step)
            assert len(rows) == 1 or sum(LENGTHS[row] for row in rows) <= 20

    def test_a_part_of_an_epoch_is_rounded_up(self) -> None:
        assert total_steps(Training(epochs=1.5, batch_size=4), LENGTHS, seed=1) == 5
        assert total_steps(Training(epochs=0.1, batch_size=4), LENGTHS, seed=1) == 1


class TestStops:
    def test_a_wish_to_cancel_leaves_no_adapter(self, make_job: Make, tmp_path: Path) -> None:
        recorder = Recorder(stop=(3, "cancel"))
        with pytest.raises(Stopped, match="cancel"):
            run(make_job(), tmp_path, recorder, recorder)
        assert len(recorder.steps) == 3
        assert not (tmp_path / "adapter").exists()

    def test_losses_that_are_not_finite_end_the_run(self, make_job: Make, tmp_path: Path) -> None:
        job = make_job(training={"learning_rate": 1.0, "max_bad_losses": 2, "warmup_ratio": 0.0})
        recorder = PoisonAfter(5)
        with pytest.raises(LossDiverged, match=r"2 steps in a row, up to step 7 of 8"):
            run(job, tmp_path, recorder, recorder)
        assert recorder.steps[-1]["loss"] is None
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["ckpt-000000004", "ckpt-000000006"]

    def test_a_held_out_loss_that_is_not_finite_ends_the_run(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        recorder = PoisonAfter(3)
        with pytest.raises(LossDiverged, match="held-out rows is not finite after step 4"):
            run(make_job(), tmp_path, recorder, recorder)

    def test_unknown_target_modules_are_named_with_the_known(
        self, make_job: Make, tmp_path: Path
    ) -> None:
        job = make_job(lora={"target_modules": ["q_proj", "query"]})
        with pytest.raises(ConfigInvalid, match="no linear layer named query") as caught:
            run(job, tmp_path, Recorder(), Recorder())
        assert "q_proj" in (caught.value.hint or "")

    def test_a_dry_run_loads_no_model(self, make_job: Make, tmp_path: Path) -> None:
        recorder = Recorder()
        assert run(make_job(dry_run=True), tmp_path, recorder, recorder) == {"dry_run": True}
        assert recorder.phases == ["validating"]
        assert recorder.report["rows"]["read"] == 40


class PoisonAfter(Recorder):
    """Makes every loss after some steps NaN, as an overflow would."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._steps = steps

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        super().step(step, total, metrics)
        if step == self._steps:
            torch.nn.modules.module.register_module_forward_hook(_poison)


def _poison(module: object, _inputs: object, output: Any) -> Any:
    return output * math.nan if isinstance(module, torch.nn.Embedding) else output


@pytest.fixture(autouse=True)
def no_hooks_left() -> Iterator[None]:
    yield
    torch.nn.modules.module._global_forward_hooks.clear()
