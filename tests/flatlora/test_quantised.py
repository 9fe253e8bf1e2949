"""Layers of bitsandbytes as targets: what their weights mean, and what is refused by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flatlora import UnsupportedLayer, find_targets
from flatlora.ops.quantised import dequantise
from flatlora.quantised import FourBitWeight, QuantisedWeight, quantised_weight
from tests.flatlora.quantising import (
    INT8,
    NF4,
    STEP,
    Format,
    MakeModel,
    all_formats,
    bnb,
    both_widths,
    engine,
    quantised,
    unquantised,
)
from tests.flatlora.quantising import model_of as model_of


class TestTheMatrix:
    """What a quantised weight means."""

    # where rows of a multiple of 16 are no whole blocks, bitsandbytes' AVX-512 code misreads them
    SIZES = [(2, 4096), (300, 264), (7, 63), (33, 100), (3, 5), (1, 1)]

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
    @pytest.mark.parametrize("blocksize", [32, 64, 128, 1024, 4096])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_4_bits_mean_what_bitsandbytes_says_bit_for_bit(
        self, quant_type: str, nested: bool, blocksize: int, dtype: torch.dtype
    ) -> None:
        for size in self.SIZES:
            weight = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
            layer: Any = bnb.nn.Linear4bit(*size[::-1], bias=False)
            layer.weight = bnb.nn.Params4bit(
                weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
            ).to("cpu")
            stored = FourBitWeight(layer)
            expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            found = torch.full(size, math.nan, dtype=dtype)
            assert (stored.shape, stored.dtype) == (size, dtype)
            assert torch.equal(dequantise(stored.stored(stored.tensor), out=found), expected)

    def test_codes_kept_as_another_dtype_mean_the_same(self) -> None:
        linear = nn.Linear(64, 32, bias=False)
        weights = []
        for storage in (torch.uint8, torch.bfloat16, torch.float32):
            stored = quantised_weight(quantised(linear, Format(storage=storage)))
            assert stored is not None
            assert stored.tensor.dtype == storage
            weights.append(torch.full((32, 64), math.nan))
            stored.write_dense(weights[-1])
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[2])

    def test_8_bits_mean_what_the_layers_own_backward_multiplies_by(self) -> None:
        layer = quantised(nn.Linear(63, 40, bias=False), INT8)
        x = torch.zeros(40, 63, dtype=torch.float16, requires_grad=True)
        layer(x).backward(torch.eye(40, dtype=torch.float16))
        stored = quantised_weight(layer)
        assert stored is not None
        out = torch.full((40, 63), math.nan, dtype=torch.float16)
        stored.write_dense(out)
        assert x.grad is not None
        assert torch.equal(out, x.grad)

    @both_widths
    def test_it_is_the_same_before_and_after_the_first_forward(self, how: Format) -> None:
        layer = quantised(nn.Linear(24, 16), how)
        stored = quantised_weight(layer)
        assert stored is not None
        before, after = torch.empty(2, 16, 24, dtype=stored.dtype)
        stored.write_dense(before)
        layer(torch.randn(2, 24))
        stored.write_dense(after)
        assert torch.equal(before, after)

    @both_widths
    def test_a_weight_saved_and_loaded_is_the_same(self, how: Format) -> None:
        saved = quantised(nn.Linear(64, 32), how)
        state = saved.state_dict()
        loaded = quantised(nn.Linear(64, 32), how)
        if how.bits == 4:
            statistics = {k: v for k, v in state.items() if k.startswith("weight.")}
            loaded.weight = bnb.nn.Params4bit.from_prequantized(
                state["weight"], statistics, device="cpu", module=loaded
            )
        else:
            loaded.load_state_dict(state)
        weights = []
        for layer in (saved, loaded):
            stored = quantised_weight(layer)
            assert stored is not None
            weights.append(torch.empty(32, 64, dtype=stored.dtype))
            stored.write_dense(weights[-1])
        assert torch.equal(*weights)


class TestTargets:
    """What is found, and what is refused by name."""

    @all_formats
    @pytest.mark.parametrize("told", [True, False], ids=["PEFT's bnb layers", "PEFT's Linear"])
    def test_quantised_layers_are_targets(
        self, model_of: MakeModel, how: Format, told: bool
    ) -> None:
        targets = find_targets(model_of(how, told=told))
        assert len(targets) == 6
        for target in targets:
            assert isinstance(target.stored, QuantisedWeight)
            module = "bnb" if told else "layer"
            assert type(target.layer).__module__ == f"peft.tuners.lora.{module}"
            assert target.stored.shape == (target.lora_b.shape[0], target.lora_a.shape[1])
            assert target.stored.dtype == (torch.float16 if how.bits == 8 else torch.float32)

    @both_widths
    def test_a_weight_that_is_not_quantised_yet_is_refused(self, how: Format) -> None:
        model = get_peft_model(
            nn.ModuleDict({"a": unquantised(nn.Linear(8, 8), how)}),
            LoraConfig(r=2, target_modules=["a"]),
        )
        with pytest.raises(UnsupportedLayer, match="move the model to its device first"):
            engine(model)
        engine(model.to("cpu"))

    def test_a_weight_that_is_quantised_for_each_product_is_refused(self) -> None:
        layer = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True)
        layer.weight.requires_grad_(False)
        model = get_peft_model(nn.ModuleDict({"a": layer}), LoraConfig(r=2, target_modules=["a"]))
        with pytest.raises(UnsupportedLayer, match="has_fp16_weights=True"):
            engine(model)

    def test_a_quantised_layer_that_computes_something_else_is_refused(self) -> None:
        class Odd(bnb.nn.Linear4bit):  # type: ignore[misc]  # a base class without types
            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = 2 * super().forward(x)
                return out

        model = get_peft_model(
            nn.ModuleDict({"a": Odd(8, 8).to("cpu")}), LoraConfig(r=2, target_modules=["a"])
        )
        with pytest.raises(UnsupportedLayer, match="Odd"):
            engine(model)

    @pytest.mark.parametrize(
        ("how", "spoil", "reason"),
        [
            (NF4, lambda base: setattr(base.weight.quant_state, "shape", (36, 24)), "expected"),
            (NF4, lambda base: setattr(base.weight, "data", base.weight[:9]), "sharded"),
            (NF4, lambda base: setattr(base, "weight", sharded()), "sharded"),
            (NF4, lambda base: setattr(base.weight.quant_state, "blocksize", 4), "blocks of 4"),
            (INT8, lambda base: setattr(base.weight, "SCB", None), "SCB"),
            (INT8, lambda base: setattr(base, "weight", offloaded()), "meta device"),
        ],
    )
    def test_a_weight_that_is_not_as_it_should_be_is_refused(
        self, model_of: MakeModel, how: Format, spoil: Callable[[Any], object], reason: str
    ) -> None:
        model = model_of(how)
        target = find_targets(model)[0]
        spoil(target.base)
        with pytest.raises(UnsupportedLayer, match=reason) as caught:
            engine(model)
        assert list(caught.value.layers) == [target.name]

    def test_a_weight_packed_anew_by_an_evaluation_is_refused_on_entering(
        self, model_of: MakeModel
    ) -> None:
        model = model_of(NF4)
        flat = engine(model)
        base: Any = flat.targets[0].base
        with flat.perturbed(STEP):
            pass
        base.weight.quant_state.packing_format_for_cpu = (
            True  # what bitsandbytes sets, on some CPUs
        )
        with pytest.raises(UnsupportedLayer, match="packed its weight anew"), flat.perturbed(STEP):
            pytest.fail("the block was entered")


def sharded() -> nn.Parameter:
    """A parameter that is no longer of bitsandbytes' class."""
    return nn.Parameter(torch.zeros(9, 1, dtype=torch.uint8), requires_grad=False)


def offloaded() -> nn.Parameter:
    codes = torch.empty(24, 36, dtype=torch.int8, device="meta")
    return bnb.nn.Int8Params(codes, requires_grad=False)  # type: ignore[no-any-return]
