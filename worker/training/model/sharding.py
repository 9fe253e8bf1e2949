"""A base model larger than one GPU, of which every rank keeps a part (FSDP2).

Only the frozen base is sharded. A decoder layer is whole while it computes, and the next one is
fetched meanwhile; embeddings, last norm and head form a group of their own. Adapters are small:
they stay plain tensors, the same on every rank, so that whatever trains and saves them need not
know. Nothing of the base is ever reduced or written, as nothing of it is trained.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from worker.training.config import BaseModel, TrainingJob
from worker.training.errors import ConfigInvalid
from worker.training.ranks import Ranks

WHOLE = 0.8
"""Share of a GPU's memory that a whole base may take; what is left is for training on it."""


def is_divided(job: TrainingJob, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether each rank is to keep a part of the base: as the job says, or where it must be.

    Args:
        job: Its strategy and its base model.
        device: Of this rank.
        dtype: That the base computes in.

    Raises:
        ConfigInvalid: If there is nobody to share the base with.
    """
    wanted, gpus = job.resources.strategy, job.resources.gpus
    if wanted == "fsdp" and gpus == 1:
        raise ConfigInvalid(
            "resources.strategy is fsdp, which divides the base among GPUs, and the job has one.",
            "Raise resources.gpus, or leave strategy out.",
        )
    if wanted == "fsdp" and job.training.quantization:
        raise ConfigInvalid(
            f"resources.strategy is fsdp; a {job.training.quantization} base cannot be divided.",
            "Set strategy to ddp: a quantised base needs a fraction of the memory.",
        )
    if wanted == "fsdp" and job.training.perturbation_memory == "resident":
        raise ConfigInvalid(
            "training.perturbation_memory is resident, and with resources.strategy fsdp every GPU "
            "would keep a copy of what is divided.",
            "Leave perturbation_memory out.",
        )
    if wanted != "auto" or gpus == 1:
        return wanted == "fsdp"
    return is_too_large(job, device, dtype)


def is_too_large(job: TrainingJob, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU cannot hold the whole base; a quantised one it always can."""
    if job.training.quantization or device.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return base_bytes(job.base_model, dtype) > WHOLE * total


def base_bytes(base: BaseModel, dtype: torch.dtype) -> int:
    """Memory that a whole base takes, from the headers of its files."""
    elements = 0
    for path in base.path.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors = (value for name, value in header.items() if name != "__metadata__")
        elements += sum(math.prod(tensor["shape"]) for tensor in tensors)
    return elements * dtype.itemsize


def shard(model: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Keep this rank's part of a base model on the device; an adapter stays whole.

    Every rank calls this, with the same model on the CPU; layers are moved and divided one after
    the other, so that the device never holds more than its part and one layer. An adapter may be
    there already or be attached later, the engine is built afterwards.

    From then on all ranks run the model together: each forward and each backward pass by all or by
    none, or they wait for each other. A pass begins at the model or at PEFT's around it, never at a
    part of it.

    Args:
        model: A base model that is frozen, or PEFT's around one. Changed in place.
        device: Of this rank.
        ranks: All of them.

    Raises:
        ConfigInvalid: If the base is quantised, or of a kind that does not name its layers.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = _decoder_layers(base)
    adapter = {parameter for parameter in base.parameters() if parameter.requires_grad}
    _check_plain(parameter for parameter in base.parameters() if parameter not in adapter)
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (ranks.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    fully_shard(base, mesh=mesh, ignored_params=adapter)
    base.forward = _Entrance(base)


def _decoder_layers(base: nn.Module) -> list[nn.Module]:
    """The modules that the model's authors want to be kept on one device."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigInvalid(
            f"{type(base).__name__} does not name its layers (_no_split_modules), so it cannot be "
            "divided among GPUs.",
            "Set resources.strategy to ddp, on GPUs that hold the whole model.",
        )
    return layers


def _check_plain(weights: Iterable[nn.Parameter]) -> None:
    """Raises ConfigInvalid where some are packed: their rows are not rows of the tensor."""
    odd = {
        str(weight.dtype)
        for weight in weights
        if type(weight) is not nn.Parameter or not weight.is_floating_point()
    }
    if odd:
        raise ConfigInvalid(
            f"A quantised base ({', '.join(sorted(odd))}) cannot be divided among GPUs.",
            "Leave training.quantization out, or set resources.strategy to ddp: a quantised base "
            "needs a fraction of the memory.",
        )


class _Entrance:
    """The forward of a sharded base that is also called past its hooks, as PEFT does.

    The hooks make the weights whole, so a call that has met none begins anew. And they leave what
    belongs to no layer whole after a pass without a backward pass: divided again on one rank alone,
    as when the first one saves the adapter, it would be fetched by that rank alone the next time.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._usual = base.forward
        self._is_inside = False
        base.register_forward_pre_hook(self._enter)
        base.register_forward_hook(self._leave, always_call=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._usual if self._is_inside else self._base)(*args, **kwargs)

    def _enter(self, *_: Any) -> None:
        self._is_inside = True

    def _leave(self, *_: Any) -> None:
        self._is_inside = False
        if not torch.is_grad_enabled():
            self._base.reshard()
