"""Laws 1, 2 and 6: no byte of a base weight changes, and outside the block nothing is different."""

import contextlib
import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import (  # type: ignore[import-untyped]  # accelerate has no types
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from flatlora import AlreadyPerturbed, FlatLora, FlatLoraConfig, FlatLoraError
from flatlora.config import Memory
from tests.flatlora.models import base_hash

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]
STEPS = 4

both_memories = pytest.mark.parametrize("memory", ["resident", "streamed"])
both_kinds = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def engine(model: nn.Module, sigma: float = 0.1, memory: Memory = "resident") -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=sigma, seed=3, memory=memory), STEPS)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def train(model: PeftModel, flat: FlatLora | None, make_batch: MakeBatch) -> list[float]:
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-2)
    losses = []
    for step in range(STEPS):
        if flat is None:
            loss = loss_of(model, make_batch(step))
            torch.autograd.backward(loss)
        else:
            with flat.perturbed(step):
                loss = loss_of(model, make_batch(step))
                torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def forwards_left(flat: FlatLora) -> list[str]:
    return [t.name for t in flat.targets if {"forward", "_old_forward"} & vars(t.base).keys()]


@both_kinds
@both_memories
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_training_leaves_every_byte_of_the_base(
    peft_model: MakeModel, make_batch: MakeBatch, kind: str, memory: Memory, dtype: torch.dtype
) -> None:
    model = peft_model(kind, dtype=dtype)
    before = base_hash(model)
    flat = engine(model, memory=memory)
    train(model, flat, make_batch)
    assert base_hash(model) == before
    assert forwards_left(flat) == []


@both_memories
def test_autocast_outside_the_block_changes_no_noise(peft_model: MakeModel, memory: Memory) -> None:
    flat = engine(peft_model(), memory=memory)
    target = flat.targets[0]
    unit = torch.eye(target.weight.shape[1])

    def weights() -> Tensor:
        with flat.perturbed(STEPS - 1), torch.autocast("cpu", enabled=False), torch.no_grad():
            out: Tensor = target.base(unit)
            return out

    expected = weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weights(), expected)


@both_memories
def test_a_body_that_raises_leaves_the_base_and_no_forward(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory
) -> None:
    model = peft_model()
    before, clean = base_hash(model), loss_of(model, make_batch())
    flat = engine(model, memory=memory)
    with contextlib.suppress(KeyboardInterrupt), flat.perturbed(STEPS - 1):
        torch.autograd.backward(loss_of(model, make_batch()))
        raise KeyboardInterrupt
    assert base_hash(model) == before
    assert forwards_left(flat) == []
    assert torch.equal(loss_of(model, make_batch()), clean)
    with flat.perturbed(STEPS - 1):  # and the engine can go on
        assert not torch.equal(loss_of(model, make_batch()), clean)


