"""FSDP2: a sharded model computes what one process computes, and no weight is written to.

The functions that run on the ranks make a whole model, shard it and return whole tensors, so what
they return can be compared with one process that shards nothing.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flatlora import AlreadyPerturbed, UnsupportedLayer, sharpness
from flatlora.config import Memory
from flatlora.ops import Stream, noise_key, noisy_copy
from tests.flatlora.ranks import RankFailed, Ranks, ranks_of
from tests.flatlora.sharding import (
    SEED,
    STEP,
    STEPS,
    WRAPPINGS,
    Found,
    assert_equal,
    assert_equal_tensors,
    engine,
    found,
    gradients_of,
    loss_of,
    make_model,
    shard,
    sharded_model,
    tokens,
    whole,
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with ranks_of(2) as ranks:
        yield ranks


def sharded_step(kind: str, wrapping: str, options: dict[str, Any]) -> Found:
    return found(sharded_model(kind, wrapping, **options))


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
@pytest.mark.parametrize(
    ("kind", "wrapping"),
    # torch itself warns of a unit that is a Conv1D, as that returns a view
    [("llama", wrapping) for wrapping in WRAPPINGS]
    + [("gpt2", wrapping) for wrapping in WRAPPINGS if wrapping != "linears"],
)
def test_a_sharded_model_computes_what_one_process_does(
    ranks: Ranks, kind: str, wrapping: str, reshard: bool
) -> None:
    expected = found(make_model(kind))
    for result in ranks.call(sharded_step, kind, wrapping, {"reshard_after_forward": reshard}):
        assert_equal(result, expected)


def test_the_noise_is_there(ranks: Ranks) -> None:
    expected = found(make_model())
    other = found(make_model(), draw=1)
    assert not torch.allclose(other.logits, expected.logits, rtol=1e-3)
    with pytest.raises(AssertionError):
        assert_equal(other, expected)


def step_by_columns() -> Found:
    model = make_model()

    def placement(parameter: nn.Parameter) -> Shard | None:
        even = parameter.ndim == 2 and parameter.shape[1] % 2 == 0
        return Shard(1) if even else None

    shard(model, "layers", shard_placement_fn=placement)
    placements = {p.placements for p in model.parameters() if isinstance(p, DTensor)}
    assert placements == {(Shard(0),), (Shard(1),)}
    return found(model)


def test_weights_may_be_sharded_by_columns(ranks: Ranks) -> None:
    for result in ranks.call(step_by_columns):
        assert_equal(result, found(make_model()))


def step_on_mesh(shape: tuple[int, int]) -> Found:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return found(sharded_model(mesh=mesh))


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_shards_may_be_replicated_over_groups(ranks: Ranks, shape: tuple[int, int]) -> None:
    for result in ranks.call(step_on_mesh, shape):
        assert_equal(result, found(make_model()))


def checkpointed_step(reentrant: bool) -> Found:
    model = make_model()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    shard(model, "layers")
    return found(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_the_backward_pass_meets_the_same_noise(
    ranks: Ranks, reentrant: bool
) -> None:
    for result in ranks.call(checkpointed_step, reentrant):
        assert_equal(result, found(make_model()))


def step_with_own_draw() -> Found:
    return found(sharded_model(), draw=None)


def test_each_rank_has_a_draw_of_its_own_and_gradients_are_averaged(ranks: Ranks) -> None:
    alone = [found(make_model(), draw) for draw in range(2)]
    mean = {name: (g + alone[1].gradients[name]) / 2 for name, g in alone[0].gradients.items()}
    for result, expected in zip(ranks.call(step_with_own_draw), alone, strict=True):
        assert_equal(result, Found(expected.logits, mean))


def accumulated_step() -> dict[str, Tensor]:
    model = sharded_model()
    assert isinstance(model, FSDPModule)
    with engine(model).perturbed(STEP, 0):
        for micro_batch, is_last in ((0, False), (1, True)):
            model.set_requires_gradient_sync(is_last)
            torch.autograd.backward(loss_of(model, tokens(micro_batch)))
    return gradients_of(model)


def test_micro_batches_accumulate(ranks: Ranks) -> None:
    model = make_model()
    with engine(model).perturbed(STEP, 0):
        for micro_batch in range(2):
            torch.autograd.backward(loss_of(model, tokens(micro_batch)))
    for result in ranks.call(accumulated_step):
        assert_equal_tensors(result, gradients_of(model))


def shard_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            assert isinstance(parameter, DTensor)
            digest.update(parameter.to_local().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(model: nn.Module, batches: list[Tensor], sigma: float | None) -> dict[str, Tensor]:
    """Adapter after a step for each batch."""
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.values(), lr=1e-2)
    flat = None if sigma is None else engine(model, sigma)
    for step, batch in enumerate(batches, start=STEPS - len(batches)):
        if flat is None:
            torch.autograd.backward(loss_of(model, batch))
        else:
            with flat.perturbed(step, 0):
                torch.autograd.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def sharded_training(wrapping: str, sigma: float | None) -> dict[str, Tensor]:
    model = sharded_model(wrapping=wrapping)
    before = shard_hash(model)
    rank = dist.get_rank()
    batches = [tokens(step, sequences=4)[2 * rank : 2 * rank + 2] for step in range(3)]
    adapter = train(model, batches, sigma)
    assert shard_hash(model) == before
    return adapter


@pytest.mark.parametrize("wrapping", ["linears", "layers"])
def test_three_steps_train_the_adapter_of_one_process_with_the_same_global_batch(
    ranks: Ranks, wrapping: str
) -> None:
    expected = train(make_model(), [tokens(step, sequences=4) for step in range(3)], 0.3)
    for result in ranks.call(sharded_training, wrapping, 0.3):
        assert_equal_tensors(result, expected, 1e-8)  # Adam divides small by small


def test_sigma_zero_is_plain_sharded_lora_bit_for_bit(ranks: Ranks) -> None:
    plain = ranks.call(sharded_training, "layers", None)
    for result in ranks.call(sharded_training, "layers", 0.0):
        assert all(torch.equal(result[name], value) for name, value in plain[0].items())


def only_inside() -> None:
    model = sharded_model()
    flat = engine(model)
    clean = loss_of(model, tokens())
    before = shard_hash_of_whole(model)
    with flat.perturbed(STEP, 0):
        noisy = loss_of(model, tokens())
        with pytest.raises(AlreadyPerturbed, match="leave one perturbation"), flat.perturbed(STEP):
            pass
        assert torch.equal(loss_of(model, tokens()), noisy)
    assert not torch.equal(noisy, clean)
    assert torch.equal(loss_of(model, tokens()), clean)
    assert shard_hash_of_whole(model) == before
    with pytest.raises(KeyboardInterrupt), flat.perturbed(STEP, 0):
        raise KeyboardInterrupt
    assert torch.equal(loss_of(model, tokens()), clean)


def shard_hash_of_whole(model: nn.Module) -> str:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return shard_hash(model)


def test_only_the_block_is_noisy_and_entering_twice_is_an_error(ranks: Ranks) -> None:
    ranks.call(only_inside)


def steps_after_evaluation(evaluate: bool) -> Found:
    """The root stays whole after an evaluation, and so do units that are told to."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    model = sharded_model(wrapping="layers", reshard_after_forward=False, mp_policy=policy)
    flat = engine(model)
    if evaluate:
        with torch.no_grad():
            loss_of(model, tokens())
        assert not isinstance(next(p for p in model.parameters() if p.requires_grad), DTensor)
    return found(model, flat=flat)


