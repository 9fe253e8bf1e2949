"""The callback in a ``Trainer`` that an exception ended, of which no event tells."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from flatlora import FlatLoraCallback, sigma_at
from flatlora.config import Memory
from tests.flatlora.phases import Phases, windows
from tests.flatlora.trainers import (
    SIGMA,
    WINDOWS,
    MakeModel,
    callback,
    examples,
    make_trainer,
    sigmas,
)


class Memories(TrainerCallback):
    """How each step keeps its noisy weights; comes after the callback."""

    def __init__(self, flat: FlatLoraCallback) -> None:
        self.flat = flat
        self.seen: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.flat._flat is not None
        self.seen.append(self.flat._flat.memory)


class Interrupt(TrainerCallback):
    """Raises in the backward pass of the second micro-batch of step 2, once."""

    def __init__(self, model: nn.Module, error: BaseException | None = None) -> None:
        self.error = error or KeyboardInterrupt()
        self.raising = False
        self.done = False
        trained: Any = next(p for p in model.parameters() if p.requires_grad)
        trained.register_hook(self._raise)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.raising = state.global_step == 2 and not self.done

    def _raise(self, _: Tensor) -> None:
        if self.raising:
            self.raising, self.done = False, True
            raise self.error


@pytest.fixture
def interrupted(peft_model: MakeModel, tmp_path: Path) -> tuple[PeftModel, Trainer, Phases]:
    model = peft_model(task_type="CAUSAL_LM")
    phases = Phases(model)
    trainer = make_trainer(tmp_path, model, callback(), Interrupt(model))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert phases.noise().any()  # nothing has told the callback
    phases.seen.clear()
    return model, trainer, phases


Interrupted = tuple[PeftModel, Trainer, Phases]


def test_evaluation_after_an_interruption_is_clean(interrupted: Interrupted) -> None:
    _, trainer, phases = interrupted
    loss = trainer.evaluate()["eval_loss"]
    assert phases.of("evaluation") == {False}
    assert not phases.noise().any()
    assert trainer.evaluate()["eval_loss"] == loss


def test_generation_after_an_interruption_is_clean(interrupted: Interrupted) -> None:
    model: Any = interrupted[0]
    phases = interrupted[2]
    model.eval().generate(torch.tensor([[1, 2]]), max_new_tokens=2, pad_token_id=0)
    assert phases.of("evaluation") == {False}


def test_a_model_merged_after_an_interruption_is_clean(
    interrupted: Interrupted, peft_model: MakeModel
) -> None:
    model, _, _ = interrupted
    expected = peft_model(task_type="CAUSAL_LM").eval()
    expected.load_state_dict(model.state_dict())
    batch = examples(1)[0]["input_ids"][None]
    merged = model.eval().merge_and_unload()
    torch.testing.assert_close(merged(batch).logits, expected(batch).logits)


def test_the_trainer_trains_again_after_an_interruption(
    interrupted: Interrupted, peft_model: MakeModel, tmp_path: Path
) -> None:
    _, trainer, phases = interrupted
    trainer.train()
    assert trainer.state.global_step == 6
    assert phases.training() == [p for p in windows(WINDOWS * 2) if p[0] != "optimizer"]


def test_another_trainer_trains_the_model_after_an_interruption(
    interrupted: Interrupted, tmp_path: Path
) -> None:
    model, _, phases = interrupted
    make_trainer(tmp_path, model, callback()).train()
    assert phases.training() == [p for p in windows(WINDOWS * 2) if p[0] != "optimizer"]


def test_closing_after_an_interruption_takes_the_noise_off(interrupted: Interrupted) -> None:
    _, trainer, phases = interrupted
    flat = trainer.pop_callback(FlatLoraCallback)
    assert isinstance(flat, FlatLoraCallback)
    flat.close()
    assert not phases.noise().any()
    flat.close()


@pytest.mark.parametrize(("memory", "then"), [("auto", "streamed"), ("resident", "resident")])
def test_a_run_restarted_with_smaller_batches_streams_and_follows_its_own_schedule(
    peft_model: MakeModel, tmp_path: Path, memory: Memory, then: str
) -> None:
    model = peft_model()
    phases = Phases(model)
    flat = FlatLoraCallback(sigma=SIGMA, memory=memory)
    memories = Memories(flat)
    out_of_memory = Interrupt(model, torch.OutOfMemoryError("CUDA out of memory."))
    trainer = make_trainer(
        tmp_path,
        model,
        flat,
        memories,
        out_of_memory,
        auto_find_batch_size=True,
        num_train_epochs=1,
    )
    trainer.train()
    assert out_of_memory.done
    assert memories.seen == ["resident"] * 3 + [then] * 5
    assert trainer.state.max_steps == 5
    assert sigmas(trainer) == [sigma_at(step, 5, SIGMA) for step in range(5)]
    assert not phases.noise().any()


@pytest.mark.gpu
def test_training_after_the_gpus_memory_ran_out_streams(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    class Exhaust(Interrupt):
        def _raise(self, _: Tensor) -> None:
            if self.raising:
                self.raising, self.done = False, True
                torch.empty(2**50, device="cuda")

    model, flat = peft_model(), callback()
    memories, exhaust = Memories(flat), Exhaust(model)
    trainer = make_trainer(tmp_path, model, flat, memories, exhaust, use_cpu=False)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    trainer.train()
    assert memories.seen == ["resident"] * 3 + ["streamed"] * 6


def test_the_noise_of_one_model_outlives_the_training_of_another(
    interrupted: Interrupted, peft_model: MakeModel, tmp_path: Path
) -> None:
    make_trainer(tmp_path, peft_model(), callback()).train()
    assert interrupted[2].noise().any()
