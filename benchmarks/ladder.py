"""The rungs between PEFT in a plain loop and the product's way to compute a step, one at a time."""

import copy
import gc
import importlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable products on CUDA

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own abbreviation
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from benchmarks import llama
from benchmarks.sequences import IGNORED, Data
from benchmarks.timing import Ticks, synchronise
from flatlora import FlatLora, FlatLoraConfig, Memory
from worker.training.batches import Batch
from worker.training.model.attention import use_varlen_attention
from worker.training.model.base import checkpoint_activations
from worker.training.model.head import answer_with_loss, summed_loss
from worker.training.model.kernels import repeatable, use_fused_kernels
from worker.training.model.lora import fast_adapters
from worker.training.packing import Sequences

SIGMA, SEED = 0.05, 42
FIRST_STEP, TOTAL_STEPS = 500, 1000  # where the noise has half its strength
NEVER = 1e6  # a gradient norm that is computed, and clips nothing


@dataclass(frozen=True)
class Rung:
    """One way to compute a step.

    Attributes:
        name: As the table calls it.
        data: Which of the data it is fed.
        rows: Sequences of a micro-batch.
        trl: Whether TRL's trainer computes it, which reads of what follows ``fused_kernels`` and
            ``checkpointing``.
        input_cast: PEFT's float32 copy of each adapted layer's input.
        fused_loss: The logits are never all there.
        fused_kernels: Norms, rotations and activations are Liger's.
        varlen: Attention over rows end to end, not over a mask.
        fast: Our path through LoRA's layers, not PEFT's.
        repeatable: Every kernel gives the same bits each time, as the trainer has it.
        compiled: Decoder layers are compiled.
        checkpointing: No activations are kept within a layer.
        bits: Of a base weight, if they are fewer than 16.
        sigma: Strength of the noise.
        memory: How the noise is kept.
    """

    name: str
    data: str = "packed"
    rows: int = 2
    trl: bool = False
    input_cast: bool = False
    fused_loss: bool = True
    fused_kernels: bool = True
    varlen: bool = True
    fast: bool = True
    repeatable: bool = True
    compiled: bool = False
    checkpointing: bool = False
    bits: int | None = None
    sigma: float = 0.0
    memory: Memory = "auto"


@dataclass
class Measured:
    """What was seen of a rung.

    Attributes:
        seconds: Of each timed step.
        losses: Of each step, also those that were not timed.
        gradient: Of the first step, all adapters in one vector, on the CPU.
        peak: Most bytes that were allocated on the GPU.
        missing: Switches of the rung that this machine has not.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    peak: int = 0
    missing: list[str] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.seconds)


class Base:
    """A base model with random weights, of which fresh models are made that share them.

    Attributes:
        device: Where it is.
        config: Of transformers.
        is_quantised: Whether `quantise` was called.
    """

    def __init__(self, shape: llama.Shape, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(SEED)
            model: Any = llama.language_model(shape, device, self.dtype).unload()
        self.config: Any = model.config
        self.is_quantised = False
        self._weights: dict[str, Tensor] = model.state_dict()
        self._quantised: dict[str, nn.Module] = {}

    def matrix_weights(self) -> int:
        """Weights that multiply each token: of the linear layers and the head."""
        sizes = {name: weight.shape.numel() for name, weight in self._weights.items()}
        quantised = {
            f"{name}.weight": layer.in_features * layer.out_features  # type: ignore[operator]
            for name, layer in self._quantised.items()
        }
        names = (*llama.LINEARS, "lm_head")
        return sum(
            int(size)
            for name, size in {**sizes, **quantised}.items()
            if name.removesuffix(".weight").endswith(names)
        )

    def fresh(self) -> PreTrainedModel:
        """A model that nothing was done to, on the shared weights."""
        config = copy.deepcopy(self.config)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=self.dtype, attn_implementation="sdpa"
            )
        for name, layer in self._quantised.items():
            model.set_submodule(name, layer)
        model.load_state_dict(self._weights, assign=True, strict=not self._quantised)
        with torch.device(self.device):  # its buffers are no weights
            model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
        model.requires_grad_(False)
        model.is_loaded_in_4bit = bool(self._quantised)
        fresh: PreTrainedModel = model
        return fresh

    def quantise(self) -> None:
        """Replace the weights of all adapted layers by 4-bit ones, for good."""
        bnb: Any = importlib.import_module("bitsandbytes")  # its own types contradict themselves
        for name in [name for name in self._weights if name.endswith(_weights_of_linears())]:
            weight = self._weights.pop(name)
            layer = bnb.nn.Linear4bit(
                weight.shape[1],
                weight.shape[0],
                bias=False,
                compute_dtype=self.dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
            layer.weight.data = weight
            self._quantised[name.removesuffix(".weight")] = layer.to(self.device)
        self.is_quantised = True


def _weights_of_linears() -> tuple[str, ...]:
    return tuple(f".{name}.weight" for name in llama.LINEARS)


def adapted(base: PreTrainedModel, device: torch.device) -> PeftModel:
    """The same adapter on whatever model; its update is not zero."""
    model = llama.adapted(base).train()
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            std = 1e-3 if "lora_B" in name else 0.5 * parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
    return model


class Stack:
    """A model with a rung's switches, and its optimizer.

    Attributes:
        missing: Switches that this machine has not.
    """

    def __init__(self, base: Base, rung: Rung) -> None:
        self.device, self._rung = base.device, rung
        self.missing: list[str] = []
        self._base = model = base.fresh()
        if rung.fused_loss:
            self._want("fused loss", answer_with_loss(model))
        if rung.fused_kernels:
            self._want("fused kernels", use_fused_kernels(model, base.device))
        self._is_varlen = rung.varlen and use_varlen_attention(model, base.device)
        self._want("varlen", self._is_varlen or not rung.varlen)
        self.model = adapted(model, base.device)
        self._is_autocast = base.device.type == "cuda" and not rung.fast and not rung.input_cast
        if rung.fast:
            self._want("fast adapters", fast_adapters(self.model) > 0)
        elif not rung.input_cast:
            _cast_no_inputs(self.model)
        if rung.checkpointing:
            checkpoint_activations(model, on=True)
        if rung.compiled:
            decoder: Any = model.base_model
            for layer in decoder.layers:
                layer.compile(dynamic=True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=base.device.type == "cuda")
        self._flat = engine(self.model, rung.sigma, rung.memory)

    def _want(self, name: str, is_there: object) -> None:
        if not is_there:
            self.missing.append(name)

    def loss(self, batch: Batch) -> Tensor:
        """Summed over the batch's targets."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_autocast):
            compute = summed_loss if self._rung.fused_loss else eager_loss
            return compute(self._base, batch)

    def passes(self, data: Data, step: int) -> Tensor:
        """Forward and backward passes of a step; its loss."""
        with noise(self._flat, step):
            losses = []
            for group in micro_batches(data.steps[step], self._rung.rows):
                batch = Batch.of(group, self.device, end_to_end=self._is_varlen)
                share = self.loss(batch) / data.targets(step)
                share.backward()  # type: ignore[no-untyped-call]
                losses.append(share.detach())
        return torch.stack(losses).sum()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, NEVER)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def run_own(base: Base, rung: Rung, data: Data, warm: int) -> Measured:
    """All steps of the data, of which the first ``warm`` are not timed."""
    stack, found = Stack(base, rung), Measured()
    found.missing = stack.missing
    reset_peak(base.device)
    losses, ticks = [], Ticks(base.device)
    with repeatable() if rung.repeatable else nullcontext():
        for step in range(len(data.steps)):
            if step == warm:
                ticks.tick()
            losses.append(stack.passes(data, step))
            if step == 0:
                found.gradient = gradient_of(stack.trained)
            stack.update()
            if step >= warm:
                ticks.tick()
    found.seconds = ticks.seconds()
    found.losses = [float(loss) for loss in losses]
    found.peak = peak(base.device)
    return found


