"""The noise of one layer: its address, its strength, and where its noisy weight is written."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from flatlora import ops
from flatlora.quantised import QuantisedWeight
from flatlora.targets import Target


class Workspace:
    """One buffer for each device and dtype, as large as the largest weight of that dtype.

    All layers write their noisy weight to it in turn, and a weight is used before the next is
    written: work on one device runs in order.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self._sizes: dict[torch.dtype, int] = {}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for stored in (target.stored for target in targets):
            size = stored.shape.numel()
            self._sizes[stored.dtype] = max(size, self._sizes.get(stored.dtype, 0))

    def reserve(self, targets: Sequence[Target]) -> None:
        """Allocate all buffers now, before a compiled model would do it inside its CUDA graph."""
        if not self._buffers:
            for target in targets:
                if not target.units:  # FSDP2 may multiply in another dtype than it stores
                    self.place_for(target, target.stored.tensor)

    def place_for(
        self, target: Target, tensor: Shaped[Tensor, "..."]
    ) -> Float[Tensor, "*stack rows cols"]:
        """A view of the target's shape; what is written there is valid until the next call.

        Args:
            target: The layer.
            tensor: What it stores. FSDP2's mixed precision multiplies by a matrix of another dtype
                than it stores between two forwards.
        """
        stored, device = target.stored, tensor.device
        dtype = stored.dtype if isinstance(stored, QuantisedWeight) else tensor.dtype
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < stored.shape.numel():
            size = max(stored.shape.numel(), self._sizes.get(dtype, 0))
            with torch.inference_mode(mode=False):  # a training step will write to it too
                buffer = torch.empty(size, dtype=dtype, device=device)
            self._buffers[device, dtype] = buffer
        return buffer[: stored.shape.numel()].view(stored.shape)


class Clocks:
    """The present step and draw, as one tensor on each device."""

    def __init__(self) -> None:
        self._clocks: dict[torch.device, Tensor] = {}
        self._now = (0, 0)

    def set(self, step: int, draw: int) -> None:
        """Go to a step and a draw."""
        self._now = step, draw
        for clock in self._clocks.values():  # filled, as an assignment would wait for the GPU
            clock[0].fill_(step)
            clock[1].fill_(draw)

    def on(self, device: torch.device) -> Int64[Tensor, "2"]:
        """The clock of a device, the same tensor for ever."""
        clock = self._clocks.get(device)
        if clock is None:
            clock = torch.tensor(self._now, dtype=torch.int64, device=device)
            self._clocks[device] = clock
        return clock


