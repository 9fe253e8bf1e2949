"""Laws 1, 3, 4 and 6 for parameters that PEFT adapts through ``target_parameters``: experts."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from flatlora import (
    AlreadyPerturbed,
    FlatLora,
    find_targets,
    sigma_at,
)
from flatlora.config import Memory
from flatlora.ops import Stream, noise_key
from flatlora.ops.reference import standard_normals
from tests.flatlora.models import base_hash
from tests.flatlora.moe import (
    BASES,
    DRAW,
    SEED,
    SIGMA,
    STEP,
    STEPS,
    One,
    adapted,
    base_model,
    engine,
    loss_of,
    moe,
    traces_left,
)

MakeBatch = Callable[..., dict[str, Tensor]]

both_memories = pytest.mark.parametrize("memory", ["resident", "streamed"])
both_kinds = pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])


def seen_by_the_experts(
    model: nn.Module, flat: FlatLora, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Every adapted parameter as its module reads it in a forward pass."""
    seen: dict[str, Tensor] = {}
    targets = [t for t in flat.targets if type(t.layer) is ParamWrapper]

    def look(module: nn.Module, *_: Any) -> None:
        for target in targets:
            if target.base is module:
                layer: Any = target.layer
                seen[target.name] = getattr(module, layer.parameter_name).detach().clone()

    hooks = [module.register_forward_pre_hook(look) for module in {t.base for t in targets}]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(targets)
    return seen


def noise_of(
    model: nn.Module, flat: FlatLora, batch: dict[str, Tensor], step: int = STEP
) -> dict[str, Tensor]:
    clean = seen_by_the_experts(model, flat, batch)
    with flat.perturbed(step, DRAW):
        noisy = seen_by_the_experts(model, flat, batch)
    return {name: noisy[name].double() - clean[name].double() for name in clean}


@both_kinds
@both_memories
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_leaves_every_byte_of_the_base(
    make_batch: MakeBatch, kind: str, memory: Memory, dtype: torch.dtype
) -> None:
    model = adapted(base_model(kind).to(dtype), target_modules=["q_proj"])
    before, keys = base_hash(model), model.state_dict().keys()
    flat = engine(model, memory)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        with flat.perturbed(step):
            torch.autograd.backward(loss_of(model, make_batch(step)))
            assert {*model.state_dict()} == {*keys}
        optimizer.step()
        optimizer.zero_grad()
    assert base_hash(model) == before
    assert traces_left(flat) == []
    assert {*model.state_dict()} == {*keys}


@both_memories
def test_a_body_that_raises_amid_a_forward_leaves_the_base_and_no_trace(
    make_batch: MakeBatch, memory: Memory
) -> None:
    model = moe("mixtral")
    before, clean = base_hash(model), loss_of(model, make_batch())
    flat = engine(model, memory)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = next(t for t in flat.targets if "experts" in t.name).base.register_forward_hook(
        interrupt
    )
    with contextlib.suppress(KeyboardInterrupt), flat.perturbed(STEP):
        loss_of(model, make_batch())
        pytest.fail("the forward was not interrupted")
    hook.remove()
    assert base_hash(model) == before
    assert traces_left(flat) == []
    assert torch.equal(loss_of(model, make_batch()), clean)
    with flat.perturbed(STEP):  # and the engine can go on
        assert not torch.equal(loss_of(model, make_batch()), clean)


@both_kinds
@both_memories
def test_only_the_block_is_noisy(make_batch: MakeBatch, kind: str, memory: Memory) -> None:
    model = moe(kind, target_modules=[])
    clean, saved = loss_of(model, make_batch()), copy.deepcopy(model.state_dict())
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    flat = engine(model, memory)
    with flat.perturbed(STEP):
        assert not torch.equal(loss_of(model, make_batch()), clean)
        inside = model.state_dict()
    assert all(torch.equal(inside[name], saved[name]) for name in saved)
    model.eval()
    assert torch.equal(loss_of(model, make_batch()), clean)
    after = model.merge_and_unload().state_dict()
    assert after.keys() == merged.keys()
    assert all(torch.equal(after[name], merged[name]) for name in merged)


@both_memories
def test_without_the_adapter_no_parameter_is_noisy(make_batch: MakeBatch, memory: Memory) -> None:
    """As in a linear layer: the noise belongs to the adapter that was found."""
    model = moe("mixtral", target_modules=[])
    flat = engine(model, memory)
    adapted_alone = seen_by_the_experts(model, flat, make_batch())
    with model.disable_adapter():
        clean = seen_by_the_experts(model, flat, make_batch())
    with flat.perturbed(STEP, DRAW):
        with model.disable_adapter():
            inside = seen_by_the_experts(model, flat, make_batch())
        noisy = seen_by_the_experts(model, flat, make_batch())
    assert traces_left(flat) == []
    for name, weight in clean.items():
        assert torch.equal(inside[name], weight)
        assert float((noisy[name] - adapted_alone[name]).std()) > 1e-3


