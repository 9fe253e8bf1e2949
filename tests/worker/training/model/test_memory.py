"""The estimate of memory against what torch, PEFT and the engine really keep."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from flatlora import FlatLora, FlatLoraConfig
from tests.worker.training.model.shapes import EIGHT_B, FOUR_B, LORA, ONE_B, SIZES, THREE_B, rank_16
from worker.training.batches import Batch
from worker.training.config import BaseModel, Lora
from worker.training.data.examples import Example
from worker.training.model.base import checkpoint_activations
from worker.training.model.head import answer_with_loss, summed_loss
from worker.training.model.lora import fast_adapters
from worker.training.model.memory import Estimate, estimate
from worker.training.model.shape import ModelShape, describe_model, shape_of
from worker.training.plan import Plan

GIB = 2**30
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "mistral": lambda: MistralConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16),
    "phi3": lambda: Phi3Config(**SIZES),
}
ROW = 96
PLAN = Plan(max_length=ROW, micro_batch_size=2)


def adapted(config: Any, lora: Lora, dtype: torch.dtype) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        base.requires_grad_(False)
        options = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            target_modules=lora.target_modules,
            lora_dropout=lora.dropout,
        )
        model = get_peft_model(base, options)
    assert isinstance(model, PeftModel)
    fast_adapters(model)
    answer_with_loss(base)
    return model.train()


def batch() -> Batch:
    """Two rows, one of them padded, so that attention is given a mask."""
    rows = [Example(np.arange(size) % 290, np.ones(size, bool)) for size in (ROW, ROW - 20)]
    return Batch.of([[row] for row in rows], torch.device("cpu"))


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[list[int]]:
    """Counts what autograd keeps in the block, each tensor's storage once, no weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def on_cpu(shape: ModelShape, plan: Plan, dtype: torch.dtype = torch.float32) -> Estimate:
    return estimate(shape, plan, dtype=dtype, on_gpu=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_exactly(family: str) -> None:
    model = adapted(FAMILIES[family](), LORA, torch.float32)
    weights = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    found = on_cpu(shape_of(FAMILIES[family](), LORA), PLAN)
    assert found.weights == sum(p.nbytes for p in weights)
    assert found.adapter == sum(4 * p.nbytes for p in trained)  # gradient and two moments


ATTENTION = replace(LORA, rank=16, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("family", "lora", "dtype"),
    [
        *((family, LORA, torch.bfloat16) for family in FAMILIES),
        ("llama", LORA, torch.float32),
        ("qwen3", LORA, torch.float32),
        ("llama", ATTENTION, torch.float32),
        ("llama", replace(LORA, dropout=0.1), torch.float32),
        ("gemma3", replace(ATTENTION, dropout=0.1), torch.bfloat16),
    ],
)
def test_activations_are_what_autograd_keeps(family: str, lora: Lora, dtype: torch.dtype) -> None:
    model = adapted(FAMILIES[family](), lora, dtype)
    with saved_bytes(model) as kept:
        summed_loss(model.get_base_model(), batch())
    found = on_cpu(shape_of(FAMILIES[family](), lora), PLAN, dtype)
    assert found.activations == pytest.approx(kept[0], rel=0.08)


def test_checkpointing_keeps_what_enters_each_layer_and_all_of_one() -> None:
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 12})
    model = adapted(config, LORA, torch.float32)
    checkpoint_activations(model.get_base_model(), on=True)
    with saved_bytes(model) as kept:
        summed_loss(model.get_base_model(), batch())
    plain = on_cpu(shape_of(LlamaConfig(**SIZES), LORA), PLAN).activations / 3
    found = on_cpu(shape_of(config, LORA), replace(PLAN, activation_checkpointing=True))
    streams = 12 * 2 * ROW * 64 * 4
    assert kept[0] >= streams
    assert found.activations == pytest.approx(streams + plain, rel=0.01)


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_noise_is_what_the_engine_allocates(memory: Any) -> None:
    model = adapted(LlamaConfig(**SIZES), LORA, torch.bfloat16)
    flat = FlatLora(model, FlatLoraConfig(0.1, 1, memory), total_steps=2)
    with flat.perturbed(1):
        noises = flat._perturbation._noises
        copies = [noise.copy.nbytes for noise in noises if noise.copy is not None]
        workspaces = [buffer.nbytes for buffer in noises[0]._workspace._buffers.values()]
        norms = [noise.std.nbytes + noise.square_norm().nbytes for noise in noises]
    found = on_cpu(
        shape_of(LlamaConfig(**SIZES), LORA),
        replace(PLAN, perturbation_memory=memory),
        torch.bfloat16,
    )
    assert found.noise == sum(copies) + sum(workspaces) + sum(norms)


