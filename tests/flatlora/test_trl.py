"""The callback in TRL's real ``SFTTrainer``."""

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
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # imported lazily by TRL

from flatlora import FlatLoraCallback, NoTargets, sigma_at
from tests.flatlora.phases import Phases, windows

MakeModel = Callable[..., PeftModel]

SIGMA = 0.2
WINDOWS = [4, 4, 2]  # ten micro-batches, four to a step


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
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
            "output_dir": str(tmp_path / name),
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "activation_checkpointing": False,  # transformers warns of TRL's default, an old name
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
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
