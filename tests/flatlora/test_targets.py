"""Law 7: what cannot be perturbed exactly is refused by name, all of it at once, before a step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from flatlora import FlatLora, FlatLoraConfig, NoTargets, UnsupportedLayer, find_targets

MakeModel = Callable[..., PeftModel]
MakeBase = Callable[[str], nn.Module]


class Mixed(nn.Module):
    """A layer of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.embedding = nn.Embedding(10, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.odd = Odd(8, 8)

    def forward(self, x: Any) -> Any:
        return self.linear(x)


def store_transposed(linear: Any) -> None:
    linear.weight.data = linear.weight.data.T.contiguous().T


class Odd(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def engine(model: nn.Module) -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=0.1), total_steps=4)


def test_every_layer_that_cannot_be_perturbed_is_named_with_its_reason() -> None:
    names = ["linear", "conv", "embedding", "normed", "odd"]
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=names))
    with pytest.raises(UnsupportedLayer) as caught:
        engine(model)
    assert list(caught.value.layers) == ["conv", "embedding", "normed", "odd"]
    message = str(caught.value)
    assert message.startswith("4 LoRA layers cannot be perturbed")
    for words in ("conv: ", "a convolution", "its rows are looked up", "parametrization", "Odd"):
        assert words in message


def test_variants_whose_merged_weight_is_another_are_refused_by_name(
    peft_model: MakeModel,
) -> None:
    with pytest.raises(UnsupportedLayer, match="DoraLinearVariant"):
        engine(peft_model(use_dora=True))


def test_adapters_that_are_no_lora_are_refused(base_model: MakeBase) -> None:
    model = get_peft_model(
        base_model("llama"),
        LoHaConfig(r=2, target_modules=["q_proj"], task_type=TaskType.CAUSAL_LM),
    )
    with pytest.raises(UnsupportedLayer, match="loha"):
        engine(model)


def test_a_model_without_lora_is_told_what_to_do(base_model: MakeBase) -> None:
    with pytest.raises(NoTargets, match="get_peft_model"):
        engine(base_model("llama"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda base: base.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda base: base.to("meta"), "meta device"),
        (lambda base: base.weight.requires_grad_(), "must be frozen"),
        (store_transposed, "not contiguous"),
    ],
    ids=["float8", "meta", "trainable", "strided"],
)
def test_weights_that_cannot_be_perturbed_are_refused(
    peft_model: MakeModel, spoil: Callable[[Any], object], reason: str
) -> None:
    model = peft_model()
    spoil(model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").base_layer)
    with pytest.raises(UnsupportedLayer, match=reason) as caught:
        engine(model)
    assert list(caught.value.layers) == ["model.layers.1.self_attn.q_proj"]


def test_a_conv1d_stored_the_other_way_round_is_refused(base_model: MakeBase) -> None:
    base = base_model("gpt2")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]))
    for module in model.modules():
        if "fan_in_fan_out" in vars(module):
            vars(module)["fan_in_fan_out"] = False
    with pytest.raises(UnsupportedLayer, match="contradicts"):
        engine(model)


def test_several_active_adapters_are_refused_and_the_one_that_is_active_is_the_target(
    peft_model: MakeModel,
) -> None:
    model: Any = peft_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    assert {target.adapter for target in find_targets(model)} == {"default"}
    model.set_adapter("other")
    found = find_targets(model)
    assert [target.name for target in found] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    model.add_adapter("third", LoraConfig(r=2, target_modules=["k_proj"]))
    model.base_model.set_adapter(["other", "third"])
    with pytest.raises(UnsupportedLayer, match="2 adapters are active"):
        find_targets(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.merge_adapter(), "merged into the weight"),
        (lambda model: model.base_model.disable_adapter_layers(), "disabled"),
        (lambda model: model.set_adapter("other"), "build the engine again"),
    ],
    ids=["merged", "disabled", "switched"],
)
def test_adapters_changed_since_are_noticed_on_entering(
    peft_model: MakeModel, change: Callable[[Any], object], reason: str
) -> None:
    model = peft_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    flat = engine(model)
    change(model)
    with pytest.raises(UnsupportedLayer, match=reason), flat.perturbed(1):
        pytest.fail("the block was entered")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.base_layer.weight.requires_grad_(), "must be frozen"),
        (lambda layer: parametrizations.weight_norm(layer.base_layer), "not stored"),
        (lambda layer: parametrizations.orthogonal(layer.base_layer), "not stored"),
        (lambda layer: parametrizations.weight_norm(layer.lora_A["default"]), "adapter's weights"),
        (lambda layer: store_transposed(layer.base_layer), "not contiguous"),
    ],
    ids=["unfrozen", "parametrized", "orthogonal", "adapter", "strided"],
)
def test_layers_changed_since_are_noticed_on_entering(
    peft_model: MakeModel, change: Callable[[Any], object], reason: str
) -> None:
    model = peft_model()
    flat = engine(model)
    with flat.perturbed(1):
        pass
    change(flat.targets[-1].layer)
    with pytest.raises(UnsupportedLayer, match=reason) as caught, flat.perturbed(1):
        pytest.fail("the block was entered")
    assert list(caught.value.layers) == [flat.targets[-1].name]


def test_adapters_whose_weights_are_computed_are_refused_by_name(peft_model: MakeModel) -> None:
    model = peft_model()
    layer: Any = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    parametrizations.weight_norm(layer.lora_B["default"])
    with pytest.raises(UnsupportedLayer, match="adapter's weights are computed"):
        engine(model)


def test_several_peft_models_in_one_module_are_refused_by_name(peft_model: MakeModel) -> None:
    pair = nn.ModuleDict({"query": peft_model(), "document": peft_model()})
    with pytest.raises(UnsupportedLayer, match="one of 2 PEFT models") as caught:
        engine(pair)
    assert list(caught.value.layers) == ["document", "query"]
    assert len(engine(pair["query"]).targets) == 6


def test_layers_that_share_a_name_are_refused_by_name() -> None:
    inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "_orig_mod": nn.ModuleDict()})
    inner["_orig_mod"]["proj"] = nn.Linear(8, 8)  # type: ignore[operator]  # it is a dict
    model = nn.Module()
    model.inner = inner
    with pytest.raises(UnsupportedLayer, match="two layers have this name") as caught:
        engine(get_peft_model(model, LoraConfig(r=2, target_modules=["proj"])))
    assert list(caught.value.layers) == ["inner.proj"]


def test_targets_are_ordered_by_name_and_carry_the_layers_tensors(peft_model: MakeModel) -> None:
    targets = find_targets(peft_model())
    assert [target.name for target in targets] == sorted(target.name for target in targets)
    assert len(targets) == 6
    for target in targets:
        rank, features = target.lora_a.shape
        assert target.weight.shape == (target.lora_b.shape[0], features)
        assert target.scaling == pytest.approx(5 / rank)