MEASURED = [
    # config, sizes, length, rows, sigma, memory, checkpointing, quantisation, peak in GiB
    (LlamaConfig, EIGHT_B, 4096, 2, 0.0, "streamed", False, None, 49.99),
    (LlamaConfig, EIGHT_B, 4096, 2, 0.05, "streamed", False, None, 50.11),
    (LlamaConfig, EIGHT_B, 2048, 1, 0.05, "resident", False, None, 37.40),
    (LlamaConfig, EIGHT_B, 4096, 2, 0.0, "streamed", True, None, 18.94),
    (LlamaConfig, EIGHT_B, 2048, 1, 0.05, "streamed", False, "4bit", 14.81),
    (LlamaConfig, THREE_B, 4096, 2, 0.05, "resident", False, None, 31.24),
    (LlamaConfig, THREE_B, 4096, 2, 0.0, "streamed", True, None, 8.54),
    (LlamaConfig, THREE_B, 1024, 1, 0.05, "streamed", False, None, 9.02),
    (LlamaConfig, THREE_B, 2048, 2, 0.05, "streamed", False, "8bit", 13.72),
    (LlamaConfig, ONE_B, 4096, 2, 0.0, "streamed", False, None, 12.01),
    (LlamaConfig, ONE_B, 4096, 2, 0.05, "resident", False, None, 13.84),
    (LlamaConfig, ONE_B, 1024, 1, 0.05, "streamed", False, None, 3.86),
    (LlamaConfig, ONE_B, 4096, 2, 0.0, "streamed", True, None, 3.74),
    (Qwen3Config, FOUR_B, 4096, 2, 0.05, "resident", False, None, 45.36),
    (Qwen3Config, FOUR_B, 4096, 4, 0.05, "streamed", True, None, 12.95),
]
"""Highest allocations on an H100, rank 16 on all linear layers, every token in the loss."""


@pytest.mark.parametrize("point", MEASURED)
def test_estimates_are_near_what_a_gpu_has_shown(point: tuple[Any, ...]) -> None:
    config, sizes, length, rows, sigma, memory, checkpointing, bits, peak = point
    pytest.importorskip("liger_kernel")
    shape = replace(rank_16(config, sizes), quantization=bits)
    plan = Plan(
        length,
        rows,
        packing=True,
        varlen=True,
        activation_checkpointing=checkpointing,
        perturbation_memory=memory,
    )
    found = estimate(shape, plan, dtype=torch.bfloat16, on_gpu=True, is_perturbed=sigma > 0)
    assert found.total / GIB == pytest.approx(peak, rel=0.01)
    assert not found.is_rough


def test_every_concession_of_a_plan_needs_less() -> None:
    shape = rank_16(LlamaConfig, EIGHT_B)
    plan = Plan(4096, 4, packing=True, varlen=True, perturbation_memory="resident")
    lighter = [
        plan,
        replace(plan, micro_batch_size=2),
        replace(plan, micro_batch_size=2, perturbation_memory="streamed"),
        replace(
            plan,
            micro_batch_size=2,
            perturbation_memory="streamed",
            activation_checkpointing=True,
        ),
    ]
    totals = [estimate(shape, one, dtype=torch.bfloat16, on_gpu=True).total for one in lighter]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_more_targets_and_more_tokens_need_more() -> None:
    shape = rank_16(LlamaConfig, {**SIZES, "vocab_size": 256_000})
    plan = Plan(4096, 1, packing=True, varlen=True, activation_checkpointing=True)

    def total(tokens: int, targets: int) -> int:
        return estimate(
            shape,
            plan,
            dtype=torch.float32,
            on_gpu=False,
            tokens_per_pass=tokens,
            tokens_in_loss_per_pass=targets,
        ).total

    assert total(2048, 100) < total(4096, 100) < total(4096, 4096)


def test_sharded_weights_are_divided() -> None:
    shape = rank_16(LlamaConfig, EIGHT_B)
    how: dict[str, Any] = {"dtype": torch.bfloat16, "on_gpu": True}
    whole = estimate(shape, PLAN, **how)
    shared = estimate(shape, PLAN, shards=4, **how)
    assert whole.weights / 4 < shared.weights < whole.weights / 2


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, bos_token_id=1, eos_token_id=2),
        MixtralConfig(**SIZES, num_local_experts=4),
    ],
    ids=["gpt2", "mixtral"],
)
def test_another_architecture_is_estimated_roughly(config: Any) -> None:
    shape = shape_of(config, LORA)
    assert not shape.is_known
    found = estimate(shape, replace(PLAN, varlen=True), dtype=torch.bfloat16, on_gpu=True)
    assert found.is_rough
    assert "roughly" in found.in_words()
    assert found.activations > 0


def test_a_model_is_described_by_its_config_alone(tmp_path: Path) -> None:
    LlamaConfig(**EIGHT_B).save_pretrained(tmp_path)
    shape = describe_model(BaseModel("org/base", tmp_path), Lora(rank=16, alpha=32.0))
    assert shape is not None
    assert shape.parameters == 8_030_261_248
    assert len(shape.targets) == 7 * 32


@pytest.mark.parametrize(
    "config",
    [{"model_type": "of tomorrow"}, {}, {"model_type": "mamba", "num_hidden_layers": 2}],
    ids=["unknown", "empty", "mamba"],
)
def test_a_model_that_cannot_be_described_fails_nothing(tmp_path: Path, config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe_model(BaseModel("org/base", tmp_path), LORA) is None


def test_describing_a_model_draws_no_random_numbers(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    describe_model(BaseModel("org/base", tmp_path), LORA)
    assert torch.equal(before, torch.get_rng_state())


def test_an_estimate_is_told_in_words_and_numbers() -> None:
    found = Estimate(15 * GIB, GIB // 2, 0, 30 * GIB, GIB, 64 << 20)
    assert found.in_words() == (
        "about 46.6 GiB: weights 15.0 GiB, adapter 0.5 GiB, activations 31.0 GiB"
    )
    told = found.to_json()
    parts = [size for name, size in told.items() if name.endswith("_bytes")]
    assert sum(parts) == 2 * told["total_bytes"]
