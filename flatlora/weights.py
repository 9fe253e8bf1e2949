"""How a frozen weight is stored, and how its noisy copy is written."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from flatlora import ops


class StoredWeight(ABC):
    """A frozen weight in the form its layer keeps it.

    Its tensors are looked up at each use, so a model that moves to another device keeps its
    targets.

    Attributes:
        module: The layer that has the weight.
        transposed: Whether the matrix is stored ``in x out``.
    """

    module: Any
    transposed: bool

    @property
    @abstractmethod
    def tensor(self) -> Shaped[Tensor, "..."]:
        """What is stored: the matrix itself, or packed codes."""

    @property
    def is_stored(self) -> bool:
        """Whether the tensor is a parameter of the module, not computed by a parametrization."""
        return "weight" in self.module._parameters

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the matrix, or of the stack of matrices, that is stored."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix that the layer computes with, which its noisy copy has too."""

    @abstractmethod
    def write_noisy(
        self,
        tensor: Shaped[Tensor, "..."],
        std: Float[Tensor, "*#stack #rows #cols"],
        key: tuple[int, int],
        clock: Int64[Tensor, "2"],
        out: Float[Tensor, "*stack rows cols"],
    ) -> None:
        """Write ``W + std * z`` to ``out``.

        Args:
            tensor: What is stored, see `tensor`; handed in so that a graph can have it as input.
            std: Standard deviation of the noise.
            key: Key words of the layer's noise.
            clock: Step and draw, on the weight's device.
            out: A tensor of `shape` and `dtype`.
        """


class DenseWeight(StoredWeight):
    """A matrix, or a stack of matrices, that is stored as it is.

    Args:
        module: The layer that has the parameter.
        transposed: Whether the matrix is stored ``in x out``.
        parameter: Name of the parameter.
    """

    def __init__(
        self, module: nn.Module, *, transposed: bool = False, parameter: str = "weight"
    ) -> None:
        self.module = module
        self.transposed = transposed
        self.parameter = parameter

    @property
    def tensor(self) -> Float[Tensor, "*stack rows cols"]:
        """The parameter."""
        parameter: Any = self.module._parameters.get(self.parameter)
        if parameter is None:  # parametrized by PEFT, in a forward pass
            parametrizations: Any = self.module.parametrizations
            parameter = parametrizations[self.parameter].original
        return parameter

    @property
    def is_stored(self) -> bool:
        """See `StoredWeight`."""
        return self.parameter in self.module._parameters

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameter."""
        return self.tensor.dtype

    def write_noisy(
        self,
        tensor: Float[Tensor, "*stack rows cols"],
        std: Float[Tensor, "*#stack #rows #cols"],
        key: tuple[int, int],
        clock: Int64[Tensor, "2"],
        out: Float[Tensor, "*stack rows cols"],
    ) -> None:
        """See `StoredWeight`."""
        ops.noisy_copy_at(tensor, std, key, clock, out=out)
