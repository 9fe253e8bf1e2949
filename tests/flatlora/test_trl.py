"""The callback in TRL's real ``SFTTrainer``, ``DPOTrainer`` and ``GRPOTrainer``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset  # type: ignore[import-untyped]  # it has no types
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import (  # type: ignore[attr-defined]  # imported lazily by TRL
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)

from flatlora import FlatLoraCallback, NoTargets, sigma_at
from tests.flatlora.phases import Phases, windows
from tests.flatlora.trainers import MakeModel, shorten_collections

SIGMA = 0.2
WINDOWS = [4, 4, 2]  # ten micro-batches, four to a step
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "activation_checkpointing": False,  # transformers warns of TRL's default, an old name
    "learning_rate": 1e-2,
    "logging_steps": 1,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    shorten_collections()
    words = dict(zip(["<pad>", "</s>", *"abcdefgh"], range(10), strict=True))
    model = Tokenizer(WordLevel(words))
    model.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)  # type: ignore[no-untyped-call]


@pytest.fixture
def make_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., SFTTrainer]:
    def make(
        model: Any,
        *callbacks: FlatLoraCallback,
        name: str = "run",
        optimizer: torch.optim.Optimizer | None = None,
        lora: LoraConfig | None = None,
        **changes: Any,
    ) -> SFTTrainer:
        settings: dict[str, Any] = {
            **COMMON,
            "output_dir": str(tmp_path / name),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "num_train_epochs": 2,
            "save_strategy": "epoch",
            "max_length": 16,
        }
        rows = [{"prompt": "a b c", "completion": f" {x} e {y}"} for x in "abde" for y in "abcde"]
        return SFTTrainer(
            model,
            SFTConfig(**settings | changes),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )

    return make


MakeTrainer = Callable[..., SFTTrainer]


def adapter(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_noise_is_on_in_forward_and_backward_and_nowhere_else(
    peft_model: MakeModel, make_trainer: MakeTrainer, checkpointing: bool
) -> None:
    model = peft_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    phases = Phases(model, optimizer)
    trainer = make_trainer(
        model,
        FlatLoraCallback(sigma=SIGMA),
        optimizer=optimizer,
        activation_checkpointing=checkpointing,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    assert phases.training() == windows(WINDOWS * 2, passes=1 + checkpointing)
    assert phases.of("evaluation") == {False}
    assert phases.of("saving") == {False}
    logged = [log["flat_lora_sigma"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [sigma_at(step, 6, SIGMA) for step in range(6)]


def test_sigma_zero_is_plain_lora_bit_for_bit(
    peft_model: MakeModel, make_trainer: MakeTrainer
) -> None:
    plain, zero, flat = peft_model(), peft_model(), peft_model()
    make_trainer(plain).train()
    make_trainer(zero, FlatLoraCallback(sigma=0.0)).train()
    make_trainer(flat, FlatLoraCallback(sigma=SIGMA)).train()
    assert all(map(torch.equal, adapter(zero), adapter(plain)))
    assert not all(map(torch.equal, adapter(flat), adapter(plain)))


def test_a_resumed_run_ends_with_the_adapter_of_the_unbroken_one(
    peft_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    make_trainer(peft_model(), FlatLoraCallback(sigma=SIGMA)).train()
    resumed = make_trainer(peft_model(), FlatLoraCallback(sigma=SIGMA), name="resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    unbroken, again = (
        (tmp_path / name / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
        for name in ("run", "resumed")
    )
    assert again == unbroken


def test_it_perturbs_the_adapter_that_the_trainer_makes(
    base_model: Callable[[str], nn.Module], make_trainer: MakeTrainer
) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    flat = FlatLoraCallback(sigma=SIGMA)
    trainer = make_trainer(base_model("llama"), flat, lora=lora)
    model: Any = trainer.model
    phases = Phases(model)
    trainer.train()
    assert phases.of("forward") == {False, True}


def test_training_all_weights_is_refused_before_the_first_step(
    base_model: Callable[[str], nn.Module], make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(base_model("llama"), FlatLoraCallback(sigma=SIGMA))
    with pytest.raises(NoTargets):
        trainer.train()
    assert trainer.state.global_step == 0


# What is not differentiated


class Calls:
    """Notes each call of the model: whether gradients are asked for, its noise and its output."""

    def __init__(self, model: PeftModel) -> None:
        self.phases = Phases(model)
        self.seen: list[tuple[bool, bool]] = []
        self.outputs: dict[bool, list[Tensor]] = {True: [], False: []}
        base: Any = model.get_base_model()
        decoder: nn.Module = base.model
        decoder.register_forward_hook(self._note)

    def _note(self, decoder: nn.Module, args: Any, output: Any) -> None:
        differentiated = torch.is_grad_enabled()
        self.seen.append((differentiated, bool(self.phases.noise().any())))
        self.outputs[differentiated].append(output.last_hidden_state.detach().clone())


def test_the_reference_of_dpo_is_clean_and_the_policy_is_not(
    peft_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pairs = [(x, y) for x in "abde" for y in "abcde"]
    rows = [{"prompt": "a b c", "chosen": f" {x} e", "rejected": f" {y} f"} for x, y in pairs]
    outputs = []
    for sigma in (0.0, SIGMA):
        model = peft_model(task_type="CAUSAL_LM")
        calls = Calls(model)
        DPOTrainer(
            model,
            args=DPOConfig(
                **COMMON,
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=2,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[FlatLoraCallback(sigma=sigma)],
        ).train()
        assert [noisy for grad, noisy in calls.seen if not grad] == [False] * 4
        assert [noisy for grad, noisy in calls.seen if grad] == [False] * 2 + [sigma > 0] * 2
        outputs.append(calls.outputs)
    clean, flat = outputs
    assert all(map(torch.equal, flat[False], clean[False]))
    assert list(map(torch.equal, flat[True], clean[True])) == [True] * 2 + [False] * 2


def test_the_generation_of_grpo_is_clean(
    peft_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [float(len(text)) for text in completions]

    model = peft_model(task_type="CAUSAL_LM")
    calls = Calls(model)
    GRPOTrainer(
        model,
        reward_funcs=reward,
        args=GRPOConfig(
            **COMMON,
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=3,
            max_steps=3,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": f"a b {x}"} for x in "abcdefgh"]),
        processing_class=tokenizer,
        callbacks=[FlatLoraCallback(sigma=SIGMA)],
    ).train()
    assert [noisy for grad, noisy in calls.seen if grad] == [False, True, True]
    generating = [noisy for grad, noisy in calls.seen if not grad]
    assert len(generating) >= 3 * 3  # steps, tokens
    assert not any(generating)
    assert calls.seen[-1] == (True, True)
