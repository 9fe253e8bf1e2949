"""Make a model's targets compute with ``W + noise`` inside a block, and with ``W`` outside.

The base weights are never written to. A perturbed layer reads a noisy copy of its weight instead,
kept for the step (resident) or made for each use (streamed).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flatlora import ops
from flatlora.config import Memory
from flatlora.errors import AlreadyPerturbed
from flatlora.forward import NoisyForward, Product, is_perturbed, linear, replaced_forward
from flatlora.memory import MemoryMode, choose_memory
from flatlora.streamed import Workspace, streamed_linear
from flatlora.targets import Target, require_unchanged

_WORD = 2**32


class Perturbation:
    """The noise of a fixed set of targets at any strength, step and draw.

    Attributes:
        targets: The layers that are perturbed, ordered by name.
        memory: How noisy weights are kept, as asked for or as chosen.
    """

    def __init__(self, targets: tuple[Target, ...], *, seed: int, memory: Memory) -> None:
        self.targets = targets
        self.memory: MemoryMode = choose_memory(targets) if memory == "auto" else memory
        self._keys = {target.name: ops.noise_key(seed, target.name) for target in targets}
        self._square_norms: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._workspace = Workspace(targets)
        self._active = False

    @contextmanager
    def applied(self, sigma: float, *, step: int, draw: int = 0) -> Iterator[None]:
        """Perturb all targets inside the block.

        Args:
            sigma: Strength; with ``0`` no layer is touched.
            step: First half of the noise's address, ``0 <= step < 2**32``.
            draw: Second half of the noise's address, ``0 <= draw < 2**32``.

        Raises:
            AlreadyPerturbed: If a target is perturbed already.
            UnsupportedLayer: If adapters were merged, disabled or switched since the targets were
                found.
            ValueError: If step or draw does not fit its word of the counter.
        """
        if not (0 <= step < _WORD and 0 <= draw < _WORD):
            raise ValueError(f"step and draw must be in [0, 2**32), got step={step}, draw={draw}")
        if self._active or any(is_perturbed(target.base) for target in self.targets):
            raise AlreadyPerturbed(
                "the model is perturbed already: leave one perturbation before entering the next"
            )
        require_unchanged(self.targets)
        self._active = True
        try:
            with ExitStack() as stack:
                if sigma > 0:
                    for forward in self._forwards(sigma, step, draw):
                        stack.enter_context(replaced_forward(forward))
                yield
        finally:
            self._active = False

    def _forwards(self, sigma: float, step: int, draw: int) -> list[NoisyForward]:
        forwards = []
        for target in self.targets:
            stream = ops.Stream(self._keys[target.name], step, draw)
            product = self._product(target, self._std(target, sigma), stream)
            forwards.append(NoisyForward(target.base, product))
        return forwards

    def _product(
        self, target: Target, std: Float[Tensor, "#rows #cols"], stream: ops.Stream
    ) -> Product:
        weight, transposed = target.weight, target.transposed
        if self.memory == "resident":
            noisy = ops.noisy_copy(weight, std, stream, out=self._copy_of(target))
            return lambda x, bias: linear(x, noisy, bias, transposed=transposed)
        product = partial(streamed_linear, workspace=self._workspace, transposed=transposed)
        return lambda x, bias: product(x, weight, bias, std, stream)

    def _std(self, target: Target, sigma: float) -> Float[Tensor, "#rows #cols"]:
        weight = target.weight
        with torch.autocast(weight.device.type, enabled=False):  # norms keep their precision
            square_norm = self._square_norms.get(target.name)
            if square_norm is None:  # once per run: the base weight is frozen
                square_norm = ops.row_square_norm(weight, transposed=target.transposed)
            self._square_norms[target.name] = square_norm = square_norm.to(weight.device)
            return ops.merged_row_std(
                weight,
                square_norm,
                target.lora_a,
                target.lora_b,
                scaling=target.scaling,
                sigma=sigma,
                transposed=target.transposed,
            )

    def _copy_of(self, target: Target) -> Float[Tensor, "rows cols"]:
        """The target's buffer, the same at every step.

        Writing the next step's weight to it raises its version, so that autograd refuses a graph
        of an earlier step rather than computing with the wrong noise.
        """
        weight, copy = target.weight, self._copies.get(target.name)
        if copy is None or copy.device != weight.device or copy.dtype != weight.dtype:
            copy = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self._copies[target.name] = copy
        return copy
