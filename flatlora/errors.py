"""The errors of the library.

    FlatLoraError
    ├── AlreadyPerturbed         a perturbation was entered inside another one
    ├── EvaluatedWhilePerturbed  a trainer's model was evaluated inside an optimizer step
    ├── NoTargets                the model has no LoRA layer to perturb
    └── UnsupportedLayer         LoRA layers that cannot be perturbed exactly, all of them at once

Values out of range (a negative sigma, a step past the end) raise ``ValueError``.
"""

from collections.abc import Mapping


class FlatLoraError(Exception):
    """Base of every error that the library raises on purpose."""


class AlreadyPerturbed(FlatLoraError):
    """A perturbation was entered inside another one on the same layers."""


class EvaluatedWhilePerturbed(FlatLoraError):
    """The model was evaluated between two micro-batches of one optimizer step."""


class NoTargets(FlatLoraError):
    """The model has no LoRA layer to perturb."""


class UnsupportedLayer(FlatLoraError):
    """One or more LoRA layers cannot be perturbed.

    Attributes:
        layers: The reason for every such layer, by its name in the base model.
    """

    def __init__(self, layers: Mapping[str, str]) -> None:
        self.layers = dict(sorted(layers.items()))
        lines = [f"  {name}: {reason}" for name, reason in self.layers.items()]
        noun = "layer" if len(lines) == 1 else "layers"
        super().__init__(
            f"{len(lines)} LoRA {noun} cannot be perturbed; "
            "take them out of the adapter's target modules or train them as plain LoRA:\n"
            + "\n".join(lines)
        )
