"""Find the layers to perturb, and refuse by name what cannot be perturbed exactly."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from flatlora.errors import NoTargets, UnsupportedLayer
from flatlora.experts import (
    adapted_parameter,
    expert_factors,
    is_input_first,
    is_parameter_wrapper,
    stack_fault,
    wrapper_fault,
)
from flatlora.linear import forward_fault
from flatlora.parallel import is_sharded, own_class, reshard, sharding_faults, units_of
from flatlora.quantised import is_packed_for_cpu, quantised_fault, quantised_weight
from flatlora.weights import DenseWeight, StoredWeight

# Path components that wrappers put into module names.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LAYER_FAULTS = {
    "Conv1d": "a convolution; only linear layers can be perturbed",
    "Conv2d": "a convolution; only linear layers can be perturbed",
    "Conv3d": "a convolution; only linear layers can be perturbed",
    "Embedding": "an embedding; its rows are looked up, not multiplied",
    "MultiheadAttention": "torch's fused attention does not call its projections as layers",
}


@dataclass(frozen=True)
class Target:
    """One frozen linear layer, or parameter, with its LoRA adapter.

    Tensors are looked up at each use, so a model that moves to another device keeps its targets.

    Attributes:
        name: The layer's or parameter's name in the base model, the same with and without PEFT's
            wrappers.
        layer: PEFT's layer around the base layer.
        adapter: Name of the adapter that is trained.
        stored: How the frozen weight is stored.
        units: The FSDP2 units that its parameters can belong to.
    """

    name: str
    layer: nn.Module
    adapter: str
    stored: StoredWeight
    units: tuple[nn.Module, ...] = ()

    @property
    def base(self) -> nn.Module:
        """The frozen layer itself, or the module that has the parameter."""
        return _part(self.layer, "get_base_layer")()

    @property
    def weight(self) -> Shaped[Tensor, "..."]:
        """Frozen weight ``W`` as stored."""
        return self.stored.tensor

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored ``in x out``, as in GPT-2's ``Conv1D``."""
        return self.stored.transposed

    @property
    def in_features(self) -> int:
        """Number ``n`` of input features."""
        return self.lora_a.shape[-1]

    @property
    def lora_a(self) -> Float[Tensor, "*stack rank in"]:
        """Down projection ``A``; of a stack, that of each matrix."""
        if is_parameter_wrapper(self.layer):
            return expert_factors(self.layer, self.adapter, transposed=self.transposed).a
        return self._factor("lora_A")

    @property
    def lora_b(self) -> Float[Tensor, "*stack out rank"]:
        """Up projection ``B``; of a stack, that of each matrix."""
        if is_parameter_wrapper(self.layer):
            return expert_factors(self.layer, self.adapter, transposed=self.transposed).b
        return self._factor("lora_B")

    @property
    def scaling(self) -> float:
        """Factor ``s`` of the update ``s B A``."""
        return float(_part(self.layer, "scaling")[self.adapter])

    def _factor(self, name: str) -> Any:
        # past the modules' __getattr__, which hundreds of layers would wait for at every step
        factors: Any = self.layer._modules[name]
        return factors._modules[self.adapter]._parameters["weight"]


def find_targets(model: nn.Module) -> tuple[Target, ...]:
    """The LoRA layers of a model's active adapter, ordered by name.

    A layer's name is its path in the *base model*: the path inside PEFT's tuner, without
    ``base_model.model.`` in front and without the names that compile, checkpoint and data-parallel
    wrappers insert. So a layer keeps its noise however the model is wrapped around it. A parameter
    adapted through ``target_parameters`` has the name that it has in the base model.

    A layer that the active adapter does not touch is no target. A weight that is tied to another
    module can be a target; the perturbation then belongs to the target's matrix product alone, as
    the adapter does, and the other module (the embedding, say) keeps reading ``W``.

    Args:
        model: A PEFT model, or a module that contains one.

    Returns:
        At least one target.

    Raises:
        NoTargets: If there is no LoRA layer, or none with an active adapter.
        UnsupportedLayer: If any LoRA layer cannot be perturbed, or the module contains several PEFT
            models; names all of them.
    """
    layers = _by_name(_adapted_layers(model))
    if not layers:
        raise NoTargets(
            f"{type(model).__name__} has no layer adapted by LoRA; "
            "wrap it with peft.get_peft_model(model, LoraConfig(...)) first"
        )
    units = units_of(model, layers)
    reshard(itertools.chain(*units.values()))
    faults = {name: fault for name, layer in layers.items() if (fault := _layer_fault(layer))}
    faults |= sharding_faults(model, layers, units)
    if faults:
        raise UnsupportedLayer(faults)
    return tuple(_target(name, layer, units[name]) for name, layer in sorted(layers.items()))


