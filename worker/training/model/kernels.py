"""The one place that chooses fused kernels, from ``liger-kernel``, or what transformers computes.

A norm, a rotation or a gated activation in plain PyTorch reads and writes its tensors several
times, and a norm keeps float32 copies of its input for the backward pass. The fused ones read once
and keep the input alone.
"""

import logging
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


def use_fused_kernels(model: PreTrainedModel, device: torch.device) -> bool:
    """Fuse norms, rotations and gated activations of a base model on a GPU, where that is known.

    To be called before an adapter is attached.

    Args:
        model: The base model.
        device: Where it is going to compute.

    Returns:
        Whether its family is one that ``liger-kernel`` knows, and that is installed.
    """
    if device.type != "cuda" or find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import monkey_patch

    if model.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
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
