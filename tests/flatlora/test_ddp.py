"""DDP: every rank draws its own noise, and gradients are averaged over the ranks' draws.

The functions that run on the ranks get a model, so that one process can do the same with a copy.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatlora import FlatLora, FlatLoraConfig
from flatlora.config import Memory
from tests.flatlora.ranks import Ranks, ranks_of

MakeModel = Callable[..., PeftModel]
Batch = dict[str, Tensor]
MakeBatch = Callable[..., Batch]
STEPS = 4

both_memories = pytest.mark.parametrize("memory", ["resident", "streamed"])


class Found(NamedTuple):
    """What a step computes: the logits of its micro-batches, and the adapter's gradients."""

    logits: list[Tensor]
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with ranks_of(2) as ranks:
        yield ranks


@pytest.fixture
def model(peft_model: MakeModel) -> PeftModel:
    return peft_model(dtype=torch.float64)


def engine(model: nn.Module, memory: Memory = "streamed") -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=0.3, seed=3, memory=memory), STEPS)


def step(
    model: nn.Module, flat: FlatLora, batches: list[Batch], draw: int | None = None, at: int = 3
) -> Found:
    """An optimizer step without the optimizer; DDP's ranks meet at its last micro-batch."""
    logits = []
    with flat.perturbed(at, draw):
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with contextlib.ExitStack() as stack:
                if isinstance(model, DistributedDataParallel) and not is_last:
                    stack.enter_context(model.no_sync())
                output = model(**batch)
                torch.autograd.backward(output.loss)
            logits.append(output.logits.detach())
    return Found(logits, gradients_of(model))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name.removeprefix("module."): gradient.clone() for name, gradient in found.items()}


def ddp_step(
    model: PeftModel, batches: list[Batch], memory: Memory, checkpointing: str | None = None
) -> Found:
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    parallel = DistributedDataParallel(model)
    return step(parallel, engine(parallel, memory), batches)


def assert_mean_of_draws(results: list[Found], model: PeftModel, batches: list[Batch]) -> None:
    """Compare ranks with runs of one process each, which take one rank's draw after another."""
    alone = []
    for rank in range(len(results)):
        single = copy.deepcopy(model)
        alone.append(step(single, engine(single), batches, draw=rank))
    for result, expected in zip(results, alone, strict=True):
        assert all(map(torch.equal, result.logits, expected.logits))
        assert result.gradients.keys() == expected.gradients.keys()
        for name, gradient in result.gradients.items():
            mean = sum(found.gradients[name] for found in alone) / len(alone)
            torch.testing.assert_close(gradient, mean, rtol=1e-12, atol=1e-15, msg=name)
    assert not torch.equal(results[0].logits[0], results[1].logits[0])


@both_memories
def test_each_rank_has_its_own_draw_and_gradients_are_their_mean(
    ranks: Ranks, model: PeftModel, make_batch: MakeBatch, memory: Memory
) -> None:
    batches = [make_batch()]
    assert_mean_of_draws(ranks.call(ddp_step, model, batches, memory), model, batches)


@both_memories
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_recomputation_in_the_backward_pass_meets_the_ranks_own_noise(
    ranks: Ranks, model: PeftModel, make_batch: MakeBatch, memory: Memory, checkpointing: str
) -> None:
    batches = [make_batch()]
    results = ranks.call(ddp_step, model, batches, memory, checkpointing)
    assert_mean_of_draws(results, model, batches)


@both_memories
def test_micro_batches_accumulate_without_a_word_to_other_ranks(
    ranks: Ranks, model: PeftModel, make_batch: MakeBatch, memory: Memory
) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    assert_mean_of_draws(ranks.call(ddp_step, model, batches, memory), model, batches)


def train(model: PeftModel, batches: list[Batch]) -> tuple[dict[str, Tensor], bool]:
    """Adapter after a step for each of this rank's batches, and whether the base is untouched."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    parallel = DistributedDataParallel(model)
    flat = engine(parallel)
    adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.values(), lr=1e-2)
    for at, batch in enumerate(batches):
        step(parallel, flat, [batch], at=at)
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    untouched = all(torch.equal(after[name], weight) for name, weight in before.items())
    return {name: parameter.detach() for name, parameter in adapter.items()}, untouched


def test_ranks_stay_in_step_and_no_base_weight_changes(
    ranks: Ranks, model: PeftModel, make_batch: MakeBatch
) -> None:
    batches = [make_batch(seed) for seed in range(STEPS)]
    (first, untouched), (second, also_untouched) = ranks.call(train, model, batches)
    assert untouched
    assert also_untouched
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name])
        assert not torch.equal(parameter, model.get_parameter(name))


def names_and_draws(model: PeftModel, batch: Batch) -> tuple[list[str], bool]:
    """Names of the targets under DDP, and whether a draw of one's own choice is shared."""
    parallel = DistributedDataParallel(model)
    flat = engine(parallel)
    with flat.perturbed(3, draw=7), torch.no_grad():
        logits = parallel(**batch).logits
    others = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(others, logits)
    return [target.name for target in flat.targets], all(torch.equal(o, logits) for o in others)


def test_ddp_keeps_the_layers_names_and_a_draw_that_is_given(
    ranks: Ranks, model: PeftModel, make_batch: MakeBatch
) -> None:
    expected = [target.name for target in engine(model).targets]
    for names, is_shared in ranks.call(names_and_draws, model, make_batch()):
        assert names == expected
        assert is_shared