def require_unchanged(targets: tuple[Target, ...]) -> None:
    """Check before a step that the layers are still as they were when the targets were found.

    Raises:
        UnsupportedLayer: If adapters were merged, disabled or switched since, or a layer or its
            weight is no longer what can be perturbed; names all such layers.
    """
    faults = {target.name: fault for target in targets if (fault := _change(target))}
    if faults:
        raise UnsupportedLayer(faults)


def layer_state(target: Target) -> tuple[object, ...]:
    """All that `require_unchanged` depends on, for a comparison that costs next to nothing."""
    layer: Any = target.layer
    attributes, base = vars(layer), target.stored.module
    active = attributes["_active_adapter"]
    weight = target.weight if target.stored.is_stored else None
    return (
        active if isinstance(active, str) else tuple(active),
        attributes["_disable_adapters"],
        tuple(attributes["merged_adapters"]),
        tuple(attributes["lora_variant"]),
        len(layer._modules["lora_A"]._modules),
        _factors_are_stored(layer, target.adapter),
        type(base),
        type(weight),
        weight is not None and (weight.requires_grad, weight.stride()),
        is_packed_for_cpu(base),
        attributes.get("forward"),
        vars(base).get("forward"),
        vars(base).get("_old_forward"),
        layer._modules["base_layer"],
    )


def _change(target: Target) -> str | None:
    if not target.units and target.stored.is_stored and is_sharded(target.weight):
        return "its weight was sharded since; build the engine after fully_shard"
    return _adapter_fault(target.layer, target.adapter) or _layer_fault(target.layer)


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with an active adapter by name; one that has adapters of other kinds included."""
    try:
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    except ImportError:  # without PEFT there is no PEFT model
        return
    tuners = _outermost(model, BaseTuner)
    if len(tuners) > 1:
        reason = f"one of {len(tuners)} PEFT models in this module; build an engine for each"
        paths = (path.removesuffix(".base_model") for path in tuners)
        raise UnsupportedLayer(dict.fromkeys(paths, reason))
    root: nn.Module = next((_part(tuner, "model") for tuner in tuners.values()), model)
    wrappers: set[str] = set()
    for path, module in root.named_modules():
        # trained token rows are not a low-rank update, and no target
        adapted = isinstance(module, BaseTunerLayer) and not isinstance(
            module, TrainableTokensLayer
        )
        if adapted and (not isinstance(module, LoraLayer) or _active_adapters(module)):
            name = _base_name(path, wrappers)
            if is_parameter_wrapper(module):
                wrappers.add(path)
                name = f"{name}.{_part(module, 'parameter_name')}".removeprefix(".")
            yield name, module


def _outermost(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """Modules of a kind by path, without those that are inside another one."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") or not outer for outer in found)
        if isinstance(module, kind) and not inside:
            found[path] = module
    return found


