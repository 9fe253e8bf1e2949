"""The callback in a ``Trainer`` that resumes from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from flatlora import FlatLoraCallback, sigma_at
from tests.flatlora.trainers import SEED, SIGMA, MakeModel, callback, make_trainer, sigmas


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_ends_with_the_adapter_of_the_unbroken_one(
    peft_model: MakeModel, tmp_path: Path, step: int
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, peft_model(lora_dropout=0.2), callback(), **saving).train()
    resumed = make_trainer(
        tmp_path,
        peft_model(lora_dropout=0.2),
        callback(),
        output_dir=str(tmp_path / "resumed"),
        **saving,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    unbroken, again = (
        (tmp_path / name / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
        for name in ("run", "resumed")
    )
    assert again == unbroken
    assert sigmas(resumed) == [sigma_at(step, 6, SIGMA) for step in range(6)]


@pytest.fixture
def checkpoints(peft_model: MakeModel, tmp_path: Path) -> Path:
    """The folder of a run of 6 steps with Flat-LoRA, which saved each."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, peft_model(), callback(), **saving).train()
    return tmp_path / "run"


@pytest.fixture
def checkpoint(checkpoints: Path) -> str:
    """That of step 3, at the end of an epoch."""
    return str(checkpoints / "checkpoint-3")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (FlatLoraCallback(sigma=0.1, seed=SEED), r"sigma=0\.2 \(now 0\.1\)"),
        (FlatLoraCallback(sigma=SIGMA, seed=8), r"seed=7 \(now 8\)"),
    ],
)
def test_a_checkpoint_of_another_sigma_or_seed_is_refused(
    peft_model: MakeModel,
    tmp_path: Path,
    checkpoint: str,
    changed: FlatLoraCallback,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, peft_model(), changed).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_trained_without_flat_lora_is_refused(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    saving: dict[str, Any] = {"save_strategy": "epoch"}
    make_trainer(tmp_path, peft_model(), **saving).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"sigma=0\.0 \(now 0\.2\)"):
        make_trainer(tmp_path, peft_model(), callback()).train(resume_from_checkpoint=checkpoint)
    zero = make_trainer(tmp_path, peft_model(), callback(sigma=0.0), **saving)
    zero.train(resume_from_checkpoint=checkpoint)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FlatLoraCallback"]["args"]["sigma"] == 0


def test_a_run_of_another_length_is_warned_about(
    peft_model: MakeModel, tmp_path: Path, checkpoint: str
) -> None:
    trainer = make_trainer(tmp_path, peft_model(), callback(), num_train_epochs=3)
    with pytest.warns(UserWarning, match="a run of 6 steps, this one has 9"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert sigmas(trainer)[3:] == [sigma_at(step, 9, SIGMA) for step in range(3, 9)]


@pytest.mark.parametrize(
    ("at", "max_steps", "ends_at"),
    [
        (3, 1, 3),  # an epoch was complete: nothing is left to do
        (2, 1, 3),  # transformers looks at max_steps after a step
        (2, 2, 3),
    ],
)
@pytest.mark.filterwarnings("ignore:the checkpoint belongs to a run of 6 steps")
def test_a_run_that_is_over_when_it_resumes_ends_as_without_the_callback(
    peft_model: MakeModel, tmp_path: Path, checkpoints: Path, at: int, max_steps: int, ends_at: int
) -> None:
    trainer = make_trainer(tmp_path, peft_model(), callback(), max_steps=max_steps)
    trainer.train(resume_from_checkpoint=str(checkpoints / f"checkpoint-{at}"))
    assert trainer.state.global_step == ends_at
    added = [log for log in trainer.state.log_history if "loss" in log][at:]
    assert [log["flat_lora_sigma"] for log in added] == [0.0] * (ends_at - at)


def test_the_trainer_can_restore_the_callback_from_the_checkpoint(
    peft_model: MakeModel, tmp_path: Path, checkpoint: str
) -> None:
    trainer = make_trainer(
        tmp_path, peft_model(), FlatLoraCallback(), restore_callback_states_from_checkpoint=True
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    restored = trainer.pop_callback(FlatLoraCallback)
    assert isinstance(restored, FlatLoraCallback)
    assert restored.config == callback().config
    assert sigmas(trainer) == [sigma_at(step, 6, SIGMA) for step in range(6)]
