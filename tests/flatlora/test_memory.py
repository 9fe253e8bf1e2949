"""What ``memory="auto"`` chooses, and what each mode keeps."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel

from flatlora import FlatLora, FlatLoraConfig, memory
from flatlora.targets import find_targets

MakeModel = Callable[..., PeftModel]


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
