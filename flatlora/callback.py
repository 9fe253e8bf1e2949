"""Flat-LoRA for the Hugging Face ``Trainer`` and the trainers built on it.

The noise follows the trainer's own events, never a count of micro-batches: an epoch that ends with
a short accumulation window closes it like any other.

    on_train_begin          find the targets; refuse what cannot be perturbed
    on_step_begin           noise on: the first micro-batch of an optimizer step follows
    on_pre_optimizer_step   noise off: gradients are complete and clipped
    on_epoch_end            noise off, where the epoch was stopped inside a window
    on_train_end            noise off, and its memory given back

Inside a step trainers also call the model for what they do not differentiate: GRPO generates, DPO
asks for the reference's log-probabilities. The noise is off for each such call of the base model.

No event tells of an exception. What an interrupted step leaves behind is taken away when the model
is next called in evaluation mode, or trained with this callback or another one.
"""

import atexit
import dataclasses
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]  # it has no types
from accelerate.utils import is_compiled_module  # type: ignore[import-untyped]
from torch import nn
from transformers.trainer_callback import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments
from typing_extensions import override

from flatlora.config import FlatLoraConfig, Memory
from flatlora.engine import FlatLora
from flatlora.errors import (
    AlreadyPerturbed,
    EvaluatedWhilePerturbed,
    FlatLoraError,
    UnsupportedLayer,
)
from flatlora.schedule import sigma_at
from flatlora.targets import Target

SIGMA_LOG = "flat_lora_sigma"


