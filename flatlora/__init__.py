"""Flat-LoRA in plain PyTorch: train a LoRA adapter in a flat region of the full weight space."""

from flatlora.config import FlatLoraConfig, Memory
from flatlora.engine import FlatLora
from flatlora.errors import AlreadyPerturbed, FlatLoraError, NoTargets, UnsupportedLayer
from flatlora.schedule import sigma_at
from flatlora.sharpness import Sharpness, SharpnessPoint, sharpness
from flatlora.targets import Target, find_targets

__all__ = [
    "AlreadyPerturbed",
    "FlatLora",
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
