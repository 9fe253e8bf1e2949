"""Find the layers to perturb, and refuse by name what cannot be perturbed exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flatlora.errors import NoTargets, UnsupportedLayer
from flatlora.forward import forward_fault

# Path components that wrappers put into module names.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LAYER_FAULTS = {
    "Conv1d": "a convolution; only linear layers can be perturbed",
    "Conv2d": "a convolution; only linear layers can be perturbed",
    "Conv3d": "a convolution; only linear layers can be perturbed",
    "Embedding": "an embedding; its rows are looked up, not multiplied",
    "MultiheadAttention": "torch's fused attention does not call its projections as layers",
    "ParamWrapper": "a parameter adapted through target_parameters (experts) is not supported yet",
}


@dataclass(frozen=True)
class Target:
    """One frozen linear layer with its LoRA adapter.

    Tensors are looked up at each use, so a model that moves to another device keeps its targets.

    Attributes:
        name: The layer's name in the base model, the same with and without PEFT's wrappers.
        layer: PEFT's layer around the base layer.
        adapter: Name of the adapter that is trained.
        transposed: Whether the weight is stored ``in x out``, as in GPT-2's ``Conv1D``.
    """

    name: str
    layer: nn.Module
    adapter: str
    transposed: bool

    @property
    def base(self) -> nn.Module:
        """The frozen layer itself."""
        return _part(self.layer, "base_layer")

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        """Frozen weight ``W`` as stored."""
        return _part(self.base, "weight")

    @property
    def lora_a(self) -> Float[Tensor, "rank in"]:
        """Down projection ``A``."""
        return _part(self.layer, "lora_A")[self.adapter].weight

    @property
    def lora_b(self) -> Float[Tensor, "out rank"]:
        """Up projection ``B``."""
        return _part(self.layer, "lora_B")[self.adapter].weight

    @property
    def scaling(self) -> float:
        """Factor ``s`` of the update ``s B A``."""
        return float(_part(self.layer, "scaling")[self.adapter])


def find_targets(model: nn.Module) -> tuple[Target, ...]:
    """The LoRA layers of a model's active adapter, ordered by name.

    A layer's name is its path in the *base model*: the path inside PEFT's tuner, without
    ``base_model.model.`` in front and without the names that compile, checkpoint and data-parallel
    wrappers insert. So a layer keeps its noise however the model is wrapped around it.

    A layer that the active adapter does not touch is no target. A weight that is tied to another
    module can be a target; the perturbation then belongs to the target's matrix product alone, as
    the adapter does, and the other module (the embedding, say) keeps reading ``W``.

    Args:
        model: A PEFT model, or a module that contains one.

    Returns:
        At least one target.

    Raises:
        NoTargets: If there is no LoRA layer, or none with an active adapter.
        UnsupportedLayer: If any LoRA layer cannot be perturbed; names all of them.
    """
    layers = dict(_adapted_layers(model))
    if not layers:
        raise NoTargets(
            f"{type(model).__name__} has no layer adapted by LoRA; "
            "wrap it with peft.get_peft_model(model, LoraConfig(...)) first"
        )
    faults = {name: fault for name, layer in layers.items() if (fault := _layer_fault(layer))}
    if faults:
        raise UnsupportedLayer(faults)
    return tuple(_target(name, layer) for name, layer in sorted(layers.items()))


def require_unchanged(targets: tuple[Target, ...]) -> None:
    """Check before a step that the layers are still as they were when the targets were found.

    Raises:
        UnsupportedLayer: If adapters were merged, disabled or switched since, or a layer's forward
            was replaced; names all such layers.
    """
    faults = {
        target.name: fault
        for target in targets
        if (fault := _adapter_fault(target.layer, target.adapter) or forward_fault(target.base))
    }
    if faults:
        raise UnsupportedLayer(faults)


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers with an active adapter by name; one that has adapters of other kinds included."""
    try:
        from peft.tuners.lora.layer import LoraLayer
        from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    except ImportError:  # without PEFT there is no PEFT model
        return
    tuner = next((module for module in model.modules() if isinstance(module, BaseTuner)), None)
    root: nn.Module = model if tuner is None else _part(tuner, "model")
    for path, module in root.named_modules():
        # trained token rows are not a low-rank update, and no target
        adapted = isinstance(module, BaseTunerLayer) and not isinstance(
            module, TrainableTokensLayer
        )
        if adapted and (not isinstance(module, LoraLayer) or _active_adapters(module)):
            yield ".".join(part for part in path.split(".") if part not in _WRAPPERS), module


def _target(name: str, layer: nn.Module) -> Target:
    transposed = not isinstance(_part(layer, "base_layer"), nn.Linear)
    return Target(name, layer, _active_adapters(layer)[0], transposed)


def _active_adapters(layer: Any) -> list[str]:
    """Active adapters that this layer has."""
    present = {*layer.lora_A, *layer.lora_B, *layer.lora_embedding_A}
    return [adapter for adapter in layer.active_adapters if adapter in present]


def _layer_fault(layer: nn.Module) -> str | None:
    """Why a LoRA layer cannot be perturbed, or None."""
    from peft.tuners.lora.layer import Linear

    kind = type(layer)
    if kind is not Linear:
        reason = _LAYER_FAULTS.get(kind.__name__, "only PEFT's plain lora.Linear can be perturbed")
        return f"{kind.__module__}.{kind.__name__}: {reason}"
    adapters = _active_adapters(layer)
    if len(adapters) > 1:
        return f"{len(adapters)} adapters are active ({', '.join(adapters)}); activate one"
    return _adapter_fault(layer, adapters[0]) or _base_fault(layer, adapters[0])


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
    return None


def _base_fault(layer: Any, adapter: str) -> str | None:
    """What about the frozen layer forbids a perturbation, or None."""
    base = layer.base_layer
    if fault := forward_fault(base):
        return fault
    if "weight" not in base._parameters:
        return "its weight is computed by a parametrization, not stored"
    if type(base.weight) is not nn.Parameter:
        kind = type(base.weight).__name__
        return f"weight is a {kind}; quantised and sharded weights are not supported"
    if fault := _weight_fault(base.weight, layer, transposed=not isinstance(base, nn.Linear)):
        return fault
    if layer.lora_A[adapter].weight.device != base.weight.device:
        return f"weight is on {base.weight.device}, its adapter is not"
    return None


def _weight_fault(weight: nn.Parameter, layer: Any, *, transposed: bool) -> str | None:
    """What about the stored weight forbids a perturbation, or None."""
    features = (layer.in_features, layer.out_features)
    shape = features if transposed else features[::-1]
    if weight.is_meta:
        return "weight is on the meta device (offloaded or not loaded yet)"
    if weight.dtype not in _DTYPES:
        return f"weight is {weight.dtype}; expected one of {', '.join(map(str, _DTYPES))}"
    if weight.shape != shape:
        return f"weight has shape {tuple(weight.shape)}, expected {shape}; is it sharded?"
    if weight.requires_grad:
        return "weight requires a gradient; a base weight must be frozen"
    if layer.fan_in_fan_out != transposed:
        return f"fan_in_fan_out={layer.fan_in_fan_out} contradicts its weight, stored as {shape}"
    return None


def _part(module: nn.Module, name: str) -> Any:
    """An attribute of PEFT's or torch's modules, which they declare as tensor or module at once."""
    return getattr(module, name)
