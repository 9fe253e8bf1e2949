"""Flat-LoRA for PyTorch and PEFT: train a LoRA adapter in a flat region of the full weight space.

Everything runs in plain PyTorch; where Triton and a CUDA device are at hand, kernels take over.
"""

from typing import TYPE_CHECKING, Any

from flatlora.config import FlatLoraConfig, Memory
from flatlora.engine import FlatLora
from flatlora.errors import (
    AlreadyPerturbed,
    EvaluatedWhilePerturbed,
    FlatLoraError,
    NoTargets,
    UnsupportedLayer,
)
from flatlora.schedule import sigma_at
from flatlora.sharpness import Sharpness, SharpnessPoint, sharpness
from flatlora.targets import Target, find_targets

if TYPE_CHECKING:
    from flatlora.callback import FlatLoraCallback

__all__ = [
    "AlreadyPerturbed",
    "EvaluatedWhilePerturbed",
    "FlatLora",
    "FlatLoraCallback",
    "FlatLoraConfig",
    "FlatLoraError",
    "Memory",
    "NoTargets",
    "Sharpness",
    "SharpnessPoint",
    "Target",
    "UnsupportedLayer",
    "find_targets",
    "sharpness",
    "sigma_at",
]


def __getattr__(name: str) -> Any:
    """Import the callback where it is asked for: the library itself needs no transformers."""
    if name == "FlatLoraCallback":
        from flatlora.callback import FlatLoraCallback

        return FlatLoraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