def test_an_evaluation_before_a_step_changes_no_bit_of_it(ranks: Ranks) -> None:
    for (logits, gradients), expected in zip(
        ranks.call(steps_after_evaluation, True),
        ranks.call(steps_after_evaluation, False),
        strict=True,
    ):
        assert torch.equal(logits, expected.logits)
        assert all(torch.equal(gradients[n], g) for n, g in expected.gradients.items())


def noisy_weights(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What each target multiplies by, under a policy that computes in ``dtype``."""
    model = make_model(kind, torch.float32)
    shard(model, "linears", mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    flat = engine(model)
    found = {}
    with flat.perturbed(STEP, 1), torch.no_grad():
        for target in flat.targets:
            base: Any = target.base
            base.unshard()
            unit = torch.eye(target.in_features, dtype=dtype)
            found[target.name] = base(unit).T - (0 if base.bias is None else base.bias[:, None])
            base.reshard()
    return found


@pytest.mark.parametrize("kind", ["llama", "tiny"])
def test_the_weight_that_is_multiplied_is_the_one_that_gets_the_noise(
    ranks: Ranks, kind: str
) -> None:
    """Mixed precision: the shards set the strength, and the noise is added to what they become."""
    flat = engine(make_model(kind, torch.float32), memory="streamed")
    noises = flat._perturbation._noises
    with flat.perturbed(STEP, 1):
        std = {noise.target.name: noise.std for noise in noises}
    for result in ranks.call(noisy_weights, kind, torch.bfloat16):
        for target in flat.targets:
            weight = target.weight.detach().bfloat16()
            stream = Stream(noise_key(SEED, target.name), STEP, 1)
            noisy = noisy_copy(weight, std[target.name], stream, out=torch.empty_like(weight))
            if kind == "llama":  # without biases
                assert torch.equal(result[target.name], noisy)
            else:
                torch.testing.assert_close(result[target.name], noisy, rtol=0, atol=1e-2)


def memory_of(memory: Memory) -> tuple[str, str]:
    flat = engine(sharded_model(), memory=memory)
    return flat.memory, flat.memory_reason


def test_auto_streams_sharded_weights_and_resident_copies_are_refused(ranks: Ranks) -> None:
    for mode, reason in ranks.call(memory_of, "auto"):
        assert mode == "streamed"
        assert reason == "8 weights are sharded, and a copy would be of a whole one"
    with pytest.raises(RankFailed, match=r"ValueError: memory is 'resident', but 8 of 8 targets"):
        ranks.call(memory_of, "resident")


def sharpness_of(sharded: bool) -> list[float]:
    model = sharded_model() if sharded else make_model()
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    curve = sharpness(model, batches, sigmas=[0.1, 0.3], draws=2)
    return [curve.clean_loss, *curve.points[0].losses, *curve.points[1].losses]


def test_sharpness_of_a_sharded_model_is_that_of_the_whole_one(ranks: Ranks) -> None:
    for losses in ranks.call(sharpness_of, True):
        assert losses == pytest.approx(sharpness_of(False), rel=1e-11)


def refusal(spoil: Callable[[PeftModel], nn.Module]) -> dict[str, str]:
    with pytest.raises(UnsupportedLayer) as caught:
        engine(spoil(make_model()))
    return caught.value.layers


def as_fsdp1(model: PeftModel) -> nn.Module:
    return Fsdp1(model, use_orig_params=True, device_id=torch.device("cpu"))


def as_tensor_parallel(model: PeftModel) -> nn.Module:
    return tensor_parallel(model, init_device_mesh("cpu", (2,)))


def as_both(model: PeftModel) -> nn.Module:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, mesh=mesh["data"])
    return model


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for name, module in [*model.named_modules()]:
        if name.endswith("q_proj.base_layer"):
            parallelize_module(module, mesh, ColwiseParallel())
    return model


@pytest.mark.parametrize(
    ("spoil", "count", "reason"),
    [
        (as_fsdp1, 8, "FSDP1 (FullyShardedDataParallel) keeps it in a flat parameter"),
        (as_tensor_parallel, 2, "as in tensor parallelism"),
        (as_both, 2, "not together with tensor parallelism"),
    ],
)
def test_other_ways_to_divide_a_model_are_refused_by_name(
    ranks: Ranks, spoil: Callable[[PeftModel], nn.Module], count: int, reason: str
) -> None:
    for layers in ranks.call(refusal, spoil):
        assert len(layers) == count
        assert all(reason in found for found in layers.values())


def test_partitions_of_deepspeed_are_refused_by_name() -> None:
    """DeepSpeed marks a parameter that it has partitioned; it needs a GPU to do so itself."""

    def partition(model: PeftModel) -> nn.Module:
        weight: Any = model.get_submodule(
            "base_model.model.model.layers.1.self_attn.q_proj.base_layer"
        ).weight
        weight.ds_shape = weight.shape
        weight.data = weight.new_empty(0)
        return model

    (fault,) = refusal(partition).values()
    assert fault.startswith("DeepSpeed ZeRO-3 partitions it")


def sharded_since() -> str:
    model = make_model()
    flat = engine(model)
    shard(model, "layers")
    with pytest.raises(UnsupportedLayer) as caught, flat.perturbed(STEP):
        pass
    return str(caught.value)


def test_a_model_sharded_after_the_engine_was_built_is_refused(ranks: Ranks) -> None:
    for message in ranks.call(sharded_since):
        assert "build the engine after fully_shard" in message
