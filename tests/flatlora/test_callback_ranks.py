"""The callback in the real ``Trainer`` of two processes: with DDP, then with FSDP2."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from flatlora import FlatLora, FlatLoraCallback, FlatLoraConfig
from flatlora.linear import is_perturbed
from tests.flatlora.phases import Phases
from tests.flatlora.ranks import ranks_of

RANKS, STEPS, MICRO_BATCHES, BATCH = 2, 4, 2, 2
SIGMA, SEED = 0.3, 7


def make_model() -> PeftModel:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    assert isinstance(model, PeftModel)
    return model


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (STEPS * MICRO_BATCHES * RANKS * BATCH, 8)
    return list(torch.randint(61, shape, generator=generator))


def adamw(model: PeftModel) -> torch.optim.AdamW:
    adapter = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(adapter, lr=1e-2, weight_decay=0)


def weights(model: PeftModel, *, trained: bool) -> Tensor:
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad == trained]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    return torch.cat([p.detach().flatten() for p in whole])


def run_rank(folder: str) -> dict[str, Any]:
    """What a process sees that `torchrun` could have started."""
    rank = str(torch.distributed.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "0"}  # the group is there already
    warnings.simplefilter("ignore")  # of accelerate and of DDP, each of its own
    model = make_model()
    before = weights(model, trained=False).clone()
    optimizer = adamw(model)
    phases = Phases(model, optimizer)

    class Noise(TrainerCallback):
        of_steps: list[Tensor] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.of_steps.append(phases.noise())

    noise = Noise()
    train(Path(folder), model, noise, optimizer=optimizer)
    found = {
        "noise": torch.stack(noise.of_steps),
        "phases": phases.seen,
        "adapter": weights(model, trained=True),
        "base_is_untouched": torch.equal(weights(model, trained=False), before),
    }
    model = make_model()
    optimizer = adamw(model)
    phases = Phases(model, optimizer, is_noisy=is_perturbed)  # its weight is not whole at all times
    train(Path(folder), model, optimizer=optimizer, fsdp=True)
    return found | {
        "sharded_phases": phases.seen,
        "sharded_adapter": weights(model, trained=True),
        "sharded_base_is_untouched": torch.equal(weights(model, trained=False), before),
    }


def train(
    folder: Path,
    model: PeftModel,
    *callbacks: TrainerCallback,
    optimizer: torch.optim.Optimizer | None = None,
    **settings: Any,
) -> None:
    examples: Any = [{"input_ids": row, "labels": row} for row in rows()]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "run"),
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
            report_to="none",
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=MICRO_BATCHES,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            **settings,
        ),
        train_dataset=examples,
        eval_dataset=examples[:4],
        callbacks=[FlatLoraCallback(sigma=SIGMA, seed=SEED), *callbacks],
        optimizers=(optimizer, None),
    )
    trainer.train()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    with ranks_of(RANKS) as processes:
        return processes.call(run_rank, str(tmp_path_factory.mktemp("ranks")))


def test_each_rank_draws_its_own_noise(ranks: list[dict[str, Any]]) -> None:
    one, two = (rank["noise"] for rank in ranks)
    assert not one[0].any()  # the schedule starts at zero
    assert not two[0].any()
    for step in range(1, STEPS):
        assert one[step].any()
        correlation = torch.corrcoef(torch.stack([one[step].flatten(), two[step].flatten()]))
        assert abs(float(correlation[0, 1])) < 0.2


@pytest.mark.parametrize("prefix", ["", "sharded_"], ids=["ddp", "fsdp2"])
def test_noise_is_on_in_forward_and_backward_alone(
    ranks: list[dict[str, Any]], prefix: str
) -> None:
    for rank in ranks:
        phases = rank[f"{prefix}phases"]
        on = [noisy for phase, noisy in phases if phase in {"forward", "backward"}]
        off = [noisy for phase, noisy in phases if phase not in {"forward", "backward"}]
        assert on == [False] * 2 * MICRO_BATCHES + [True] * 2 * MICRO_BATCHES * (STEPS - 1)
        assert not any(off)
        assert {"optimizer", "evaluation"} <= {phase for phase, _ in phases}
    assert "saving" in {phase for phase, _ in ranks[0][f"{prefix}phases"]}


@pytest.mark.parametrize("prefix", ["", "sharded_"], ids=["ddp", "fsdp2"])
def test_the_adapter_is_that_of_a_loop_that_averages_the_draws(
    ranks: list[dict[str, Any]], prefix: str
) -> None:
    one, two = (rank[f"{prefix}adapter"] for rank in ranks)
    assert torch.equal(one, two)
    assert all(rank[f"{prefix}base_is_untouched"] for rank in ranks)
    torch.testing.assert_close(one, by_hand(draws=[0, 1]), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(one, by_hand(draws=[0, 0]), rtol=1e-4, atol=1e-6)


def by_hand(draws: list[int]) -> Tensor:
    """The adapter that one process trains, where each rank's batches meet one of the draws."""
    model = make_model()
    optimizer = adamw(model)
    flat = FlatLora(model, FlatLoraConfig(sigma=SIGMA, seed=SEED), total_steps=STEPS)
    batches = torch.stack(rows()).view(-1, BATCH, 8)  # dealt out to the ranks in turn
    for step in range(STEPS):
        window = batches[step * MICRO_BATCHES * RANKS :][: MICRO_BATCHES * RANKS]
        predicted = torch.tensor(sum(batch[:, 1:].numel() for batch in window))
        for rank, draw in enumerate(draws):
            with flat.perturbed(step, draw):
                for batch in window[rank::RANKS]:
                    loss = model(input_ids=batch, labels=batch, num_items_in_batch=predicted).loss
                    loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model, trained=True)
