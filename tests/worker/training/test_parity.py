"""The same weights, rows and settings give the same losses, gradients and adapters in TRL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.trl_trainer import Watched, make_trainer
from flatlora import FlatLoraCallback
from tests.flatlora.trainers import shorten_collections
from tests.worker.training.conftest import Recorder, chat, make_tokenizer
from worker.training.batches import Batch
from worker.training.config import TrainingJob
from worker.training.data.dataset import prepare
from worker.training.data.examples import Example
from worker.training.data.rendering import Renderer
from worker.training.model.base import attach_adapter, load_base
from worker.training.model.head import answer_with_loss, summed_loss
from worker.training.model.lora import fast_adapters
from worker.training.optimizer import learning_rate_at
from worker.training.order import RowOrder
from worker.training.packing import Sequences, micro_batches
from worker.training.plan import Plan
from worker.training.run import run

Make = Callable[..., TrainingJob]

CPU = torch.device("cpu")
STEPS, ROWS_A_STEP, MICRO_BATCH = 6, 8, 2
# More than the steps take: at the end of an epoch ours takes a shorter step, and TRL goes on. Their
# lengths are very different, so micro-batches of a step differ in their number of targets.
ROWS = [chat(f"Say {n} some times.", " ".join([str(n)] * (1 + n * n % 23))) for n in range(60)]


@pytest.fixture
def make(make_job: Make) -> Make:
    """A job of steps of four micro-batches."""
    shorten_collections()

    def make(sigma: float = 0.0, loss_on: str = "assistant", **training: Any) -> TrainingJob:
        settings = {"max_steps": STEPS, "batch_size": ROWS_A_STEP, "micro_batch_size": MICRO_BATCH}
        return make_job(
            rows=ROWS,
            sigma=sigma,
            lora={"dropout": 0.0},
            data={"loss_on": loss_on},
            training={**settings, **training},
        )

    return make


def steps_of(job: TrainingJob) -> list[list[Example]]:
    """The rows of every step, as our loop takes them."""
    rows = prepare(job, Renderer(make_tokenizer(), job.data.loss_on)).train
    order = RowOrder([len(row.ids) for row in rows], job.training, job.seed)
    return [[rows[row] for row in order.rows_of(step)] for step in range(STEPS)]


def adapted_base(job: TrainingJob) -> PeftModel:
    return attach_adapter(load_base(job.base_model, CPU, torch.float32), job)


def adapter(model: Any) -> dict[str, Tensor]:
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


def trl(job: TrainingJob, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Watched:
    """TRL's trainer on a model with the adapter that the job starts from."""
    model, settings = adapted_base(job), job.training
    rate = settings.learning_rate
    optimizer = torch.optim.AdamW(
        adapter(model).values(), lr=rate, weight_decay=settings.weight_decay
    )
    rows = [[row] for step in steps_of(job) for row in step]
    return make_trainer(
        model,
        rows,
        folder / "trl",
        *callbacks,
        tokenizer=make_tokenizer(),
        checkpointing=False,
        optimizer=optimizer,
        schedule=lambda step: learning_rate_at(step, STEPS, settings) / rate,
        **{
            "use_cpu": True,
            "bf16": False,
            "max_steps": STEPS,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": ROWS_A_STEP // MICRO_BATCH,
            "max_grad_norm": settings.max_grad_norm,
            **changes,
        },
    )


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to see."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        grads = {name: parameter.grad for name, parameter in adapter(model).items()}
        self.seen = {name: grad.clone() for name, grad in grads.items() if grad is not None}


PADDED = Plan(max_length=128, micro_batch_size=MICRO_BATCH)
PACKED = Plan(max_length=128, micro_batch_size=MICRO_BATCH, packing=True)


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("plan", [PADDED, PACKED], ids=["padded", "packed"])
def test_loss_and_gradients_of_a_step_agree(
    make: Make, tmp_path: Path, loss_on: str, plan: Plan
) -> None:
    """Over micro-batches of different sizes: the mean is over the tokens of the whole step."""
    job, theirs = make(loss_on=loss_on), Gradients()
    trainer = trl(job, tmp_path, theirs, max_steps=1, max_grad_norm=1e9)
    base = load_base(job.base_model, CPU, torch.float32)
    model = attach_adapter(base, job)
    fast_adapters(model)
    answer_with_loss(base)
    for ours, their in zip(adapter(model).values(), adapter(trainer.model).values(), strict=True):
        with torch.no_grad():  # as in the middle of a training: a B of zeros hides A's gradient
            ours.copy_(their.normal_(std=0.1))
    passes = micro_batches(steps_of(job)[0], plan)
    targets = [_targets(sequences) for sequences in passes]
    assert max(targets) > min(targets)

    trainer.train()
    loss = 0.0
    for sequences in passes:
        share = summed_loss(base, Batch.of(sequences, CPU)) / sum(targets)
        share.backward()  # type: ignore[no-untyped-call]
        loss += share.item()
    assert loss == pytest.approx(trainer.logged("loss")[0], rel=1e-6)
    assert len(theirs.seen) == len(adapter(model)) == 2 * 2 * 7
    for name, parameter in adapter(model).items():
        expected = theirs.seen[name]
        assert expected.any()
        apart = (parameter.grad - expected).norm() / expected.norm()  # type: ignore[operator]
        assert apart < 1e-5, name


def _targets(sequences: Sequences) -> int:
    return sum(row.targets for sequence in sequences for row in sequence)


@pytest.mark.parametrize(
    ("sigma", "training"),
    [
        (0.0, {"packing": False}),
        (0.0, {"packing": True}),
        (0.0, {"activation_checkpointing": True}),
        (0.2, {}),
        (0.2, {"packing": True, "activation_checkpointing": True}),
    ],
    ids=[
        "padded",
        "packed",
        "activation checkpointing",
        "σ",
        "σ, packed, activation checkpointing",
    ],
)
def test_a_run_agrees_step_by_step(
    make: Make, tmp_path: Path, sigma: float, training: dict[str, Any]
) -> None:
    """However ours is computed. At σ > 0 TRL is given the engine's callback, not our loop."""
    job, recorder = make(sigma, **training), Recorder()
    run(job, tmp_path, recorder, recorder)
    noise = [FlatLoraCallback(sigma=sigma, seed=job.seed)] if sigma else []
    trainer = trl(job, tmp_path, *noise)
    trainer.train()

    def ours(name: str) -> list[float]:
        return [step[name] for step in recorder.steps]

    assert ours("loss")[-1] < 0.98 * ours("loss")[0]
    assert ours("loss") == pytest.approx(trainer.logged("loss"), rel=1e-5)
    assert ours("grad_norm") == pytest.approx(trainer.logged("grad_norm"), rel=1e-4)
    assert ours("learning_rate") == pytest.approx(trainer.logged("learning_rate"), rel=1e-12)
    if sigma:
        assert ours("sigma") == trainer.logged("flat_lora_sigma")
    assert_same_adapter(tmp_path, trainer)


def assert_same_adapter(folder: Path, trainer: Watched) -> None:
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    expected = adapter(trainer.model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert weight.any()
        apart = (found[name] - weight).norm() / weight.norm()
        assert apart < 1e-4, name
