"""See through what parallel training does to a model, and refuse by name what hides a weight.

FSDP2 (``torch.distributed.fsdp.fully_shard``) makes a parameter a DTensor, of which each rank has
a part, and makes it whole for its unit's forward and backward pass. It also gives every unit a
class of its own. DDP changes nothing inside the model.

Classes are looked up, not imported: a model can only hold one if its module is loaded.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

Units = tuple[nn.Module, ...]

_FLAT = (
    "FSDP1 (FullyShardedDataParallel) keeps it in a flat parameter; "
    "shard with torch.distributed.fsdp.fully_shard"
)
_PARTITIONED = (
    "DeepSpeed ZeRO-3 partitions it, and nothing says where it is whole; "
    "use ZeRO-2 or torch.distributed.fsdp.fully_shard"
)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank has a part."""
    return isinstance(tensor, _loaded("torch.distributed.tensor", "DTensor"))


def own_class(module: nn.Module) -> type:
    """A module's class, without what ``fully_shard`` puts in front of it."""
    unit = _loaded("torch.distributed.fsdp", "FSDPModule")
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, unit))


def units_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Units]:
    """The FSDP2 units that a layer's parameters can belong to: those around it and inside it."""
    around = defaultdict(list)
    for unit in _instances(model, "FSDPModule"):
        for part in unit.modules():
            around[part].append(unit)
    return {
        name: tuple(dict.fromkeys(unit for part in layer.modules() for unit in around[part]))
        for name, layer in layers.items()
    }


def reshard(units: Iterable[nn.Module]) -> None:
    """Bring units back to the state between two steps, in which each rank has its part.

    A unit can be whole outside of a step too: a root after an evaluation, for one. What the
    engine computes must not depend on that.
    """
    for unit in dict.fromkeys(units):
        fsdp: Any = unit
        fsdp.reshard()


def sharding_faults(
    model: nn.Module, layers: Mapping[str, Any], units: Mapping[str, Units]
) -> dict[str, str]:
    """Which adapted layers are sharded in a way that the engine cannot follow, and why.

    Args:
        model: What holds the layers.
        layers: PEFT's layers by name.
        units: Their FSDP2 units, see `units_of`.
    """
    flat_units = _instances(model, "FullyShardedDataParallel")
    flat = {part for unit in flat_units for part in unit.modules()}
    faults = {}
    for name, layer in layers.items():
        if layer.get_base_layer() in flat:
            faults[name] = _FLAT
        elif fault := _layer_fault(layer, units[name]):
            faults[name] = fault
    return faults


def _layer_fault(layer: Any, units: Units) -> str | None:
    stored = [
        weight for weight in layer.get_base_layer()._parameters.values() if weight is not None
    ]
    if any(hasattr(weight, "ds_shape") for weight in stored):
        return _PARTITIONED
    sharded = [parameter for parameter in layer.parameters() if is_sharded(parameter)]
    if sharded and not all(weight.ndim <= 2 and weight.is_floating_point() for weight in stored):
        return "it is sharded, and its weight is not a plain matrix; only plain matrices can be"
    return next((fault for weight in sharded if (fault := _shard_fault(weight, units))), None)


def _shard_fault(weight: Any, units: Units) -> str | None:
    """Why a DTensor is not one that FSDP2 makes whole for its product, or None."""
    placements, mesh = weight.placements, weight.device_mesh
    if not units:
        return (
            f"it is a DTensor ({_words(placements)}) of no FSDP2 unit in this model, "
            "as in tensor parallelism; pass the model that fully_shard was applied to"
        )
    *replicas, last = placements
    if not all(placement.is_replicate() for placement in replicas) or not _is_plain_shard(last):
        return (
            f"it is sharded as ({_words(placements)}); only FSDP2's own sharding, over one "
            "dimension of the mesh, is supported, not together with tensor parallelism"
        )
    if weight.device.type != mesh.device_type and not weight.is_meta:
        return f"its part is kept on {weight.device} (CPUOffloadPolicy), not on {mesh.device_type}"
    return None


def _is_plain_shard(placement: Any) -> bool:
    return type(placement).__name__ == "Shard"  # and not its strided kind


def _words(placements: Iterable[object]) -> str:
    return ", ".join(map(repr, placements))


def _instances(model: nn.Module, name: str) -> Iterator[nn.Module]:
    kind = _loaded("torch.distributed.fsdp", name)
    return (module for module in model.modules() if isinstance(module, kind))


class _Nothing:
    """What no object is an instance of."""


def _loaded(module: str, name: str) -> type:
    """A class of a module that may not have been imported."""
    kind: type = getattr(sys.modules.get(module), name, _Nothing)
    return kind
