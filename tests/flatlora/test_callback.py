"""The callback in the real ``Trainer``: the noise is where it belongs, and nowhere else."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from flatlora import (
    AlreadyPerturbed,
    EvaluatedWhilePerturbed,
    FlatLora,
    FlatLoraCallback,
    FlatLoraConfig,
    NoTargets,
    UnsupportedLayer,
    sigma_at,
)
from tests.flatlora.models import base_hash
from tests.flatlora.phases import Phases, windows
from tests.flatlora.trainers import (
    ACCUMULATION,
    BATCH,
    SEED,
    SIGMA,
    WINDOWS,
    Example,
    MakeModel,
    adamw,
    adapter,
    assert_same,
    callback,
    examples,
    make_trainer,
    sigmas,
)


class IteratedExamples(IterableDataset[Example]):
    def __iter__(self) -> Iterator[Example]:
        return iter(examples())


# Where the noise is


def test_the_noise_is_on_in_forward_and_backward_and_nowhere_else(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    model = peft_model()
    optimizer = adamw(model)
    phases = Phases(model, optimizer)
    before = base_hash(model)
    make_trainer(
        tmp_path,
        model,
        callback(),
        optimizer=optimizer,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=3,
    ).train()
    assert phases.training() == windows(WINDOWS * 2)  # the short window of each epoch included
    assert phases.of("evaluation") == {False}
    assert phases.of("saving") == {False}
    assert base_hash(model) == before
    assert not phases.noise().any()


def test_recomputed_activations_meet_the_noise_too(peft_model: MakeModel, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (True, False):
        model = peft_model()
        optimizer = adamw(model)
        phases = Phases(model, optimizer)
        make_trainer(
            tmp_path,
            model,
            callback(),
            optimizer=optimizer,
            activation_checkpointing=checkpointing,
            num_train_epochs=1,
        ).train()
        assert phases.training() == windows(WINDOWS, passes=1 + checkpointing)
        gradients.append(adapter(model))
    assert_same(*gradients)


@pytest.mark.parametrize("after", ["evaluation", "saving"])
def test_an_epoch_stopped_inside_a_window_leaves_no_noise(
    peft_model: MakeModel, tmp_path: Path, after: str
) -> None:
    class StopTheEpoch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_epoch_stop = state.global_step == 1

    model = peft_model()
    phases = Phases(model)
    each_epoch: dict[str, Any] = {
        "eval_strategy": "epoch" if after == "evaluation" else "no",
        "save_strategy": "epoch" if after == "saving" else "no",
    }
    make_trainer(tmp_path, model, callback(), StopTheEpoch(), **each_epoch).train()
    assert ("forward", True) in phases.seen
    assert phases.of(after) == {False}


def test_a_stream_that_ends_inside_a_window_leaves_no_noise(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    model = peft_model()
    phases = Phases(model)
    trainer = make_trainer(
        tmp_path,
        model,
        callback(),
        data=IteratedExamples(),
        max_steps=6,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    trainer.train()
    assert ("forward", True) in phases.seen
    assert phases.of("evaluation") == {False}
    assert phases.of("saving") == {False}
    assert not phases.noise().any()


class AsksForMore(Trainer):
    """Calls its model without gradients before it computes a loss, and for nothing once."""

    losses: list[tuple[float, float]] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            before = model(**inputs).loss
            with pytest.raises(ValueError, match="input_ids"):
                model()
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append((float(before), float(loss.detach()) * ACCUMULATION))
        return loss


def test_a_call_without_gradients_is_clean_and_the_next_one_noisy(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    losses = {}
    for sigma in (0.0, SIGMA):
        model = peft_model()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        trainer = make_trainer(
            tmp_path,
            model,
            callback(sigma),
            kind=AsksForMore,
            optimizer=optimizer,
            max_steps=2,
            train_sampling_strategy="sequential",
        )
        assert isinstance(trainer, AsksForMore)
        trainer.losses = []
        trainer.train()
        losses[sigma] = trainer.losses
    clean, noisy = losses[0.0], losses[SIGMA]
    assert [inference for inference, _ in noisy] == [inference for inference, _ in clean]
    assert noisy[:ACCUMULATION] == clean[:ACCUMULATION]
    differ = [a != b for (_, a), (_, b) in zip(noisy, clean, strict=True)]
    assert differ == [False] * ACCUMULATION + [True] * ACCUMULATION


# What is trained


def test_gradients_equal_those_of_a_loop_written_by_hand(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    model = peft_model()
    optimizer = adamw(model)
    found: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: found.append(gradients_of(model)))
    make_trainer(
        tmp_path,
        model,
        callback(),
        optimizer=optimizer,
        train_sampling_strategy="sequential",
        max_grad_norm=0,
    ).train()
    expected = by_hand(peft_model(), sizes=WINDOWS * 2)
    assert len(found) == len(expected)
    for ours, reference in zip(found, expected, strict=True):
        assert_same(ours, reference)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_hand(model: PeftModel, sizes: list[int]) -> list[dict[str, Tensor]]:
    optimizer = adamw(model)
    flat = FlatLora(model, FlatLoraConfig(sigma=SIGMA, seed=SEED), total_steps=len(sizes))
    rows, gradients = iter(examples() * 2), []
    for step, size in enumerate(sizes):
        batches = [torch.stack([next(rows)["labels"] for _ in range(BATCH)]) for _ in range(size)]
        predicted = sum(batch[:, 1:].numel() for batch in batches)
        with flat.perturbed(step):
            for batch in batches:
                loss = model(
                    input_ids=batch, labels=batch, num_items_in_batch=torch.tensor(predicted)
                ).loss
                loss.backward()
        gradients.append(gradients_of(model))
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def test_sigma_zero_is_plain_lora_bit_for_bit(peft_model: MakeModel, tmp_path: Path) -> None:
    plain, zero, flat = peft_model(), peft_model(), peft_model()
    make_trainer(tmp_path, plain).train()
    make_trainer(tmp_path, zero, callback(sigma=0.0)).train()
    make_trainer(tmp_path, flat, callback()).train()
    assert_same(adapter(zero), adapter(plain))
    with pytest.raises(AssertionError):
        assert_same(adapter(flat), adapter(plain))


def test_the_strength_is_logged(peft_model: MakeModel, tmp_path: Path) -> None:
    class Logs(TrainerCallback):
        sigmas: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.sigmas += [log for name, log in kwargs["logs"].items() if "sigma" in name]

    logs = Logs()
    trainer = make_trainer(tmp_path, peft_model(), callback(), logs, eval_strategy="epoch")
    trainer.train()
    assert sigmas(trainer) == [sigma_at(step, 6, SIGMA) for step in range(6)]
    assert logs.sigmas == sigmas(trainer)
    assert not any(
        "flat_lora_sigma" in log for log in trainer.state.log_history if "loss" not in log
    )


# Never silent


def test_a_model_without_lora_is_refused_before_the_first_step(
    base_model: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, base_model("llama"), callback())
    with pytest.raises(NoTargets):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_layer_that_cannot_be_perturbed_is_refused_before_the_first_step(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, peft_model(use_dora=True), callback())
    with pytest.raises(UnsupportedLayer, match="Dora"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_copies_by_data_parallel_are_refused(peft_model: MakeModel, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, peft_model(), callback())
    trainer.args._n_gpu = 2  # on the CPU torch's wrapper passes calls through
    with pytest.raises(UnsupportedLayer, match="torchrun"):
        trainer.train()


def test_a_quantised_model_is_not_copied_by_data_parallel(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    model = peft_model()
    base: Any = model.get_base_model()
    base.is_loaded_in_4bit = True  # what transformers notes on it
    trainer = make_trainer(tmp_path, model, callback(), max_steps=2)
    trainer.args._n_gpu = 2
    trainer.train()
    assert trainer.model_wrapped is model
    assert sigmas(trainer) == [sigma_at(step, 2, SIGMA) for step in range(2)]


def test_two_callbacks_are_refused(peft_model: MakeModel, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, peft_model(), callback(), callback())
    with pytest.raises(AlreadyPerturbed, match="2 FlatLoraCallbacks"):
        trainer.train()


def test_an_evaluation_inside_a_step_is_an_error(peft_model: MakeModel, tmp_path: Path) -> None:
    class Evaluate(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer.evaluate()

    model = peft_model()
    phases = Phases(model)
    trainer = make_trainer(tmp_path, model, Evaluate(), callback())
    with pytest.raises(EvaluatedWhilePerturbed, match="inside optimizer step 0"):
        trainer.train()
    assert phases.of("evaluation") == {False}


def fuse(layer: nn.Module) -> None:
    """What fused LoRA kernels do: compute a layer from its weights, without calling it."""
    attention: Any = layer

    class Fused(nn.Module):
        def __init__(self, lora: Any) -> None:
            super().__init__()
            self.lora = lora

        def forward(self, x: Tensor) -> Tensor:
            update = self.lora.lora_B["default"].weight @ self.lora.lora_A["default"].weight
            return nn.functional.linear(x, self.lora.base_layer.weight + update)

    for name in ("q_proj", "v_proj"):
        setattr(attention, name, Fused(getattr(attention, name)))


def test_fused_code_that_goes_around_all_targets_is_an_error(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    model = peft_model(target_modules=["q_proj", "v_proj"])
    for module in [*model.modules()]:
        if type(module).__name__ == "LlamaAttention":
            fuse(module)
    trainer = make_trainer(tmp_path, model, callback())
    with pytest.raises(UnsupportedLayer, match="fused"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_fused_code_that_goes_around_some_targets_is_warned_about(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    model = peft_model()
    fuse(next(m for m in model.modules() if type(m).__name__ == "LlamaAttention"))
    trainer = make_trainer(tmp_path, model, callback())
    with pytest.warns(UserWarning, match="2 of 6 targets were not called"):
        trainer.train()


def test_the_engine_and_its_copies_go_when_training_ends(
    peft_model: MakeModel, tmp_path: Path
) -> None:
    flat = callback()
    trainer = make_trainer(tmp_path, peft_model(), flat)
    trainer.train()
    assert flat.total_steps == 6
    assert flat._flat is None
    trainer.train()  # and it can be used again


def test_all_faults_of_the_arguments_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"sigma .*; seed .*"):
        FlatLoraCallback(sigma=-1.0, seed=-1)