class LayerNoise:
    """The noise of one target, over a whole run.

    Its tensors are made once and written to at each step, so what was compiled or captured for
    one step serves all of them. Writing raises a tensor's version: autograd refuses a graph of
    an earlier step rather than computing with the wrong noise.

    Attributes:
        target: The layer.
        key: Key words of its noise.
        copy: The noisy weight of this step in resident mode, otherwise None.
    """

    def __init__(self, target: Target, *, seed: int, workspace: Workspace) -> None:
        self.target = target
        self.key = ops.noise_key(seed, target.name)
        self.copy: Tensor | None = None
        self._workspace = workspace
        self._square_norm: Tensor | None = None
        self._normed: object = None
        self._std: Tensor | None = None
        self._clock: Tensor | None = None

    @property
    def std(self) -> Float[Tensor, "*#stack #rows #cols"]:
        """Standard deviation of the noise at the present step."""
        assert self._std is not None, "set() comes first"
        return self._std

    @property
    def clock(self) -> Int64[Tensor, "2"]:
        """Present step and draw, on the layer's device."""
        assert self._clock is not None, "set() comes first"
        return self._clock

    def set(
        self,
        sigma: float,
        clock: Int64[Tensor, "2"],
        std: Float[Tensor, "*#stack #rows #cols"] | None = None,
    ) -> None:
        """Take up a step: its clock and, from the adapter's present state, its strength.

        Args:
            sigma: Strength.
            clock: Step and draw, the same tensor at every step.
            std: Standard deviation of the noise, where it is known already.
        """
        self._clock = clock
        if std is None:
            std = self._merged_std(sigma)
        if self._std is None or not _alike(self._std, std):
            self._std = std
        else:
            self._std.copy_(std)

    def be_swept(self, clock: Int64[Tensor, "2"]) -> Float[Tensor, "rows 1"]:
        """Leave taking up steps to others, see `flatlora.ops.sweep`.

        Args:
            clock: Step and draw, the same tensor at every step.

        Returns:
            Where the standard deviations of all steps are to be written.
        """
        self._clock = clock
        norm = self.square_norm()
        if self._std is None or self._std.device != norm.device:
            self._std = norm.new_empty(len(norm), 1)
        return self._std

    def square_norm(self) -> Float[Tensor, "*stack out"]:
        """``||W_i||^2`` of every output unit, computed once, as the base weight is frozen.

        It is computed again where torch has seen the weight being written to, or its dtype has
        changed.
        """
        tensor = self.target.stored.tensor
        state = (version_of(tensor), tensor.dtype)
        if self._square_norm is None or self._normed != state:
            weight = self._dense()
            with torch.autocast(weight.device.type, enabled=False):  # norms keep their precision
                self._square_norm = ops.row_square_norm(weight, transposed=self.target.transposed)
            self._normed = state
        self._square_norm = self._square_norm.to(tensor.device)
        return self._square_norm

    def allocate_copy(self) -> None:
        """Make room for the noisy weight of resident mode, where there is none yet.

        Raises:
            torch.OutOfMemoryError: If the device has not enough memory.
        """
        stored, device = self.target.stored, self.target.stored.tensor.device
        if self.copy is None or self.copy.device != device or self.copy.dtype != stored.dtype:
            copy = torch.empty(stored.shape, dtype=stored.dtype, device=device)
            # a parameter, as the weight is: what offloads activations then leaves it alone
            self.copy = torch.nn.Parameter(copy, requires_grad=False)

    def write_copy(self) -> None:
        """Write this step's noisy weight to `copy`."""
        assert self.copy is not None, "allocate_copy() comes first"
        tensor = self.target.stored.tensor
        self.target.stored.write_noisy(tensor, self.std, self.key, self.clock, self.copy)

    def write_to_workspace(
        self,
        tensor: Shaped[Tensor, "..."],
        std: Float[Tensor, "*#stack #rows #cols"],
        clock: Int64[Tensor, "2"],
    ) -> Float[Tensor, "*stack rows cols"]:
        """Write the noisy weight to the workspace.

        Args:
            tensor: What the layer stores.
            std: Standard deviation of the noise.
            clock: Step and draw.

        Returns:
            The noisy weight, valid until any layer's next.
        """
        noisy = self._workspace.place_for(self.target, tensor)
        self.target.stored.write_noisy(tensor, std, self.key, clock, noisy)
        return noisy

    def _merged_std(self, sigma: float) -> Float[Tensor, "*#stack #rows #cols"]:
        square_norm = self.square_norm()
        target, weight = self.target, self._dense()
        with torch.autocast(weight.device.type, enabled=False):  # norms keep their precision
            return ops.merged_row_std(
                weight,
                square_norm,
                target.lora_a,
                target.lora_b,
                scaling=target.scaling,
                sigma=sigma,
                transposed=target.transposed,
            )

    def _dense(self) -> Float[Tensor, "*stack rows cols"]:
        """The clean matrix: as stored, or written to the workspace."""
        stored = self.target.stored
        if not isinstance(stored, QuantisedWeight):
            return stored.tensor
        dense = self._workspace.place_for(self.target, stored.tensor)
        stored.write_dense(dense)
        return dense


def version_of(tensor: Tensor) -> int | None:
    """How often torch has seen the tensor being written to, where it counts."""
    return None if tensor.is_inference() else tensor._version


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.dtype, a.shape) == (b.device, b.dtype, b.shape)
