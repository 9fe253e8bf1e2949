"""The one place that chooses kernels: fused, from ``liger-kernel``, or as transformers computes.

A norm, a rotation or a gated activation in plain PyTorch reads and writes its tensors several
times, and a norm keeps float32 copies of its input for the backward pass. The fused ones read once
and keep the input alone.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def has_fused_kernels(family: str) -> bool:
    """Whether ``liger-kernel`` is installed, and knows models of a family (``model_type``)."""
    if find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import monkey_patch

    return family in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN


def use_fused_kernels(model: PreTrainedModel, device: torch.device) -> bool:
    """Fuse norms, rotations and gated activations of a base model on a GPU, where that is known.

    To be called before an adapter is attached.

    Args:
        model: The base model.
        device: Where it is going to compute.

    Returns:
        Whether its family is one that ``liger-kernel`` knows, and that is installed.
    """
    if device.type != "cuda" or not has_fused_kernels(model.config.model_type):
        return False
    from liger_kernel.transformers import monkey_patch

    try:
        with _this_model_only(sys.modules[type(model).__module__]):
            monkey_patch._apply_liger_kernel_to_instance(
                model,
                rope=True,
                rms_norm=True,
                swiglu=True,
                geglu=True,
                cross_entropy=False,
                fused_linear_cross_entropy=False,
            )
    except Exception:  # a release of transformers that this one of liger-kernel does not know
        log.warning("no fused kernels for this model", exc_info=True)
        return False
    return True


@contextmanager
def _this_model_only(family: ModuleType) -> Iterator[None]:
    """Keep what is patched on the instance, and undo what is patched for its whole family.

    The rotation is a function of the family's module: it stays, for tensors on a GPU.
    """
    before = dict(vars(family))
    try:
        yield
    finally:
        for name, value in before.items():
            patched = getattr(family, name)
            if patched is value:
                continue
            is_rotation = name == ROTATION
            setattr(family, name, _on_gpus(patched, value) if is_rotation else value)


ROTATION = "apply_rotary_pos_emb"


def _on_gpus(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if q.is_cuda else plain)(q, *args, **kwargs)

    return rotate


@contextmanager
def repeatable() -> Iterator[None]:
    """Kernels that give the same bits each time, or an error where there is none."""
    # cuBLAS reads it when it is first used; the service's trainer has it from its start
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    filled = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # finds who reads memory that nobody has written, and takes time: our tests look for that
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        options.fill_uninitialized_memory = filled