@both_kinds
@both_memories
def test_sigma_zero_is_plain_lora_bit_for_bit(
    peft_model: MakeModel, make_batch: MakeBatch, kind: str, memory: Memory
) -> None:
    plain, flat = peft_model(kind), peft_model(kind)
    losses = train(plain, None, make_batch)
    assert train(flat, engine(flat, 0.0, memory), make_batch) == losses
    for (name, a), (_, b) in zip(plain.named_parameters(), flat.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_sigma_above_zero_is_not_plain_lora(peft_model: MakeModel, make_batch: MakeBatch) -> None:
    plain, flat = peft_model(), peft_model()
    losses = train(plain, None, make_batch)
    noisy = train(flat, engine(flat), make_batch)
    assert noisy[0] == losses[0]  # the schedule starts at zero
    assert noisy[1] != losses[1]


@pytest.mark.parametrize(
    ("sigma", "step"), [(0.0, STEPS - 1), (0.1, 0)], ids=["config", "schedule"]
)
def test_at_sigma_zero_no_layer_is_wrapped(peft_model: MakeModel, sigma: float, step: int) -> None:
    flat = engine(peft_model(), sigma)
    with flat.perturbed(step):
        assert forwards_left(flat) == []


@both_memories
def test_only_the_block_is_noisy(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory
) -> None:
    model = peft_model()
    clean = loss_of(model, make_batch())
    flat = engine(model, memory=memory)
    with flat.perturbed(STEPS - 1):
        noisy = loss_of(model, make_batch())
    assert not torch.equal(noisy, clean)
    assert torch.equal(loss_of(model, make_batch()), clean)


@both_memories
def test_saving_and_merging_see_the_base(peft_model: MakeModel, memory: Memory) -> None:
    model = peft_model()
    saved = copy.deepcopy(model.state_dict())
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    with engine(model, memory=memory).perturbed(STEPS - 1):
        inside = model.state_dict()
    assert inside.keys() == saved.keys()
    assert all(torch.equal(inside[name], saved[name]) for name in saved)
    after: dict[str, Any] = model.merge_and_unload().state_dict()
    assert all(torch.equal(after[name], merged[name]) for name in merged)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_entering_twice_is_an_error(peft_model: MakeModel, sigma: float) -> None:
    flat = engine(peft_model(), sigma)
    with flat.perturbed(2):
        with pytest.raises(AlreadyPerturbed, match="leave one perturbation"), flat.perturbed(2):
            pass
        assert len(forwards_left(flat)) == (0 if sigma == 0 else len(flat.targets))
    assert forwards_left(flat) == []


def test_entering_a_second_engine_is_an_error(peft_model: MakeModel) -> None:
    model = peft_model()
    first, second = engine(model), engine(model)
    with first.perturbed(2), pytest.raises(AlreadyPerturbed), second.perturbed(2):
        pass
    with second.perturbed(2):
        pass


@pytest.mark.parametrize("step", [-1, STEPS, STEPS + 1])
def test_a_step_outside_the_run_is_an_error(peft_model: MakeModel, step: int) -> None:
    with pytest.raises(ValueError, match=f"expected 0 <= step <= {STEPS - 1}"):
        engine(peft_model()).perturbed(step)


@pytest.mark.parametrize("draw", [-1, 2**32])
def test_a_draw_that_does_not_fit_is_an_error(peft_model: MakeModel, draw: int) -> None:
    with pytest.raises(ValueError, match="draw"), engine(peft_model()).perturbed(1, draw):
        pass


@both_memories
def test_a_hook_of_accelerate_stays_in_charge(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory
) -> None:
    class Count(ModelHook):  # type: ignore[misc]  # accelerate has no types
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    model, hook = peft_model(), Count()
    flat = engine(model, memory=memory)
    with flat.perturbed(2):
        expected = loss_of(model, make_batch())
    base = flat.targets[0].base
    add_hook_to_module(base, hook)
    before = dict(vars(base))
    with flat.perturbed(2):
        assert torch.equal(loss_of(model, make_batch()), expected)
    assert hook.calls == 1
    assert vars(base) == before
    remove_hook_from_module(base)
    assert "forward" in vars(base)  # accelerate leaves the class's own forward there
    with flat.perturbed(2):
        assert torch.equal(loss_of(model, make_batch()), expected)
    assert vars(base)["forward"] == before["_old_forward"]


@both_memories
def test_a_hook_of_accelerate_added_inside_the_block_is_there_after_it(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory
) -> None:
    model = peft_model()
    clean = loss_of(model, make_batch())
    flat = engine(model, memory=memory)
    base = flat.targets[0].base
    with flat.perturbed(2):
        noisy = loss_of(model, make_batch())
        add_hook_to_module(base, ModelHook())
        assert torch.equal(loss_of(model, make_batch()), noisy)
    assert torch.equal(loss_of(model, make_batch()), clean)
    with flat.perturbed(2):
        assert torch.equal(loss_of(model, make_batch()), noisy)
        remove_hook_from_module(base)
        assert torch.equal(loss_of(model, make_batch()), noisy)
    assert torch.equal(loss_of(model, make_batch()), clean)


@both_memories
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_perturbed_model_is_not_copied(peft_model: MakeModel, memory: Memory, how: str) -> None:
    copies: dict[str, Callable[[nn.Module], object]] = {
        "deepcopy": copy.deepcopy,
        "pickle": pickle.dumps,
        "save": lambda model: torch.save(model, io.BytesIO()),
    }
    model = peft_model()
    flat = engine(model, memory=memory)
    with flat.perturbed(2), pytest.raises(FlatLoraError, match="outside the block"):
        copies[how](model)
    copies[how](model)


def test_a_streamed_graph_whose_engine_is_gone_says_so(
    peft_model: MakeModel, make_batch: MakeBatch
) -> None:
    model = peft_model()
    flat = engine(model, memory="streamed")
    with flat.perturbed(2):
        loss = loss_of(model, make_batch())
    del flat
    gc.collect()
    with pytest.raises(FlatLoraError, match=r"the engine that perturbed .*\.down_proj is gone"):
        torch.autograd.backward(loss)


@both_memories
def test_float64_under_autocast_stays_float64(memory: Memory) -> None:
    lora = LoraConfig(r=2, target_modules=["0"])
    model: Any = get_peft_model(nn.Sequential(nn.Linear(8, 4)).double(), lora)
    flat = engine(model, memory=memory)
    base, x = flat.targets[0].base, torch.randn(3, 8, dtype=torch.float64)
    with flat.perturbed(2):
        expected = base(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = base(x)
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


@both_memories
def test_an_empty_batch_passes(peft_model: MakeModel, memory: Memory) -> None:
    flat = engine(peft_model("gpt2"), memory=memory)
    target = flat.targets[0]
    with flat.perturbed(2):
        out = target.base(torch.empty(0, 5, target.in_features))
    assert out.shape == (0, 5, target.weight.shape[1])


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_a_stale_graph_raises_instead_of_using_the_next_steps_noise(
    peft_model: MakeModel, make_batch: MakeBatch, memory: Memory
) -> None:
    model = peft_model()
    flat = engine(model, memory=memory)
    with flat.perturbed(2):
        loss = loss_of(model, make_batch())
    with flat.perturbed(3):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_a_streamed_graph_notices_a_base_weight_written_by_others(
    peft_model: MakeModel, make_batch: MakeBatch
) -> None:
    model = peft_model()
    flat = engine(model, memory="streamed")
    with flat.perturbed(2):
        loss = loss_of(model, make_batch())
        with torch.no_grad():
            flat.targets[-1].weight.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(loss)