def reference(base: Base, data: Data, sigma: float) -> Measured:
    """The first step with PEFT and transformers alone, each row by itself."""
    model = adapted(base.fresh(), base.device)
    flat = engine(model, sigma, "streamed")
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [row for sequence in data.steps[0] for row in sequence]
    loss = torch.zeros((), dtype=torch.float64, device=base.device)
    with noise(flat, 0):
        for row in rows:
            batch = Batch.of([[row]], base.device)
            share = eager_loss(model, batch) / data.targets(0)
            share.backward()  # type: ignore[no-untyped-call]
            loss += share.detach()
    return Measured(losses=[float(loss)], gradient=gradient_of(trained))


def eager_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of all logits in float32, as transformers has it, summed over the targets."""
    logits = model(**batch.inputs).logits.flatten(0, 1).float()
    labels = batch.targets.new_full(logits.shape[:1], IGNORED).scatter(
        0, batch.places, batch.targets
    )
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def micro_batches(sequences: Sequences, rows: int) -> list[Sequences]:
    return [sequences[start : start + rows] for start in range(0, len(sequences), rows)]


def engine(model: nn.Module, sigma: float, memory: Memory) -> FlatLora | None:
    if not sigma:
        return None
    return FlatLora(model, FlatLoraConfig(sigma, SEED, memory=memory), TOTAL_STEPS)


def noise(flat: FlatLora | None, step: int) -> AbstractContextManager[None]:
    return nullcontext() if flat is None else flat.perturbed(FIRST_STEP + step)


def gradient_of(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All gradients in one vector, on the CPU."""
    parts = [p.grad.flatten().float() for p in parameters if p.grad is not None]
    return torch.cat(parts).cpu()


def _cast_no_inputs(model: nn.Module) -> None:
    layers: list[Any] = [each for each in model.modules() if isinstance(each, BaseTunerLayer)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False


@contextmanager
def untouched() -> Iterator[None]:
    """Undo what is patched for all Llamas meanwhile, and let go of all memory."""
    module, model_class = vars(modeling_llama), modeling_llama.LlamaForCausalLM
    before, forward = dict(module), model_class.forward
    try:
        yield
    finally:
        module.update(before)
        model_class.forward = forward  # type: ignore[method-assign]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def with_what_fits(measure: Callable[[int], Measured], rows: int) -> tuple[int, Measured | None]:
    """Measure with so many rows a micro-batch, or with half as many where memory does not suffice.

    Returns:
        The rows that it was measured with, and what was seen; None if even one was too many.
    """
    while rows:
        with untouched():
            try:
                return rows, measure(rows)
            except torch.OutOfMemoryError as error:
                error.__traceback__ = None  # it holds the frames, and they all tensors
        rows //= 2
    return 0, None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        synchronise(device)


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