@both_memories
def test_the_noise_of_each_expert_row_has_its_own_strength(
    make_batch: MakeBatch, memory: Memory
) -> None:
    for kind in BASES:
        base = base_model(kind)
        scale = torch.rand(4, 1, 1, generator=torch.Generator().manual_seed(3)) + 0.5
        for name, parameter in base.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                parameter.data *= scale
        model = adapted(base)
        flat = engine(model, memory)
        noise = noise_of(model, flat, make_batch())
        merged = seen_by_the_experts(model, flat, make_batch())
        normals = []
        for name, value in noise.items():
            inputs = 1 if kind == "gpt_oss" else 2
            features = value.shape[inputs]
            norm = merged[name].double().norm(dim=inputs, keepdim=True)
            std = sigma_at(STEP, STEPS, SIGMA) / math.sqrt(features) * norm
            normals.append(value / std)
            z = standard_normals(
                Stream(noise_key(SEED, name), STEP, DRAW), 0, value.numel(), value.device
            ).view(value.shape)
            torch.testing.assert_close(normals[-1], z.double(), rtol=1e-4, atol=1e-4)
        assert_normal(torch.cat([value.flatten() for value in normals]))
        for value in normals:
            for expert in value:
                assert_normal(expert.flatten())


def assert_normal(z: Tensor) -> None:
    """Mean, variance and kurtosis within five standard errors."""
    count = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(z.pow(4).mean()) - 3) < 5 * math.sqrt(96 / count)


@both_kinds
def test_experts_parameters_layers_and_steps_have_noise_of_their_own(
    make_batch: MakeBatch, kind: str
) -> None:
    model = moe(kind, target_modules=[])
    flat = engine(model)
    noise = noise_of(model, flat, make_batch())
    later = noise_of(model, flat, make_batch(), STEP + 1)
    parts = [expert.flatten() for value in (*noise.values(), *later.values()) for expert in value]
    size = min(map(len, parts))
    together = nn.functional.normalize(torch.stack([part[:size] for part in parts]), dim=1)
    cosines = (together @ together.T).fill_diagonal_(0)
    assert float(cosines.abs().max()) < 5 / math.sqrt(size)


def test_the_noise_does_not_depend_on_what_else_is_adapted(make_batch: MakeBatch) -> None:
    def noise(**options: Any) -> dict[str, Tensor]:
        model = moe("mixtral", **options)
        for target in find_targets(model):
            layer: Any = target.layer
            nn.init.zeros_(layer.lora_B["default"].weight)
        return noise_of(model, engine(model), make_batch())

    some = noise(target_parameters=["experts.down_proj"])
    more = noise(target_modules=["q_proj", "k_proj"])
    assert len(some) == 2
    for name, value in some.items():
        torch.testing.assert_close(more[name], value, rtol=0, atol=1e-6)


@both_memories
def test_autocast_changes_no_noise(make_batch: MakeBatch, memory: Memory) -> None:
    model = moe("mixtral")
    flat = engine(model, memory)
    expected = noise_of(model, flat, make_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = noise_of(model, flat, make_batch())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), flat.perturbed(STEP):
        torch.autograd.backward(loss_of(model, make_batch()))


@pytest.mark.parametrize("sigma", [0.0, SIGMA])
def test_entering_twice_or_a_second_engine_is_an_error(sigma: float) -> None:
    model = moe("mixtral", target_modules=[])
    first, second = engine(model, sigma=sigma), engine(model)
    with first.perturbed(STEP):
        with pytest.raises(AlreadyPerturbed), first.perturbed(STEP):
            pass
        if sigma > 0:
            with pytest.raises(AlreadyPerturbed), second.perturbed(STEP):
                pass
            assert len(traces_left(first)) == len(first.targets)
    assert traces_left(first) == []


def test_a_tied_parameter_is_noisy_in_its_target_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.right.weight = self.left.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x), self.right(x)], dim=-1)

    model = adapted(One(Tied()), target_parameters=["left.weight"])
    tied, x = model.get_submodule("base_model.model.experts"), torch.eye(8)
    clean = tied(x)
    with engine(model, "streamed").perturbed(STEP):
        noisy = tied(x)
    assert not torch.equal(noisy[:, :8], clean[:, :8])
    assert torch.equal(noisy[:, 8:], clean[:, 8:])
