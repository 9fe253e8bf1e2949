"""A base that two ranks share computes what one process computes, and its adapter stays whole."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flatlora import FlatLora, FlatLoraConfig
from tests.flatlora.ranks import Ranks as Processes
from tests.flatlora.ranks import ranks_of
from worker.training.batches import Batch
from worker.training.config import Resources, TrainingJob
from worker.training.data.examples import Example
from worker.training.errors import ConfigInvalid
from worker.training.model.base import attach_adapter, checkpoint_activations, load_base
from worker.training.model.head import answer_with_loss, scores, summed_loss
from worker.training.model.lora import fast_adapters
from worker.training.model.sharding import base_bytes, is_divided, shard
from worker.training.ranks import Ranks

CPU = torch.device("cpu")
STEPS = 4


class Found(NamedTuple):
    """What a step and an evaluation compute."""

    losses: list[float]
    gradients: dict[str, Tensor]
    logits: Tensor


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with ranks_of(2) as processes:
        yield processes


@pytest.fixture
def job(make_job: Callable[..., TrainingJob]) -> TrainingJob:
    return make_job(lora={"dropout": 0.0})


def batch(first: int) -> Batch:
    ids = np.arange(first, first + 20, dtype=np.int32) % 256
    return Batch.of([[Example(ids, np.arange(20) % 3 > 0)]], CPU)


def adapted(job: TrainingJob, sharded: str) -> PeftModel:
    base = load_base(job.base_model, CPU, torch.float32)
    base.get_submodule("model.norm").to(torch.bfloat16)  # types may be mixed
    answer_with_loss(base)
    if sharded == "before":
        shard(base, CPU, Ranks(CPU))
    model = attach_adapter(base, job)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(weight, std=0.05)
    fast_adapters(model)
    if sharded == "after":
        shard(model, CPU, Ranks(CPU))
    return model


def shards_of(base: nn.Module) -> str:
    """Hash of this rank's part of the base, all of which is sharded again."""
    digest = hashlib.sha256()
    for unit in base.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    for weight in base.parameters():
        if not weight.requires_grad:
            assert isinstance(weight, DTensor)
            digest.update(weight.to_local().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def found(job: TrainingJob, sharded: str = "", checkpointing: bool = False) -> Found:
    """Two passes under noise with an evaluation before and after, through the base and PEFT."""
    model = adapted(job, sharded)
    base = model.get_base_model()
    checkpoint_activations(base, on=checkpointing)
    flat = FlatLora(model, FlatLoraConfig(sigma=0.3, seed=1), STEPS)
    before = shards_of(base) if sharded else ""
    losses = [scores(base, batch(50)).loss.item()]
    if Ranks(CPU).is_first:
        get_peft_model_state_dict(model)  # as it saves the adapter
    with flat.perturbed(STEPS - 1, draw=0):
        for first in (0, 100):
            loss = summed_loss(base, batch(first))
            torch.autograd.backward(loss)
            losses.append(loss.item())
    losses.append(scores(base, batch(50)).loss.item())
    with torch.no_grad():
        logits = model(input_ids=batch(7).inputs["input_ids"]).logits
    if sharded:
        assert shards_of(base) == before
        assert flat.memory == "streamed"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {type(weight) for weight in trained.values()} == {nn.Parameter}
    return Found(losses, {n: p.grad for n, p in trained.items() if p.grad is not None}, logits)


@pytest.mark.parametrize(
    ("sharded", "checkpointing"), [("before", False), ("after", False), ("before", True)]
)
def test_it_computes_what_one_process_does_whenever_the_adapter_came(
    processes: Processes, job: TrainingJob, sharded: str, checkpointing: bool
) -> None:
    expected = found(job)
    for result in processes.call(found, job, sharded, checkpointing):
        assert result.losses == pytest.approx(expected.losses, rel=1e-6)
        assert result.losses[0] == result.losses[-1] != result.losses[1]
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-5, atol=1e-6)
        assert result.gradients.keys() == expected.gradients.keys()
        for name, gradient in result.gradients.items():
            scale = float(expected.gradients[name].abs().max())
            assert scale > 0
            torch.testing.assert_close(
                gradient, expected.gradients[name], rtol=1e-4, atol=1e-5 * scale, msg=name
            )


def sizes(job: TrainingJob) -> tuple[int, int, bool]:
    """Elements of the base here and in all, and whether the head is still the embedding."""
    base = load_base(job.base_model, CPU, torch.float32)
    whole = sum(weight.numel() for weight in base.parameters())
    shard(base, CPU, Ranks(CPU))
    weights: list[Any] = list(base.parameters())
    model: Any = base
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return sum(weight.to_local().numel() for weight in weights), whole, is_tied


def test_each_rank_keeps_its_part_alone_and_tied_weights_once(
    processes: Processes, job: TrainingJob
) -> None:
    (first, whole, is_tied), (second, *_) = processes.call(sizes, job)
    assert first + second == whole
    assert 0.45 < first / whole < 0.55
    assert is_tied


class TestChoice:
    @pytest.mark.parametrize(
        ("gpus", "strategy", "divided"),
        [(1, "auto", False), (2, "auto", False), (2, "ddp", False), (2, "fsdp", True)],
    )
    def test_it_is_the_jobs_and_a_cpu_holds_any_base_whole(
        self, job: TrainingJob, gpus: int, strategy: Any, divided: bool
    ) -> None:
        job = replace(job, resources=Resources(gpus, strategy))
        assert is_divided(job, CPU, torch.float32) == divided

    def test_one_process_shares_with_nobody(self, job: TrainingJob) -> None:
        job = replace(job, resources=Resources(1, "fsdp"))
        with pytest.raises(ConfigInvalid, match="divides the base among GPUs, and the job has one"):
            is_divided(job, CPU, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_size_of_a_base_is_known_before_it_is_loaded(
        self, job: TrainingJob, dtype: torch.dtype
    ) -> None:
        base = load_base(job.base_model, CPU, dtype)
        assert base_bytes(job.base_model, dtype) == sum(w.nbytes for w in base.parameters())


class TestRefusals:
    def test_a_model_that_does_not_name_its_layers(self) -> None:
        with pytest.raises(ConfigInvalid, match="Linear does not name its layers"):
            shard(nn.Linear(2, 2), CPU, Ranks(CPU))

    def test_a_quantised_base(self, job: TrainingJob) -> None:
        base = load_base(job.base_model, CPU, torch.float32)
        head: Any = base.get_submodule("model.layers.0.self_attn.q_proj")
        head.weight = nn.Parameter(head.weight.detach().to(torch.uint8), requires_grad=False)
        with pytest.raises(ConfigInvalid, match=r"quantised base \(torch.uint8\)"):
            shard(base, CPU, Ranks(CPU))
