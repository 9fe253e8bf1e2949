"""Laws 3 and 8: the noise is a function of its address, and of nothing else. Resume is replay."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from flatlora import FlatLora, FlatLoraConfig, Target
from flatlora.config import Memory

MakeModel = Callable[..., PeftModel]
MakeBatch = Callable[..., dict[str, Tensor]]
STEPS = 6
SIGMA = 0.2

both_memories = pytest.mark.parametrize("memory", ["resident", "streamed"])


def engine(model: nn.Module, *, seed: int = 5, memory: Memory = "resident") -> FlatLora:
    return FlatLora(model, FlatLoraConfig(sigma=SIGMA, seed=seed, memory=memory), STEPS)


def effective_weight(target: Target) -> Tensor:
    """What the layer multiplies with at the moment, read off by the unit vectors."""
    weight = target.weight
    features = weight.shape[0] if target.transposed else weight.shape[1]
    unit = torch.eye(features, dtype=weight.dtype)
    with torch.no_grad():
        out: Tensor = target.base(unit)
        bias = target.base.bias
        return (out - bias if isinstance(bias, Tensor) else out).T


def noise_of(flat: FlatLora, step: int, draw: int | None = None) -> dict[str, Tensor]:
    """The noise of every target, by name."""
    clean = {target.name: effective_weight(target) for target in flat.targets}
    with flat.perturbed(step, draw):
        return {t.name: effective_weight(t) - clean[t.name] for t in flat.targets}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def all_differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(not torch.equal(one[name], other[name]) for name in one)


def generator_states() -> list[Any]:
    """Not Python's own: while the tests run, beartype draws from it."""
    numpys = np.random.get_state(legacy=False)
    return [torch.get_rng_state().numpy(), numpys["state"]["key"]]


@both_memories
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_global_generator_is_read_or_written(
    peft_model: MakeModel, make_batch: MakeBatch, kind: str, memory: Memory
) -> None:
    model = peft_model(kind)
    before = generator_states()
    flat = engine(model, memory=memory)
    first = noise_of(flat, 3)
    with flat.perturbed(4):
        torch.autograd.backward(model(**make_batch()).loss)
    assert all(map(np.array_equal, before, generator_states()))
    torch.manual_seed(999)
    np.random.seed(999)
    random.seed(999)
    assert_same(noise_of(flat, 3), first)


def test_each_part_of_the_address_gives_other_noise(peft_model: MakeModel) -> None:
    model = peft_model()
    flat = engine(model)
    noise = noise_of(flat, 3)
    assert_same(noise_of(flat, 3), noise)
    assert all_differ(noise_of(flat, 3, draw=1), noise)
    assert all_differ(noise_of(engine(model, seed=6), 3), noise)
    other_step = noise_of(flat, 4)
    for name, value in noise.items():
        cosine = torch.cosine_similarity(value.flatten(), other_step[name].flatten(), dim=0)
        assert abs(float(cosine)) < 5 / value.numel() ** 0.5, name


def test_layers_of_one_shape_have_noise_of_their_own(peft_model: MakeModel) -> None:
    noise = noise_of(engine(peft_model()), 3)
    names = [name for name in noise if name.endswith("q_proj")]
    assert len(names) == 2
    first, second = (noise[name].flatten() for name in names)
    cosine = torch.cosine_similarity(first, second, dim=0)
    assert abs(float(cosine)) < 5 / first.numel() ** 0.5


def test_which_other_layers_are_targets_does_not_matter(peft_model: MakeModel) -> None:
    def noise(*modules: str) -> dict[str, Tensor]:
        flat = engine(peft_model(target_modules=list(modules)))
        for target in flat.targets:
            nn.init.zeros_(target.lora_b)  # else its initial values differ, and so does the scale
        return noise_of(flat, 3)

    some, more = noise("v_proj"), noise("q_proj", "k_proj", "v_proj")
    assert_same({name: more[name] for name in some}, some)


def test_the_order_of_the_modules_does_not_matter(peft_model: MakeModel) -> None:
    straight, turned = peft_model(), peft_model()
    for module in turned.modules():
        module._modules = dict(reversed(module._modules.items()))
    assert_same(noise_of(engine(turned), 3), noise_of(engine(straight), 3))


def test_what_the_batch_holds_does_not_matter(peft_model: MakeModel, make_batch: MakeBatch) -> None:
    model = peft_model()
    flat, untouched = engine(model), noise_of(engine(model), 3)
    with flat.perturbed(2):
        model(**make_batch(7, sequences=1, length=5))
    assert_same(noise_of(flat, 3), untouched)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own import
@pytest.mark.parametrize("wrap", [nn.DataParallel, checkpoint_wrapper, torch.compile])
def test_wrappers_keep_a_layers_name_and_noise(
    peft_model: MakeModel, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    bare = engine(peft_model())
    wrapped = engine(wrap(peft_model()))
    assert [t.name for t in wrapped.targets] == [t.name for t in bare.targets]
    assert bare.targets[0].name == "model.layers.0.mlp.down_proj"
    assert_same(noise_of(wrapped, 3), noise_of(bare, 3))


def test_both_memories_draw_the_same_noise(peft_model: MakeModel) -> None:
    model = peft_model()
    resident = noise_of(engine(model, memory="resident"), 3)
    assert_same(noise_of(engine(model, memory="streamed"), 3), resident)


def test_a_resumed_run_draws_what_an_unbroken_one_draws(peft_model: MakeModel) -> None:
    """The engine's state is its config and the step: a new engine needs nothing else."""
    unbroken = engine(peft_model())
    drawn = [noise_of(unbroken, step) for step in range(STEPS)]
    resumed = engine(peft_model())
    for step in range(3, STEPS):
        assert_same(noise_of(resumed, step), drawn[step])


@pytest.fixture
def process_group() -> Iterator[Callable[[int], None]]:
    """Lets this process be one rank of a group of four, without the three others."""

    def join(rank: int) -> None:
        torch.distributed.init_process_group("fake", rank=rank, world_size=4)

    yield join
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_each_rank_has_a_draw_of_its_own(
    peft_model: MakeModel, process_group: Callable[[int], None]
) -> None:
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers "fake"

    flat = engine(peft_model())
    alone = noise_of(flat, 3)
    process_group(2)
    assert_same(noise_of(flat, 3), noise_of(flat, 3, draw=2))
    assert all_differ(noise_of(flat, 3), alone)