def _by_name(layers: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Layers by name, which has to tell them apart: their noise depends on nothing else.

    Raises:
        UnsupportedLayer: If layers share a name.
    """
    named: dict[str, nn.Module] = {}
    shared: dict[str, str] = {}
    for name, layer in layers:
        if name in named:
            shared[name] = "two layers have this name but for parts that wrappers put into names"
        named[name] = layer
    if shared:
        raise UnsupportedLayer(shared)
    return named


def _base_name(path: str, wrappers: set[str]) -> str:
    """A module's name in the base model, from its path and the paths of wrappers of parameters."""
    parts = path.split(".")
    return ".".join(
        part
        for index, part in enumerate(parts)
        if part not in _WRAPPERS
        and not (part == "base_layer" and ".".join(parts[:index]) in wrappers)
    )


def _target(name: str, layer: nn.Module, units: tuple[nn.Module, ...]) -> Target:
    adapter = _active_adapters(layer)[0]
    if is_parameter_wrapper(layer):
        module, parameter = adapted_parameter(layer)
        stack = DenseWeight(module, transposed=is_input_first(layer), parameter=parameter)
        return Target(name, layer, adapter, stack, units)
    base = _part(layer, "base_layer")
    dense = DenseWeight(base, transposed=not isinstance(base, nn.Linear))
    stored = quantised_weight(base) or dense
    return Target(name, layer, adapter, stored, units)


def _active_adapters(layer: Any) -> list[str]:
    """Active adapters that this layer has."""
    present = {*layer.lora_A, *layer.lora_B, *layer.lora_embedding_A}
    return [adapter for adapter in layer.active_adapters if adapter in present]


def _layer_fault(layer: nn.Module) -> str | None:
    """Why a LoRA layer cannot be perturbed, or None."""
    kind = own_class(layer)
    if kind not in _linear_classes() and not is_parameter_wrapper(layer):
        reason = _LAYER_FAULTS.get(kind.__name__, "only PEFT's plain lora.Linear can be perturbed")
        return f"{kind.__module__}.{kind.__name__}: {reason}"
    adapters = _active_adapters(layer)
    if len(adapters) > 1:
        return f"{len(adapters)} adapters are active ({', '.join(adapters)}); activate one"
    find = _parameter_fault if is_parameter_wrapper(layer) else _base_fault
    return _adapter_fault(layer, adapters[0]) or find(layer, adapters[0])


def _linear_classes() -> list[type[nn.Module]]:
    """PEFT's layers that compute ``base_layer(x) + s B A x``."""
    from peft.tuners.lora.layer import Linear

    # loaded by PEFT where a model has such layers
    module = sys.modules.get("peft.tuners.lora.bnb")
    names = ("Linear4bit", "Linear8bitLt")
    return [Linear, *(getattr(module, name) for name in names if hasattr(module, name))]


def _adapter_fault(layer: Any, adapter: str) -> str | None:
    """What about the adapters' present state forbids a perturbation, or None."""
    if layer.merged_adapters:
        return f"adapter {layer.merged_adapters[0]!r} is merged into the weight; unmerge it first"
    if layer.disable_adapters:
        return "its adapters are disabled; enable them first"
    if (active := _active_adapters(layer)) != [adapter]:
        return f"active adapters are now {active}, not {adapter!r}; build the engine again"
    if variant := layer.lora_variant.get(adapter):
        return f"{type(variant).__name__}: the merged weight of this variant is not W + s B A"
    if not _factors_are_stored(layer, adapter):
        return "its adapter's weights are computed by a parametrization, not stored"
    return None


def _factors_are_stored(layer: Any, adapter: str) -> bool:
    """Whether an adapter's factors are parameters; true of an adapter that the layer has not."""
    factors = (layer._modules[name]._modules.get(adapter) for name in ("lora_A", "lora_B"))
    return all(factor is None or "weight" in factor._parameters for factor in factors)


def _parameter_fault(layer: Any, adapter: str) -> str | None:
    """What about a frozen parameter forbids a perturbation, or None."""
    if fault := wrapper_fault(layer):
        return fault
    module, name = adapted_parameter(layer)
    weight: nn.Parameter = getattr(module, name)
    if fault := _tensor_fault(weight) or stack_fault(layer, adapter):
        return fault
    if layer.lora_A[adapter].weight.device != weight.device:
        return f"weight is on {weight.device}, its adapter is not"
    return None


def _base_fault(layer: Any, adapter: str) -> str | None:
    """What about the frozen layer forbids a perturbation, or None."""
    base = layer.base_layer
    if fault := forward_fault(base):
        return fault
    if "weight" not in base._parameters:
        return "its weight is computed by a parametrization, not stored"
    if stored := quantised_weight(base):
        if fault := quantised_fault(base) or _shape_fault(stored.shape, layer, transposed=False):
            return fault
    elif type(base.weight) is not nn.Parameter and not is_sharded(base.weight):
        kind = type(base.weight).__name__
        return f"weight is a {kind}; this kind of quantised weight is not supported"
    elif fault := _weight_fault(base.weight, layer, transposed=not isinstance(base, nn.Linear)):
        return fault
    if layer.lora_A[adapter].weight.device != base.weight.device:
        return f"weight is on {base.weight.device}, its adapter is not"
    return None


def _weight_fault(weight: nn.Parameter, layer: Any, *, transposed: bool) -> str | None:
    """What about the stored weight forbids a perturbation, or None."""
    return _tensor_fault(weight) or _shape_fault(weight.shape, layer, transposed=transposed)


def _shape_fault(stored: torch.Size, layer: Any, *, transposed: bool) -> str | None:
    """What about the shape of the stored weight forbids a perturbation, or None."""
    features = (layer.in_features, layer.out_features)
    shape = features if transposed else features[::-1]
    if stored != shape:
        return f"weight has shape {tuple(stored)}, expected {shape}; is it sharded?"
    if layer.fan_in_fan_out != transposed:
        return f"fan_in_fan_out={layer.fan_in_fan_out} contradicts its weight, stored as {shape}"
    return None


def _tensor_fault(weight: nn.Parameter) -> str | None:
    """What about a tensor, whatever its shape, forbids a perturbation, or None."""
    if weight.is_meta:
        return "weight is on the meta device (offloaded or not loaded yet)"
    if weight.dtype not in _DTYPES:
        return f"weight is {weight.dtype}; expected one of {', '.join(map(str, _DTYPES))}"
    if weight.requires_grad:
        return "weight requires a gradient; a base weight must be frozen"
    if not is_sharded(weight) and not weight.is_contiguous():
        return "weight is not contiguous, and the noise is addressed in stored order"
    return None


def _part(module: nn.Module, name: str) -> Any:
    """An attribute of PEFT's or torch's modules, which they declare as tensor or module at once."""
    return getattr(module, name)
