"""Several adapters on one model, adapters saved and loaded again, and what trains beside them."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from flatlora import UnsupportedLayer, find_targets
from flatlora.config import Memory
from tests.flatlora import moe
from tests.flatlora.adapting import (
    STEP,
    add,
    assert_noise_of_the_merged_weights,
    assert_same,
    engine,
    factors,
    linear_noise,
    step_of,
)

MakeBase = Callable[[str], nn.Module]
MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]

both_memories = pytest.mark.parametrize("memory", ["resident", "streamed"])
all_kinds = pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])


@pytest.fixture
def make_base(base_model: MakeBase) -> MakeBase:
    def make(kind: str) -> nn.Module:
        return moe.base_model(kind) if kind in moe.BASES else base_model(kind)

    return make


@pytest.fixture
def make_model(peft_model: MakeModel) -> MakeModel:
    def make(kind: str = "llama", **lora: Any) -> PeftModel:
        if kind not in moe.BASES:
            return peft_model(kind, **lora)
        return moe.adapted(moe.base_model(kind), **({"target_modules": ["q_proj"]} | lora))

    return make


def test_the_active_adapters_merged_norm_counts(make_model: MakeModel) -> None:
    model: Any = make_model()
    add(model, "other")
    first = engine(model)
    assert_noise_of_the_merged_weights(first)
    noise = linear_noise(first)
    model.set_adapter("other")
    second = engine(model)
    assert {target.adapter for target in second.targets} == {"other"}
    assert_noise_of_the_merged_weights(second)
    for name, value in linear_noise(second).items():  # the same normals, at another strength
        ratio = value.norm(dim=1) / noise[name].norm(dim=1)
        assert float(ratio.max()) > 1.1
        cosine = torch.cosine_similarity(value, noise[name], dim=1)
        assert float(cosine.min()) > 0.999


@all_kinds
def test_an_adapter_that_is_not_active_changes_nothing(
    make_model: MakeModel, make_batch: MakeBatch, kind: str
) -> None:
    alone, model = make_model(kind), make_model(kind)
    add(model, "other")
    assert_same(
        step_of(model, engine(model), make_batch()), step_of(alone, engine(alone), make_batch())
    )


@all_kinds
def test_a_switch_is_noticed_and_switching_back_is_enough(
    make_model: MakeModel, make_batch: MakeBatch, kind: str
) -> None:
    model: Any = make_model(kind)
    add(model, "other")
    flat = engine(model)
    before = step_of(model, flat, make_batch())
    model.set_adapter("other")
    with (
        pytest.raises(UnsupportedLayer, match="build the engine again") as caught,
        flat.perturbed(STEP),
    ):
        pytest.fail("the block was entered")
    assert list(caught.value.layers) == [target.name for target in flat.targets]
    model.set_adapter("default")
    assert_same(step_of(model, flat, make_batch()), before)


@both_memories
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_two_engines_train_two_adapters_in_turn(
    make_model: MakeModel, make_batch: MakeBatch, kind: str, memory: Memory
) -> None:
    """Each adapter goes the way that it goes alone, to the bit."""

    def fresh() -> PeftModel:
        model = make_model(kind)
        add(model, "other")
        return model

    def train(model: Any, names: list[str]) -> dict[str, Tensor]:
        engines, optimizers = {}, {}
        for name in names:
            model.set_adapter(name)
            engines[name] = engine(model, memory)
            adapter = [factor for t in engines[name].targets for factor in factors(t)]
            optimizers[name] = torch.optim.AdamW(adapter, lr=1e-2)
        for step in (1, 2, 3):
            for name in names:
                model.set_adapter(name)
                step_of(model, engines[name], make_batch(step), step)
                optimizers[name].step()
        return {
            key: value.detach().clone()
            for key, value in model.named_parameters()
            if any(f".{name}." in key for name in names)
        }

    both = train(fresh(), ["default", "other"])
    for name in ("default", "other"):
        for key, value in train(fresh(), [name]).items():
            assert torch.equal(both[key], value), key


@all_kinds
@both_memories
@pytest.mark.parametrize("how", ["disabled", "merged", "another"])
def test_inside_the_block_a_layer_without_its_adapter_is_clean(
    make_model: MakeModel, make_batch: MakeBatch, kind: str, memory: Memory, how: str
) -> None:
    """So the reference pass of a preference loss is what it would be outside."""
    model: Any = make_model(kind)
    add(model, "other")
    flat = engine(model, memory)

    @contextlib.contextmanager
    def without_adapter() -> Iterator[None]:
        if how == "disabled":
            with model.disable_adapter():
                yield
        elif how == "merged":
            model.merge_adapter()
            yield
            model.unmerge_adapter()
        else:
            model.set_adapter("other")
            yield
            model.set_adapter("default")

    def loss() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(**make_batch()).loss
            return out

    with without_adapter():
        expected = loss()
    adapted = loss()
    with flat.perturbed(STEP):
        noisy = loss()
        with without_adapter():
            found = loss()
        again = loss()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(again, noisy, rtol=1e-5, atol=0)  # merging rounds
    assert abs(float(noisy - adapted)) > 1e-4


@pytest.mark.parametrize("names", [["default", "elsewhere"], ("default",)])
def test_an_adapter_that_is_active_among_others_has_its_noise(
    make_model: MakeModel, make_batch: MakeBatch, names: Any
) -> None:
    model: Any = make_model(target_modules=["q_proj"])
    add(model, "elsewhere", target_modules=["k_proj"])
    flat = engine(model)
    expected = step_of(model, flat, make_batch())
    with flat.perturbed(STEP):
        for target in flat.targets:
            vars(target.layer)["_active_adapter"] = names
        assert torch.equal(model(**make_batch()).loss, expected[0])


def test_a_deleted_adapter_is_noticed(make_model: MakeModel) -> None:
    model: Any = make_model()
    add(model, "other")
    flat = engine(model)
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("default")
    with pytest.raises(UnsupportedLayer, match="build the engine again"), flat.perturbed(STEP):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_a_weighted_sum_of_adapters_is_an_adapter(make_model: MakeModel, combination: str) -> None:
    model: Any = make_model()
    add(model, "other", r=3)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", combination)
    model.set_adapter("sum")
    flat = engine(model)
    assert {len(target.lora_a) for target in flat.targets} == {6 if combination == "cat" else 3}
    assert_noise_of_the_merged_weights(flat)


def test_each_layers_rank_and_scaling_are_its_own(make_model: MakeModel) -> None:
    model = make_model(
        rank_pattern={"v_proj": 5}, alpha_pattern={"down_proj": 11}, use_rslora=True, lora_alpha=6
    )
    flat = engine(model)
    assert {len(target.lora_a) for target in flat.targets} == {3, 5}
    assert len({target.scaling for target in flat.targets}) == 3
    assert_noise_of_the_merged_weights(flat)


def test_a_scaling_that_changes_counts_from_the_next_step(make_model: MakeModel) -> None:
    model = make_model()
    flat = engine(model)
    before = linear_noise(flat)
    for target in flat.targets:
        layer: Any = target.layer
        layer.set_scale("default", 40)
    assert_noise_of_the_merged_weights(flat)
    after = linear_noise(flat)
    assert all(float((after[name] - before[name]).abs().max()) > 1e-4 for name in before)


@all_kinds
@both_memories
@pytest.mark.parametrize("name", ["default", "again"])
def test_a_saved_adapter_goes_on_with_the_same_noise(
    make_base: MakeBase,
    make_model: MakeModel,
    make_batch: MakeBatch,
    tmp_path: Path,
    kind: str,
    memory: Memory,
    name: str,
) -> None:
    model = make_model(kind)
    model.save_pretrained(str(tmp_path))
    expected = step_of(model, engine(model, memory), make_batch())
    loaded = PeftModel.from_pretrained(
        make_base(kind), tmp_path, adapter_name=name, is_trainable=True
    ).train()
    flat = engine(loaded, memory)
    assert {target.adapter for target in flat.targets} == {name}
    assert_same(step_of(loaded, flat, make_batch()), expected)


@all_kinds
def test_an_adapter_loaded_for_inference_has_the_same_noise(
    make_base: MakeBase, make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path, kind: str
) -> None:
    model = make_model(kind)
    model.save_pretrained(str(tmp_path))
    with engine(model).perturbed(STEP):
        expected = model(**make_batch()).loss
    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with engine(loaded).perturbed(STEP):
        assert torch.equal(loaded(**make_batch()).loss, expected)


@all_kinds
def test_a_base_that_was_unwrapped_can_be_wrapped_again(
    make_base: MakeBase, make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path, kind: str
) -> None:
    model: Any = make_model(kind)
    flat = engine(model)
    expected = step_of(model, flat, make_batch())
    model.save_pretrained(tmp_path)
    base = model.unload()
    pristine = make_base(kind).state_dict()
    assert base.state_dict().keys() == pristine.keys()
    assert all(torch.equal(value, pristine[name]) for name, value in base.state_dict().items())
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    assert_same(step_of(again, engine(again), make_batch()), expected)


@all_kinds
def test_a_name_is_the_same_in_a_model_around_the_model(
    make_model: MakeModel, make_batch: MakeBatch, kind: str
) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.student = inner

        def forward(self, **batch: Tensor) -> Any:
            return self.student(**batch)

    bare, outer = make_model(kind), Outer(make_model(kind))
    assert_same(
        step_of(outer, engine(outer), make_batch()), step_of(bare, engine(bare), make_batch())
    )


@both_memories
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_modules_that_are_saved_beside_the_adapter_train_without_noise(
    make_model: MakeModel, make_batch: MakeBatch, tmp_path: Path, kind: str, memory: Memory
) -> None:
    beside: Any = make_model(kind, modules_to_save=["lm_head"])
    flat = engine(beside, memory)
    plain = engine(make_model(kind), memory)
    assert [t.name for t in flat.targets] == [t.name for t in plain.targets]
    head = beside.get_submodule("base_model.model.lm_head")
    trained = head.modules_to_save["default"].weight
    unit = torch.eye(trained.shape[1])
    with flat.perturbed(STEP):
        assert torch.equal(head(unit).T, trained)
    base = {
        name: parameter.detach().clone()
        for name, parameter in beside.named_parameters()
        if not parameter.requires_grad
    }
    optimizer = torch.optim.AdamW([p for p in beside.parameters() if p.requires_grad], lr=1e-2)
    before = trained.detach().clone()
    for step in range(3):
        step_of(beside, flat, make_batch(step), step)
        optimizer.step()
    assert not torch.equal(trained, before)
    after = dict(beside.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_a_trained_bias_is_read_by_the_noisy_layer(
    make_model: MakeModel, make_batch: MakeBatch
) -> None:
    model = make_model("gpt2", bias="lora_only")
    flat = engine(model)
    _, gradients = step_of(model, flat, make_batch())
    assert gradients
    for target in flat.targets:
        bias = target.base.bias
        assert isinstance(bias, Tensor)
        assert bias.grad is not None
        with flat.perturbed(STEP), torch.no_grad():
            zero = torch.zeros(1, target.in_features)
            bias += 1
            assert torch.equal(target.base(zero)[0], bias)


def test_merging_ends_the_engine_and_a_new_adapter_begins_another(
    make_model: MakeModel, make_batch: MakeBatch
) -> None:
    model: Any = make_model()
    flat = engine(model)
    step_of(model, flat, make_batch())
    merged = model.merge_and_unload()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
    again = get_peft_model(copy.deepcopy(merged), lora)
    assert [t.name for t in find_targets(again)] == [t.name for t in flat.targets]
    assert_noise_of_the_merged_weights(engine(again))