class FlatLoraCallback(TrainerCallback, ExportableState):
    """Makes a ``Trainer`` train its LoRA adapter with Flat-LoRA.

    The model is perturbed in the forward and backward passes of each optimizer step, of all its
    micro-batches, and at no other time: not where no gradient is asked for, not in the optimizer's
    step, not in evaluation, not while a checkpoint is saved. (DeepSpeed takes its optimizer's step
    inside the training step: there the noise is on in it too, which A and B do not see.) Steps are
    the trainer's ``global_step`` of ``max_steps``, so a run resumed from a checkpoint draws what an
    unbroken run draws. Ranks of DDP and FSDP2 draw each their own noise; other ways to spread a
    model are refused by name before the first step.

    Every log of the training loss gets ``flat_lora_sigma``, the strength at the last step, in
    ``trainer.state.log_history`` and in what callbacks after this one see; reporters such as
    TensorBoard's come before it and do not.

    An exception out of ``trainer.train()`` can leave the noise on until the model is called in
    evaluation mode or trained by a trainer again; `close` takes it off at once. Where memory ran
    out, the next training with ``"auto"`` memory streams. What tells is that
    ``auto_find_batch_size`` made batches smaller or, on CUDA, the allocator's count of such errors.

    Example::

        trainer = SFTTrainer(model, train_dataset=data, callbacks=[FlatLoraCallback(sigma=0.05)])
        trainer.train()

    Args:
        sigma: As in `FlatLoraConfig`.
        seed: As in `FlatLoraConfig`.
        memory: As in `FlatLoraConfig`.

    Attributes:
        config: The three together.
        total_steps: Number of optimizer steps of the last or present run, None before the first.

    Raises:
        ValueError: If any argument is out of range; the message names all such arguments.
    """

    _training: ClassVar[WeakSet["FlatLoraCallback"]] = WeakSet()  # with an engine; interrupted too

    def __init__(self, sigma: float = 0.05, seed: int = 42, memory: Memory = "auto") -> None:
        self.config = FlatLoraConfig(sigma=sigma, seed=seed, memory=memory)
        self.total_steps: int | None = None
        self._flat: FlatLora | None = None
        self._noise = ExitStack()
        self._perturbing = False
        self._calls: _Calls | None = None
        self._checked = False
        self._batch_size = 0
        self._memory_errors = 0
        self._memory_ran_out = False

    @override
    def state(self) -> dict[str, Any]:
        """What a checkpoint records of this callback."""
        return {
            "args": dataclasses.asdict(self.config),
            "attributes": {"total_steps": self.total_steps},
        }

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the engine for the trainer's model.

        Raises:
            AlreadyPerturbed: If the trainer has several of these callbacks.
            NoTargets: If the model has no LoRA layer.
            UnsupportedLayer: If any LoRA layer cannot be perturbed, or none can in this kind of
                parallel training.
            ValueError: If the checkpoint resumed from was trained with another sigma or seed.
        """
        model = kwargs["model"]
        batch_size = state.train_batch_size or 0
        is_reduced = args.auto_find_batch_size and batch_size < self._batch_size
        self._release_interrupted(model, is_reduced)  # before the engine looks for free memory
        self._check_checkpoint(state)
        flat = FlatLora(model, self.config, total_steps=state.max_steps)
        _check_parallelism(args, model, flat.targets)
        if self._memory_ran_out and self.config.memory == "auto":
            flat.stream("memory ran out in an earlier run")
        self._flat, self.total_steps = flat, state.max_steps
        self._batch_size, self._memory_errors = batch_size, _count_memory_errors(flat.targets)
        self._calls, self._checked = None, self.config.sigma == 0 or _is_compiled(args, model)
        _callback_states(state)[type(self).__name__] = self.state()
        FlatLoraCallback._training.add(self)

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Perturb the model for the step's micro-batches.

        Raises:
            AlreadyPerturbed: If other code perturbs the model.
            UnsupportedLayer: If adapters were merged, disabled or switched since training began.
        """
        self.close()
        flat, step = self._engine, state.global_step
        with ExitStack() as stack:
            if step < flat.total_steps:  # the trainer adds a step where it resumes at the end
                stack.enter_context(flat.perturbed(step))
            base = _base_model(kwargs["model"])
            stack.callback(base.register_forward_pre_hook(self._before_call).remove)
            after = base.register_forward_hook(self._after_call, always_call=True)
            stack.callback(after.remove)
            if not self._checked:
                self._calls = _Calls(flat.targets, stack)
            self._noise = stack.pop_all()
        self._perturbing = True

    @override
    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the micro-batch was perturbed, and the next one will be.

        Raises:
            EvaluatedWhilePerturbed: If the model was evaluated inside the step.
        """
        if not self._perturbing:
            raise EvaluatedWhilePerturbed(
                f"the model was evaluated inside optimizer step {state.global_step}, which took "
                "its noise off; evaluate between steps, for example in on_step_end"
            )

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the noise off: forward and backward are over.

        Raises:
            EvaluatedWhilePerturbed: If the model was evaluated inside the step.
            UnsupportedLayer: If the run's first step called no target.
        """
        self.on_substep_end(args, state, control, **kwargs)
        self.close()
        if self._calls is not None:
            self._calls.check()
            self._checked, self._calls = True, None

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the noise off where the epoch ended inside a step."""
        self.close()

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the noise off and give its memory back."""
        self._release()

    @override
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the last step's strength to a log of the training loss."""
        if self._flat is None or state.global_step < 1:
            return
        step, total = state.global_step - 1, self._flat.total_steps
        sigma = sigma_at(step, total, self.config.sigma) if step < total else 0.0
        for log in (kwargs["logs"], *state.log_history[-1:]):
            if "loss" in log:
                log[SIGMA_LOG] = sigma

    def close(self) -> None:
        """Take the noise off at once, if it is on; for code that goes on after an exception."""
        self._noise.close()
        self._perturbing = False

    def _release(self) -> None:
        self.close()
        self._flat = None
        FlatLoraCallback._training.discard(self)

    def _release_interrupted(self, model: nn.Module, is_reduced: bool) -> None:
        """Clean up after runs that an exception ended: this callback's, and others of the model."""
        modules = {*model.modules()}
        for other in [*FlatLoraCallback._training]:
            targets = other._engine.targets
            if other is self or any(target.base in modules for target in targets):
                if _count_memory_errors(targets) > other._memory_errors or (
                    is_reduced and other is self
                ):
                    self._memory_ran_out = True
                other._release()

    @property
    def _engine(self) -> FlatLora:
        if self._flat is None:
            raise FlatLoraError("the callback was added to a trainer that is training already")
        return self._flat

    def _before_call(self, base_model: nn.Module, _: Any) -> None:
        """Take the noise off for good before an evaluation, and for this call before inference.

        Here and not in each layer, as reentrant checkpointing calls layers without gradients.
        """
        if not base_model.training:
            self.close()
        elif not torch.is_grad_enabled():
            self._engine.pause()

    def _after_call(self, *_: Any) -> None:
        self._engine.resume()

    def _check_checkpoint(self, state: TrainerState) -> None:
        """Compare with what the checkpoint records; without one, with what this callback is."""
        saved = _callback_states(state).get(type(self).__name__, {"args": {"sigma": 0.0}})
        if isinstance(saved, list):
            raise AlreadyPerturbed(f"the trainer has {len(saved)} FlatLoraCallbacks; keep one")
        before = {"seed": self.config.seed} | saved["args"]
        now = dataclasses.asdict(self.config)
        changed = [f for f in ("sigma", "seed") if state.global_step and before[f] != now[f]]
        if changed:
            raise ValueError(
                f"the checkpoint at step {state.global_step} was trained with "
                + ", ".join(f"{field}={before[field]} (now {now[field]})" for field in changed)
                + "; resume with the same, or start a new run from the saved adapter"
            )
        total = saved.get("attributes", {}).get("total_steps")
        if state.global_step and total not in (None, state.max_steps):
            warnings.warn(
                f"the checkpoint belongs to a run of {total} steps, this one has "
                f"{state.max_steps}: sigma goes on along another curve",
                stacklevel=3,
            )


