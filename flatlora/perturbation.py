"""Make a model's targets compute with ``W + noise`` inside a block, and with ``W`` outside.

The base weights are never written to. A perturbed layer reads a noisy copy of its weight instead,
kept for the step (resident) or made for each use (streamed).
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flatlora.config import Memory
from flatlora.errors import AlreadyPerturbed, FlatLoraError
from flatlora.forward import NoisyForward, noisy_forward
from flatlora.linear import is_perturbed
from flatlora.memory import MemoryChoice, check_memory, choose_memory
from flatlora.noise import Clocks, LayerNoise, Workspace
from flatlora.sharded import ShardedStrength
from flatlora.swept import SweptLayers
from flatlora.targets import Target, layer_state, require_unchanged

_WORD = 2**32
_log = logging.getLogger(__name__)


class Perturbation:
    """The noise of a fixed set of targets at any strength, step and draw.

    Attributes:
        targets: The layers that are perturbed, ordered by name.
        memory: How noisy weights are kept, as asked for or as chosen, and why.
    """

    def __init__(self, targets: tuple[Target, ...], *, seed: int, memory: Memory) -> None:
        check_memory(memory, targets)
        self.targets = targets
        self._undecided = self._auto = memory == "auto"
        self.memory = choose_memory(targets) if memory == "auto" else MemoryChoice(memory, "as set")
        self._workspace = Workspace(targets)
        self._noises = [
            LayerNoise(target, seed=seed, workspace=self._workspace) for target in targets
        ]
        self._forwards: list[NoisyForward] = [noisy_forward(noise) for noise in self._noises]
        self._sharded = ShardedStrength(targets)
        self._clocks = Clocks()
        self._swept = SweptLayers(self._noises, self._clocks)
        self._states: list[tuple[object, ...]] = []
        self._paused: list[NoisyForward] = []
        self._active = False

    @contextmanager
    def applied(self, sigma: float, *, step: int, draw: int = 0) -> Iterator[None]:
        """Perturb all targets inside the block.

        In ``"auto"`` mode memory that runs out is answered by streaming from there on. Where it
        runs out inside the block, the error passes on, as what the block did is lost; entering it
        again, for the same step, needs less.

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
        self.require_inactive()
        self._require_unchanged()
        self._active = True
        try:
            if sigma > 0:
                # what is made here serves all steps, whatever mode the first one is in
                with torch.inference_mode(mode=False), torch.no_grad():
                    self._write(sigma, step, draw)
                for forward in self._forwards:
                    forward.lend()
            yield
        except torch.OutOfMemoryError as error:
            if self._auto and self.stream("memory ran out inside the block"):
                error.add_note(
                    "flatlora has freed its noisy copies and streams from now on: "
                    "enter the same step again, it needs less memory"
                )
            raise
        finally:
            for forward in self._forwards:
                forward.take_back()
            self._active, self._paused = False, []

    def pause(self) -> None:
        """Let all targets compute with ``W`` until `resume` or the block's end."""
        if self._active and not self._paused:
            _untraced(self._take_back)

    def resume(self) -> None:
        """Let the targets that were paused compute with ``W + noise`` again."""
        if self._paused:
            _untraced(self._lend)

    def _take_back(self) -> None:
        self._paused = [forward for forward in self._forwards if is_perturbed(forward.host)]
        for forward in self._paused:
            forward.take_back()

    def _lend(self) -> None:
        for forward in self._paused:
            forward.lend()
        self._paused = []

    def require_inactive(self) -> None:
        """Check that no target is perturbed at the moment.

        Raises:
            AlreadyPerturbed: If one is.
        """
        if self._active or any(is_perturbed(forward.host) for forward in self._forwards):
            raise AlreadyPerturbed(
                "the model is perturbed already: leave one perturbation before entering the next"
            )

    def _require_unchanged(self) -> None:
        states = [layer_state(target) for target in self.targets]
        if states != self._states:
            require_unchanged(self.targets)
            self._states = states

    def _write(self, sigma: float, step: int, draw: int) -> None:
        """Everything that a step needs before its first forward pass."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise FlatLoraError(
                "a CUDA graph is being captured: enter the perturbation outside of the graph, "
                "which then replays with the noise of the step that is entered"
            )
        self._decide_memory()
        sharded = self._sharded.std(sigma)
        self._clocks.set(step, draw)
        resident = self.memory.mode == "resident" and self._allocate_copies()
        if not resident:
            self._workspace.reserve(self.targets)
        for noise in self._swept.write(sigma):
            clock = self._clocks.on(noise.target.stored.tensor.device)
            noise.set(sigma, clock, sharded.get(noise.target.name))
            if resident:
                noise.write_copy()

    def _decide_memory(self) -> None:
        """Choose once more before the first copy: by now a step may have shown what it needs."""
        if self._undecided:
            self.memory = choose_memory(self.targets)
            self._undecided = False
            _log.info("flatlora keeps noisy weights %s: %s", *self.memory)

    def _allocate_copies(self) -> bool:
        try:
            for noise in self._noises:
                noise.allocate_copy()
        except torch.OutOfMemoryError:
            if not (self._auto and self.stream("memory ran out while copies were made")):
                raise
            return False
        return True

    def stream(self, reason: str) -> bool:
        """Give the noisy copies up and stream from the next step on.

        Args:
            reason: Why, for `memory`.

        Returns:
            Whether there was anything to give up.
        """
        self._undecided = False
        if self.memory.mode == "streamed":
            return False
        self._swept.forget()
        for noise in self._noises:
            noise.copy = None
        self.memory = MemoryChoice("streamed", reason)
        _log.warning("flatlora streams noisy weights from now on: %s", reason)
        return True


def _untraced(call: Callable[[], None]) -> None:
    """Call what a compiler must not trace; without loading one, which takes seconds."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.disable(call)()  # type: ignore[no-untyped-call]
    else:
        call()
