"""Parameters that PEFT adapts through ``target_parameters``: which are targets, which are not."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatlora import (
    UnsupportedLayer,
    find_targets,
)
from flatlora.ops import Stream, merged_row_std, noisy_copy, reference, row_square_norm
from flatlora.ops.reference import standard_normals
from tests.flatlora.moe import (
    BASES,
    ONES,
    STEP,
    One,
    adapted,
    base_model,
    engine,
    moe,
    one_linear,
)

MakeBatch = Callable[..., dict[str, Tensor]]

both_memories = pytest.mark.parametrize("memory", ["resident", "streamed"])
both_kinds = pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])


@both_kinds
def test_experts_are_targets_under_the_names_of_the_base_model(kind: str) -> None:
    model = moe(kind)
    named = dict(base_model(kind).named_parameters())
    experts = [t for t in find_targets(model) if type(t.layer) is ParamWrapper]
    assert [t.name for t in experts] == [
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in range(2)
        for name in ("down_proj", "gate_up_proj")
    ]
    assert len(find_targets(model)) == 8  # and attention's
    for target in experts:
        assert torch.equal(target.weight, named[target.name])
        assert target.transposed == (kind == "gpt_oss")
        sizes = target.weight.shape[1:]
        features, out = sizes if target.transposed else sizes[::-1]
        assert target.in_features == features
        assert target.lora_a.shape == (4, 3, features)
        assert target.lora_b.shape == (4, out, 3)


@pytest.mark.parametrize("name", [*BASES, "llama4", "linear"])
def test_the_factors_make_the_update_that_peft_makes(name: str) -> None:
    if name in BASES:
        model = moe(name, target_modules=[])
    else:
        make, parameters, _ = ONES[name]
        model = adapted(make(), target_parameters=parameters)
    for target in find_targets(model):
        layer: Any = target.layer
        made = target.scaling * target.lora_b @ target.lora_a
        made = made.mT if target.transposed else made
        torch.testing.assert_close(made, layer.get_delta_weight("default"))
        if target.weight.ndim == 3:
            left, right, scaling = layer.get_delta_factors("default")
            torch.testing.assert_close(made, scaling * left @ right)


def test_one_target_parameter_that_is_a_matrix_has_the_parameters_name() -> None:
    model = adapted(one_linear(), target_parameters=["experts.weight"])
    (target,) = find_targets(model)
    assert target.name == "experts.weight"
    assert not target.transposed
    assert target.lora_a.shape == (3, 8)
    assert target.lora_b.shape == (6, 3)


def test_a_layer_inside_a_wrapped_module_keeps_its_name() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6, 8))
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.inner(x), self.scale)

    block = One(Block())
    alone = adapted(copy.deepcopy(block), target_modules=["inner"], target_parameters=None)
    both = adapted(block, target_modules=["inner"], target_parameters=["experts.scale"])
    assert [t.name for t in find_targets(alone)] == ["experts.inner"]
    assert [t.name for t in find_targets(both)] == ["experts.inner", "experts.scale"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda base: base.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda base: base.to("meta"), "meta device"),
        (lambda base: base.requires_grad_(), "must be frozen"),
        (
            lambda base: replace(base, lambda w: w[:2].clone()),
            r"adapter \(4, 40, 24\); is it sharded",
        ),
        (lambda base: replace(base, lambda w: w.mT.contiguous().mT), "not contiguous"),
        (
            lambda base: parametrize.register_parametrization(base, "gate_up_proj", nn.Identity()),
            "computed by a parametrization",
        ),
        (lambda base: setattr(base, "gate_up_proj", Odd(base.gate_up_proj)), "is a Odd"),
    ],
    ids=["float8", "meta", "trainable", "sharded", "strided", "parametrized", "subclass"],
)
def test_parameters_that_cannot_be_perturbed_are_refused_by_name(
    spoil: Callable[[Any], object], reason: str
) -> None:
    model = moe("mixtral", target_parameters=["experts.gate_up_proj"])
    spoil(find_targets(model)[3].base)
    with pytest.raises(UnsupportedLayer, match=reason) as caught:
        engine(model)
    assert list(caught.value.layers) == ["model.layers.1.mlp.experts.gate_up_proj"]


class Odd(nn.Parameter):
    """As quantisation libraries make them."""


def replace(base: Any, change: Callable[[Tensor], Tensor]) -> None:
    base.gate_up_proj = nn.Parameter(change(base.gate_up_proj.data), requires_grad=False)


def test_parameters_that_are_not_multiplied_as_peft_believes_are_refused() -> None:
    class Transposed(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(1, 8, 8))

    class DbrxExpertGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w2 = nn.Parameter(torch.randn(6, 8))

    layers = {
        "conv": nn.Conv1d(3, 4, 5),
        "embedding": nn.Embedding(10, 8),
        "transposed": Transposed(),
        "glu": DbrxExpertGLU(),
    }
    names = ["conv.weight", "embedding.weight", "transposed.stack", "glu.w2"]
    model = get_peft_model(
        nn.ModuleDict(layers), LoraConfig(r=2, target_modules=[], target_parameters=names)
    )
    with pytest.raises(UnsupportedLayer) as caught:
        engine(model)
    found = caught.value.layers
    assert list(found) == sorted(names)
    assert "convolution" in found["conv.weight"]
    assert "looked up" in found["embedding.weight"]
    assert "one matrix" in found["transposed.stack"]
    assert "outside its module's forward" in found["glu.w2"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model, _: model.merge_adapter(), "merged into the weight"),
        (lambda model, _: model.base_model.disable_adapter_layers(), "disabled"),
        (lambda _, target: setattr(target.layer, "forward", lambda x: x), "forward of its wrapper"),
        (
            lambda _, target: parametrize.register_parametrization(
                target.base, target.layer.parameter_name, nn.Identity()
            ),
            "computed by a parametrization",
        ),
    ],
    ids=["merged", "disabled", "forward", "parametrized"],
)
def test_what_changed_since_is_noticed_on_entering(
    change: Callable[[Any, Any], object], reason: str
) -> None:
    model = moe("mixtral", target_modules=[])
    flat = engine(model)
    change(model, flat.targets[0])
    with pytest.raises(UnsupportedLayer, match=reason), flat.perturbed(STEP):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("transposed", [False, True], ids=["out in", "in out"])
@pytest.mark.parametrize("chunk", [1, 100, 700, 1 << 19])
@pytest.mark.parametrize("size", [(1, 5, 7), (4, 6, 8), (3, 17, 24), (2, 3, 11, 13)], ids=str)
def test_a_stacks_std_and_copy_are_those_of_its_matrices(
    size: tuple[int, ...], chunk: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    *stack, out, features = size
    weight = torch.randn(*size, generator=generator, dtype=torch.float64)
    a = torch.randn(*stack, 3, features, generator=generator, dtype=torch.float64)
    b = torch.randn(*stack, out, 3, generator=generator, dtype=torch.float64)
    stored = weight.mT.contiguous() if transposed else weight
    norm = row_square_norm(stored, transposed=transposed)
    torch.testing.assert_close(norm, weight.square().sum(dim=-1))
    std = merged_row_std(stored, norm, a, b, scaling=0.7, sigma=0.1, transposed=transposed)
    expected = 0.1 / math.sqrt(features) * (weight + 0.7 * b @ a).norm(dim=-1)
    assert std.shape == ((*stack, 1, out) if transposed else (*stack, out, 1))
    torch.testing.assert_close(std.flatten(), expected.flatten())
    stream = Stream((1, 2), 3, 4)
    noisy = noisy_copy(stored, std, stream, out=torch.full_like(stored, math.nan))
    z = standard_normals(stream, 0, stored.numel(), stored.device).view(stored.shape)
    assert torch.equal(noisy, stored + std * z)