@atexit.register
def _close_all() -> None:
    """After a run that failed; while the interpreter is torn down, it would be too late."""
    for callback in [*FlatLoraCallback._training]:
        callback.close()


class _Calls:
    """Notes which targets are called, as fused code that goes around them trains plain LoRA."""

    def __init__(self, targets: tuple[Target, ...], until: ExitStack) -> None:
        self._total = len(targets)
        self._missing = {target.layer: target.name for target in targets}
        for layer in self._missing:
            until.callback(layer.register_forward_pre_hook(self._note).remove)

    def _note(self, layer: nn.Module, _: Any) -> None:
        self._missing.pop(layer, None)

    def check(self) -> None:
        """Raise if no target was called, warn if some were not."""
        names = sorted(self._missing.values())
        if len(names) == self._total:
            reason = "not called in the run's first step: fused code goes around it"
            raise UnsupportedLayer(dict.fromkeys(names, reason))
        if names:
            warnings.warn(
                f"{len(names)} of {self._total} targets were not called in the run's first step, "
                f"{names[0]} for one: unused by its batches, or computed by fused code that goes "
                "around them and trains them as plain LoRA",
                stacklevel=3,
            )


def _callback_states(state: TrainerState) -> dict[str, Any]:
    """What the callbacks recorded, by class name; transformers declares the field as a list."""
    states: Any = state.stateful_callbacks
    return states


def _base_model(model: nn.Module) -> nn.Module:
    """What every call goes through: PEFT's ``generate`` and a merged model know nothing else."""
    base: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _is_compiled(args: TrainingArguments, model: nn.Module) -> bool:
    """Whether layers may run in a graph that was compiled earlier, without their present hooks."""
    return args.torch_compile or any(
        is_compiled_module(module) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _count_memory_errors(targets: Iterable[Target]) -> int:
    """How often memory has run out on the targets' GPUs, in the life of the process."""
    devices = {target.weight.device for target in targets if target.weight.is_cuda}
    return sum(torch.cuda.memory_stats(device).get("num_ooms", 0) for device in devices)


def _check_parallelism(
    args: TrainingArguments, model: nn.Module, targets: tuple[Target, ...]
) -> None:
    """Refuse what the trainer does around the model; what it does to weights, the engine sees."""
    config = AcceleratorState().parallelism_config
    quantised = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    reason = None
    if args.n_gpu > 1 and not quantised:  # the trainer leaves a quantised model on one GPU
        reason = "nn.DataParallel copies the model; start one process per GPU with torchrun"
    elif config is not None and config.non_data_parallel_size > 1:
        reason = "ranks that share a sequence would each draw noise of their own"
    if reason is not None:
        raise UnsupportedLayer(dict.fromkeys((target.name for target in targets), reason))
