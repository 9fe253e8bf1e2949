"""What ``memory="auto"`` chooses, and what each mode keeps."""

import weakref
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel

from flatlora import AlreadyPerturbed, FlatLora, FlatLoraConfig, memory
from flatlora.config import Memory
from flatlora.noise import LayerNoise
from flatlora.targets import find_targets

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, torch.Tensor]]


@pytest.mark.parametrize(
    ("share", "expected"), [(2.0, "resident"), (1.99, "streamed"), (0.0, "streamed")]
)
def test_auto_is_resident_where_the_copies_fit_in_half_of_what_is_free(
    peft_model: MakeModel, monkeypatch: pytest.MonkeyPatch, share: float, expected: str
) -> None:
    model = peft_model()
    needed = sum(target.weight.nbytes for target in find_targets(model))
    monkeypatch.setattr(memory, "free_memory", lambda device: int(share * needed))
    flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory="auto"), total_steps=2)
    assert flat.memory == expected


def test_free_memory_of_this_machine_is_known_and_plausible() -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert 2**20 < free < 2**50
    assert memory.free_memory(torch.device("meta")) == 0


def test_resident_keeps_one_copy_of_each_target_and_uses_it_again(peft_model: MakeModel) -> None:
    flat = FlatLora(peft_model(), FlatLoraConfig(sigma=0.1, memory="resident"), total_steps=3)

    def addresses() -> dict[str, int]:
        copies = {noise.target.name: noise.copy for noise in flat._perturbation._noises}
        return {name: copy.data_ptr() for name, copy in copies.items() if copy is not None}

    with flat.perturbed(1):
        first = addresses()
    with flat.perturbed(2):
        assert addresses() == first
    assert set(first) == {target.name for target in flat.targets}


def test_streamed_keeps_one_workspace_of_the_largest_target(peft_model: MakeModel) -> None:
    model = peft_model()
    flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory="streamed"), total_steps=3)
    with flat.perturbed(2):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    noises = flat._perturbation._noises
    (buffer,) = noises[0]._workspace._buffers.values()
    assert buffer.numel() == max(target.weight.numel() for target in flat.targets)
    assert all(noise.copy is None for noise in noises)


class TestRunningOut:
    """``"auto"`` streams where memory runs out, says so, and lets its copies go."""

    def run_out(self, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def test_while_copies_are_made_it_streams_at_once(
        self,
        peft_model: MakeModel,
        make_batch: MakeBatch,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        expected = self.gradients(peft_model(), make_batch, "streamed")
        monkeypatch.setattr(LayerNoise, "allocate_copy", self.run_out)
        model = peft_model()
        flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory="auto"), total_steps=4)
        assert flat.memory == "resident"
        with flat.perturbed(3):
            model(**make_batch()).loss.backward()
        assert (flat.memory, flat.memory_reason) == (
            "streamed", "memory ran out while copies were made"
        )  # fmt: skip
        assert "streams noisy weights from now on" in caplog.text
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(map(torch.equal, found, expected))

    def test_resident_is_kept_where_it_was_asked_for(
        self, peft_model: MakeModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LayerNoise, "allocate_copy", self.run_out)
        flat = FlatLora(peft_model(), FlatLoraConfig(sigma=0.1, memory="resident"), total_steps=4)
        with pytest.raises(torch.OutOfMemoryError), flat.perturbed(3):
            pytest.fail("the block was entered")
        assert flat.memory == "resident"

    def test_inside_the_block_the_error_passes_on_and_the_next_try_streams(
        self, peft_model: MakeModel, make_batch: MakeBatch
    ) -> None:
        expected = self.gradients(peft_model(), make_batch, "streamed")
        model = peft_model()
        flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory="auto"), total_steps=4)
        with flat.perturbed(3):
            copies = [weakref.ref(noise.copy) for noise in flat._perturbation._noises]
        with pytest.raises(torch.OutOfMemoryError) as caught, flat.perturbed(3):
            self.run_out()
        assert "enter the same step again" in caught.value.__notes__[0]
        assert flat.memory_reason == "memory ran out inside the block"
        assert not any(copy() is not None for copy in copies)
        with flat.perturbed(3):
            model(**make_batch()).loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(map(torch.equal, found, expected))

    def test_a_user_can_give_the_copies_up(self, peft_model: MakeModel) -> None:
        flat = FlatLora(peft_model(), FlatLoraConfig(sigma=0.1, memory="resident"), total_steps=4)
        with flat.perturbed(3), pytest.raises(AlreadyPerturbed):
            flat.stream("inside")
        flat.stream("a larger batch comes")
        assert (flat.memory, flat.memory_reason) == ("streamed", "a larger batch comes")

    def gradients(
        self, model: PeftModel, make_batch: MakeBatch, mode: Memory
    ) -> list[torch.Tensor]:
        flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory=mode), total_steps=4)
        with flat.perturbed(3):
            model(**make_batch()).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]


def test_auto_decides_again_once_a_step_has_shown_what_it_needs(
    peft_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peft_model()
    flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory="auto"), total_steps=4)
    assert flat.memory == "resident"
    free = memory.free_memory(torch.device("cpu"))
    monkeypatch.setattr(memory, "past_peak", lambda device: free)
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    modes = []
    for step in (0, 1):  # the first is not perturbed, so nothing is decided
        with flat.perturbed(step):
            modes.append(flat.memory)
    assert modes == ["resident", "streamed"]
    assert "training has needed at its peak" in flat.memory_reason


def test_an_engine_first_used_in_inference_mode_trains_afterwards(
    peft_model: MakeModel, make_batch: MakeBatch
) -> None:
    for mode in ("resident", "streamed"):
        model = peft_model()
        flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory=mode), total_steps=4)
        with torch.inference_mode(), flat.perturbed(2):
            model(**make_batch())
        with flat.perturbed(3):
            model(**make_batch()).loss.backward()


def test_a_base_weight_that_torch_saw_being_written_is_normed_anew(peft_model: MakeModel) -> None:
    model = peft_model()
    flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory="streamed"), total_steps=4)
    noise = flat._perturbation._noises[0]
    for parameter in (noise.target.lora_a, noise.target.lora_b):
        torch.nn.init.zeros_(parameter)
    with flat.perturbed(3):
        before = noise.std.clone()
    with torch.no_grad():
        noise.target.weight.mul_(10)
    with flat.perturbed(3):
        torch.testing.assert_close(noise.std, 10 * before)


def test_a_workspace_grows_with_what_a_cast_model_needs(
    peft_model: MakeModel, make_batch: MakeBatch
) -> None:
    model = peft_model()
    small = model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    small.base_layer.to(torch.bfloat16)
    flat = FlatLora(model, FlatLoraConfig(sigma=0.1, memory="streamed"), total_steps=4)
    model.to(torch.bfloat16)
    with flat.perturbed(3):
        model(**make_batch()).loss.backward()
