"""The fast LoRA path computes what PEFT computes, forward and backward."""

import copy
import gc
import weakref
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from flatlora import FlatLora, FlatLoraConfig
from worker.training.model.base import checkpoint_activations
from worker.training.model.lora import fast_adapters, forget_inputs

IDS = torch.arange(2 * 9).view(2, 9)


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                attention_bias=True,
            )
        )
        base.to(dtype=dtype)  # type: ignore[call-arg] # transformers' own signature lost its self
        config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options})
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        assert isinstance(model, PeftModel)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert all(grad is not None and bool(grad.any()) for grad in found.values())
    return loss.detach(), {name: grad.clone() for name, grad in found.items() if grad is not None}


def assert_same(ours: PeftModel, theirs: PeftModel) -> None:
    loss, found = gradients(ours)
    expected_loss, expected = gradients(theirs)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_loss_and_gradients_are_those_of_peft(options: dict[str, Any]) -> None:
    ours, theirs = make_model(**options), make_model(**options)
    assert fast_adapters(ours) > 0
    assert_same(ours, theirs)


def test_the_base_may_be_noisy() -> None:
    ours, theirs = make_model(), make_model()
    fast_adapters(ours)
    for memory in ("resident", "streamed"):
        config = FlatLoraConfig(sigma=0.5, seed=1, memory=memory)
        flats = [FlatLora(model, config, total_steps=2) for model in (ours, theirs)]
        with flats[0].perturbed(1), flats[1].perturbed(1):
            assert_same(ours, theirs)


def test_checkpointed_activations_change_nothing() -> None:
    ours, theirs = make_model(), make_model()
    fast_adapters(ours)
    checkpoint_activations(ours.get_base_model(), on=True)
    ours.train()
    assert_same(ours, theirs)


def test_dropout_draws_as_in_peft() -> None:
    ours, theirs = make_model(lora_dropout=0.5), make_model(lora_dropout=0.5)
    fast_adapters(ours)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        found.append(gradients(model.train()))
    torch.testing.assert_close(found[0], found[1])


def test_bfloat16_gets_float32_gradients_and_no_float32_inputs() -> None:
    ours = make_model(torch.bfloat16)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    exact = copy.deepcopy(ours).double()
    fast_adapters(ours)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(_note(kept), lambda saved: saved):
        loss, found = gradients(ours)
    assert torch.Size((2, 9, 24)) not in kept  # what enters down_proj
    expected_loss, expected = gradients(exact)
    assert abs(loss.double() - expected_loss) < 0.02
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        error = (grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name


def _note(kept: list[torch.Size]) -> Any:
    """Shapes of what is kept in float32 for the backward pass."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float32:
            kept.append(tensor.shape)
        return tensor

    return pack


def test_adapters_that_are_off_or_merged_compute_as_in_peft() -> None:
    ours, theirs = make_model(), make_model()
    fast_adapters(ours)
    with torch.no_grad():
        with ours.disable_adapter(), theirs.disable_adapter():
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
        ours.merge_adapter()
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


class Full(nn.Module):
    """A base for which memory does not suffice, once."""

    def __init__(self, usual: nn.Module) -> None:
        super().__init__()
        self.usual, self.has_failed = usual, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.has_failed:
            self.has_failed = True
            raise torch.OutOfMemoryError
        return cast(torch.Tensor, self.usual(x))


def test_a_pass_that_has_failed_leaves_nothing_behind() -> None:
    ours, theirs = make_model(), make_model()
    fast_adapters(ours)
    base: Any = ours.get_base_model()
    layer = base.model.layers[1].mlp.gate_proj
    usual = layer.base_layer
    layer.base_layer = Full(usual)
    kept: list[weakref.ref[Any]] = []
    has_failed = False
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: _Kept(kept, saved), _Kept.tensor):
        try:
            ours(input_ids=IDS, labels=IDS)
        except torch.OutOfMemoryError:  # not pytest.raises, which keeps the frames
            has_failed = True
    assert has_failed
    assert any(reference() for reference in kept)
    forget_inputs(ours)
    gc.collect()
    assert not any(reference() for reference in kept)
    layer.base_layer = usual
    assert_same(ours, theirs)


class _Kept:
    """What autograd keeps for the backward pass, as something that can be seen to go."""

    def __init__(self, kept: "list[weakref.ref[Any]]", saved: torch.Tensor) -> None:
        kept.append(weakref.ref(self))
        self.saved = saved.detach()  # else what a node has made keeps the node

    def tensor(self) -> torch.Tensor:
        return self.saved


def test_other_kinds_keep_their_way() -> None:
    model = make_model(use_dora=True)
    assert fast_adapters(model) == 0
    gradients(model)
