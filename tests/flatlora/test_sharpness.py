"""``sharpness``: the loss under the engine's own noise, and no trace of having looked."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from flatlora import sharpness
from flatlora.perturbation import Perturbation
from flatlora.targets import find_targets

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]


@pytest.fixture
def batches(make_batch: MakeBatch) -> list[dict[str, Tensor]]:
    """Of different sizes, so that a mean over batches is not the mean over tokens."""
    return [make_batch(0, sequences=3, length=12), make_batch(1, sequences=1, length=6)]


def token_mean(model: PeftModel, batches: list[dict[str, Tensor]]) -> float:
    """The mean loss over target tokens, written out."""
    losses = []
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits[labels != -100], labels[labels != -100], reduction="none"
                )
            )
    return float(torch.cat(losses).mean())


def test_without_noise_it_is_the_mean_loss_per_target_token(
    peft_model: MakeModel, batches: list[dict[str, Tensor]]
) -> None:
    model = peft_model().eval()
    found = sharpness(model, batches, sigmas=[0.0])
    assert found.clean_loss == pytest.approx(token_mean(model, batches), rel=1e-6)
    (point,) = found.points
    assert point.losses == (found.clean_loss,) * 4
    assert point.std == 0


def test_each_draw_is_the_loss_under_the_engines_noise(
    peft_model: MakeModel, batches: list[dict[str, Tensor]]
) -> None:
    model = peft_model().eval()
    found = sharpness(model, batches, sigmas=[0.3, 0.6], draws=3, seed=11)
    noise = Perturbation(find_targets(model), seed=11, memory="resident")
    for point in found.points:
        for draw, loss in enumerate(point.losses):
            with noise.applied(point.sigma, step=0, draw=draw):
                assert loss == pytest.approx(token_mean(model, batches), rel=1e-6)
    assert [point.sigma for point in found.points] == [0.3, 0.6]
    first = found.points[0]
    assert first.mean == pytest.approx(sum(first.losses) / 3)
    assert first.std == pytest.approx(float(torch.tensor(first.losses).std()), rel=1e-4)


def test_at_a_minimum_of_the_loss_more_noise_costs_more(
    peft_model: MakeModel, make_batch: MakeBatch
) -> None:
    model, batch = peft_model(), make_batch()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=2e-2)
    for _ in range(150):
        torch.autograd.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    found = sharpness(model, [batch], sigmas=[0.1, 0.3, 0.9], draws=8)
    curve = [found.clean_loss, *(point.mean for point in found.points)]
    assert curve == sorted(curve)
    assert curve[-1] > curve[0] + 0.1


def test_it_leaves_mode_gradients_weights_and_generator_alone(
    peft_model: MakeModel, batches: list[dict[str, Tensor]]
) -> None:
    model = peft_model(lora_dropout=0.5)
    model.get_submodule("base_model.model.model.layers.0").eval()
    modes = [module.training for module in model.modules()]
    before = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    one, two = (sharpness(model, batches, sigmas=[0.2], draws=2) for _ in range(2))
    assert one == two, "dropout was on"
    assert [module.training for module in model.modules()] == modes
    assert all(map(torch.equal, model.parameters(), before))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_both_memories_measure_the_same(
    peft_model: MakeModel, batches: list[dict[str, Tensor]]
) -> None:
    model = peft_model()
    one = sharpness(model, batches, sigmas=[0.2], memory="resident")
    assert sharpness(model, batches, sigmas=[0.2], memory="streamed") == one


@pytest.mark.parametrize(
    ("sigmas", "draws", "words"),
    [([], 4, "at least one"), ([-0.1], 4, "not negative"), ([float("nan")], 4, "finite"),
     ([0.1], 1, "at least 2 draws, got 1")],
)  # fmt: skip
def test_values_out_of_range_are_named(
    peft_model: MakeModel,
    batches: list[dict[str, Tensor]],
    sigmas: list[float],
    draws: int,
    words: str,
) -> None:
    with pytest.raises(ValueError, match=words):
        sharpness(peft_model(), batches, sigmas=sigmas, draws=draws)


def test_batches_that_can_be_read_once_are_refused(
    peft_model: MakeModel, batches: list[dict[str, Tensor]]
) -> None:
    with pytest.raises(ValueError, match="not an iterator"):
        sharpness(peft_model(), iter(batches), sigmas=[0.1])


def test_batches_without_a_target_are_refused(peft_model: MakeModel, make_batch: MakeBatch) -> None:
    batch = make_batch()
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no batch has a target token"):
        sharpness(peft_model(), [batch], sigmas=[0.1])
