"""Parameters that PEFT adapts through ``target_parameters``: experts, stored as stacks of matrices.

PEFT wraps the module that has such a parameter (``lora.ParamWrapper``; once more for each further
parameter). For the time of a forward pass it registers a torch parametrization on the parameter,
so that the module reads ``W + s B A`` in place of ``W``. The noise is put before that
parametrization, which then gets ``W + noise``; see `flatlora.forward.NoisyParameter`.

Each matrix of the stack, each expert, has factors, row norms and noise of its own. A row is an
output unit of one expert.

What PEFT allocates in every forward pass, with noise or without, is the merged stack. (It computes
it twice: torch first checks the shape on a result that is thrown away.) The experts' matrix
products save it for their input's gradient, so without activation checkpointing the merged stacks
of all layers are in memory at once, as large as all targets. The noise adds to that the step's
copies, as large again (resident), or one workspace of the largest stack (streamed), which is
written once for a forward pass. Neither is saved for backward.
"""

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatlora.linear import is_forward_replaced

# They multiply by experts stored ``in x out``, but do not tell PEFT, which takes their input for
# their output. The update is as good either way round; rows of noise are not.
_INPUT_FIRST = frozenset({"Llama4TextExperts"})
_BASE_FAULTS = {
    "Conv1d": "belongs to a convolution; only matrices that are multiplied can be perturbed",
    "Conv2d": "belongs to a convolution; only matrices that are multiplied can be perturbed",
    "Conv3d": "belongs to a convolution; only matrices that are multiplied can be perturbed",
    "DbrxExpertGLU": "is read outside its module's forward, where PEFT's update is not",
    "Embedding": "belongs to an embedding; its rows are looked up, not multiplied",
}


class Factors(NamedTuple):
    """The two factors of an update ``s B A`` for each matrix of a stack.

    Attributes:
        a: Down projections.
        b: Up projections.
    """

    a: Float[Tensor, "*stack rank in"]
    b: Float[Tensor, "*stack out rank"]


def is_parameter_wrapper(layer: nn.Module) -> bool:
    """Whether a layer is PEFT's wrapper for a parameter."""
    from peft.tuners.lora.layer import ParamWrapper

    return type(layer) is ParamWrapper


def adapted_parameter(layer: Any) -> tuple[nn.Module, str]:
    """The module behind all wrappers and the name of the parameter that this wrapper adapts."""
    return layer.get_base_layer(), layer.parameter_name


def is_input_first(layer: Any) -> bool:
    """Whether the matrices are stored ``in x out``."""
    if type(layer.get_base_layer()).__name__ in _INPUT_FIRST:
        return True
    return layer._param_ndim == 3 and not layer._did_swap_in_out_features


def expert_factors(layer: Any, adapter: str, *, transposed: bool) -> Factors:
    """Views of an adapter's weights, one pair for each matrix; gradients pass through.

    PEFT keeps the ``A`` of all experts in one matrix, expert after expert, and the ``B`` of all in
    another, in which an expert's columns are ``experts`` apart.

    Args:
        layer: PEFT's wrapper.
        adapter: Name of the adapter.
        transposed: Whether the matrices are stored ``in x out``, see `is_input_first`.
    """
    experts = layer.num_experts
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    down = down.view(experts, -1, down.shape[-1])
    up = up.view(up.shape[0], -1, experts).permute(2, 0, 1)
    if layer._param_ndim == 2:
        down, up = down[0], up[0]
    # PEFT's own view of the order differs from the true one where `_INPUT_FIRST` says so
    if transposed and layer._did_swap_in_out_features:
        return Factors(up.mT, down.mT)
    return Factors(down, up)


def wrapper_fault(layer: Any) -> str | None:
    """Why an adapted parameter is not stored as it is, or not read by its module, or None."""
    base, name = adapted_parameter(layer)
    kind = type(base)
    for family in kind.__mro__:
        if reason := _BASE_FAULTS.get(family.__name__):
            return reason
    if parametrize.is_parametrized(base, name) or name not in base._parameters:
        return "is computed by a parametrization, not stored"
    if type(base._parameters[name]) is not nn.Parameter:
        found = type(base._parameters[name]).__name__
        return f"is a {found}; quantised and sharded parameters are not supported"
    if is_forward_replaced(layer):
        return "the forward of its wrapper was replaced by other code"
    return None


def stack_fault(layer: Any, adapter: str) -> str | None:
    """Why a parameter's shape does not fit its adapter's update, or None."""
    base, name = adapted_parameter(layer)
    weight, transposed = getattr(base, name), is_input_first(layer)
    if weight.ndim == 3 and layer.num_experts == 1 and not layer._did_swap_in_out_features:
        return "is a stack of one matrix stored in x out, to which PEFT adds its update transposed"
    a, b = expert_factors(layer, adapter, transposed=transposed)
    matrix = (a.shape[-1], b.shape[-2]) if transposed else (b.shape[-2], a.shape[-1])
    if weight.shape != (*a.shape[:-2], *matrix):
        expected = (*a.shape[:-2], *matrix)
        return f"has shape {tuple(weight.shape)}, its adapter {expected}; is it sharded?"
    return None


__all__ = [
    "Factors",
    "adapted_parameter",
    "expert_factors",
    "is_input_first",
    "is_parameter_wrapper",
    "stack_fault",
    "wrapper_fault",
]
