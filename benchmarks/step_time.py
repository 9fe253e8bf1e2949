"""What the perturbation costs: an optimizer step of Flat-LoRA over one of plain LoRA.

    python -m benchmarks.step_time [--json PATH] [--tokens 1024,4096,16384,32768] [--layers 32]
    python -m benchmarks.step_time --tokens 1024 --graph --no-checkpointing
    python -m benchmarks.step_time --base-model FOLDER [--rows 16] [--length 200]

A step is the forward and backward passes of its micro-batches, clipping, and AdamW's update of
float32 adapters; on a GPU of an 8B Llama with random weights, on a CPU of a tiny one, or of the
base model in a folder. Plain LoRA, resident, streamed and auto take turns in blocks of several
steps, A B C D D C B A, each block with an engine of its own, so that no mode's buffers count for
another. Nothing waits between the steps of a block. Medians of all steps of a kind. On a GPU the
matrix products run under autocast to bfloat16. A small step is bound by the host that asks for it;
`--graph` captures its passes in a CUDA graph, so that the device alone is measured.

Ends with 1, and without ratios, unless resident, streamed and auto mode give the same losses (to
2e-5 of a loss; what they compute is the same to the bit, but for the choice of a matrix product's
kernel) and gradient norms (to 1 %), and plain LoRA other losses.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks import llama, report
from benchmarks.timing import synchronise
from flatlora import FlatLora, FlatLoraConfig, Memory

PLAIN = "plain LoRA"
MODES = ("resident", "streamed", "auto")
SIGMA, SEED = 0.05, 42
FIRST_STEP, TOTAL_STEPS = 500, 1000
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-5, 1e-2
# What streamed mode may take beside one noisy copy of the largest target.
SLACK = 16_000_000
# Activations of an 8B model at 4,096 tokens need more than this beside weights and noisy copies.
ROOMY = 100e9

Noise = Callable[[int], AbstractContextManager[None]]


@dataclass
class Measured:
    """What was seen of one kind at one size of step.

    Attributes:
        seconds: Of each step, block by block.
        losses: Of each step of a block; every block has the same.
        norms: Gradient norms before clipping, likewise.
        peak: Most bytes that were allocated on the GPU.
        memory: The mode that the engine is in; what auto chose.
    """

    seconds: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    peak: int = 0
    memory: str = ""

    def median(self) -> float:
        return statistics.median(second for block in self.seconds for second in block)


class Trainer:
    """One model with its optimizer; every step meets the same adapters and the same tokens."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        vocab: int,
        rows: int,
        length: int,
        *,
        graphs: bool = False,
    ) -> None:
        self.model, self.device, self.graphs = model, device, graphs
        self._rows, self._length, self._vocab = rows, length, vocab
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=0.0)

    def batches(self, tokens: int) -> list[Tensor]:
        """Micro-batches of one step, as large as the options allow."""
        length = min(self._length, tokens)
        rows = min(self._rows, max(1, tokens // length))
        generator = torch.Generator().manual_seed(SEED)
        ids = [
            torch.randint(self._vocab, (rows, length), generator=generator)
            for _ in range(max(1, tokens // (rows * length)))
        ]
        return [batch.to(self.device) for batch in ids]

    def step(
        self,
        batches: Sequence[Tensor],
        noise: AbstractContextManager[None],
        graph: "Graph | None" = None,
    ) -> Tensor:
        """One optimizer step; its loss and its gradient norm, which the host does not wait for."""
        with noise:
            loss = self.passes(batches) if graph is None else graph.replay()
        norm = nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        if graph is None:  # a graph writes its gradients anew
            self._optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss, norm])

    def passes(self, batches: Sequence[Tensor]) -> Tensor:
        """Forward and backward passes of all micro-batches; their loss."""
        losses = []
        for ids in batches:
            with torch.autocast(
                self.device.type,
                torch.bfloat16,
                enabled=self.device.type == "cuda",
                cache_enabled=not self.graphs,  # what a graph reads must not be freed
            ):
                loss = self.model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def forget(self) -> None:
        """Let the gradients go."""
        self._optimizer.zero_grad(set_to_none=True)


class Graph:
    """The passes of one step, captured; noise must be on while they are."""

    def __init__(self, trainer: Trainer, batches: Sequence[Tensor]) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                trainer.passes(batches)
        torch.cuda.current_stream().wait_stream(side)
        trainer.forget()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = trainer.passes(batches)

    def replay(self) -> Tensor:
        """Run the passes with the noise of the present step."""
        self._graph.replay()
        return self._loss.clone()


class Ticks:
    """Times between steps, taken without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: list[Any] = []

    def tick(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._seen.append(event)
        else:
            self._seen.append(time.perf_counter())

    def seconds(self) -> list[float]:
        synchronise(self._device)
        pairs = zip(self._seen, self._seen[1:], strict=False)
        if self._device.type == "cuda":
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer, about = build(options, device)
    results = []
    for tokens in options.tokens:
        measured = measure(trainer, tokens, options.seconds)
        try:
            require_agreement(measured)
        except report.Disagreement as reason:
            return report.refuse(reason)
        results.append(summary(tokens, trainer, measured))
        show(results[-1], about, device)
    report.write(options.json, "step_time", device, {"model": about, "steps": results})
    return 0


def build(options: argparse.Namespace, device: torch.device) -> tuple[Trainer, dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if options.base_model is None:
            shape = llama.EIGHT_B if device.type == "cuda" and not options.small else llama.TINY
            shape = replace(shape, layers=options.layers or shape.layers)
            model, vocab = llama.language_model(shape, device, dtype), shape.vocab
        else:
            model = llama.from_folder(options.base_model, device, dtype)
            vocab = model.get_input_embeddings().weight.shape[0]
    checkpointing = options.checkpointing
    if checkpointing is None:
        checkpointing = device.type == "cuda" and _device_memory(device) < ROOMY
    if checkpointing:
        llama.checkpoint_activations(model)
    trainer = Trainer(model, device, vocab, options.rows, options.length, graphs=options.graph)
    about = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "checkpointing": checkpointing,
        "graph": options.graph,
        "micro_batch": [options.rows, options.length],
        "base_model": None if options.base_model is None else str(options.base_model),
    }
    return trainer, about


def measure(trainer: Trainer, tokens: int, seconds: float) -> dict[str, Measured]:
    """All kinds at one size of step, in blocks A B C D D C B A."""
    batches = trainer.batches(tokens)
    kinds: dict[str, Measured] = {kind: Measured() for kind in (PLAIN, *MODES)}
    order = [*kinds, *reversed(kinds)]
    trainer.step(batches[:1], nullcontext())
    once, _ = _block(trainer, batches, lambda _: nullcontext(), steps=1)
    steps = min(200, max(2, int(seconds / len(order) / once[0])))
    for kind in order:
        _run_block(trainer, batches, kind, kinds[kind], steps)
    return kinds


def _run_block(
    trainer: Trainer, batches: Sequence[Tensor], kind: str, into: Measured, steps: int
) -> None:
    """Steps of one kind with an engine of its own, gone with its buffers afterwards."""
    if trainer.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(trainer.device)
    flat = _engine(trainer.model, kind)
    noise: Noise = (lambda _: nullcontext()) if flat is None else flat.perturbed
    for step in (FIRST_STEP - 2, FIRST_STEP - 1):  # the norms of the base, kernels to compile
        trainer.step(batches[:1], noise(step))
    graph = None
    if trainer.graphs:
        with noise(FIRST_STEP - 1):
            graph = Graph(trainer, batches)
    seconds, outputs = _block(trainer, batches, noise, steps, graph)
    trainer.forget()
    into.seconds.append(seconds)
    into.memory = "none" if flat is None else flat.memory
    into.losses, into.norms = ([float(x) for x in column] for column in zip(*outputs, strict=True))
    if trainer.device.type == "cuda":
        into.peak = max(into.peak, torch.cuda.max_memory_allocated(trainer.device))


def _block(
    trainer: Trainer,
    batches: Sequence[Tensor],
    noise: Noise,
    steps: int,
    graph: Graph | None = None,
) -> tuple[list[float], list[list[float]]]:
    synchronise(trainer.device)
    ticks, outputs = Ticks(trainer.device), []
    ticks.tick()
    for step in range(FIRST_STEP, FIRST_STEP + steps):
        outputs.append(trainer.step(batches, noise(step), graph))
        ticks.tick()
    return ticks.seconds(), [output.tolist() for output in outputs]


def _engine(model: nn.Module, kind: str) -> FlatLora | None:
    if kind == PLAIN:
        return None
    memory: Memory = next(mode for mode in get_args(Memory) if mode == kind)
    return FlatLora(model, FlatLoraConfig(SIGMA, SEED, memory=memory), TOTAL_STEPS)


def require_agreement(measured: dict[str, Measured]) -> None:
    """All modes train on the same noise, and plain LoRA on none.

    Raises:
        Disagreement: If the losses or gradient norms of two modes differ, or plain LoRA's do not.
    """
    first = measured[MODES[0]]
    for mode in MODES[1:]:
        other = measured[mode]
        if (apart := _apart(first.losses, other.losses)) > LOSS_TOLERANCE:
            raise report.Disagreement(f"losses of {MODES[0]} and {mode} differ by {apart:.1e}")
        if (apart := _apart(first.norms, other.norms)) > NORM_TOLERANCE:
            raise report.Disagreement(f"gradients of {MODES[0]} and {mode} differ by {apart:.1e}")
    if _apart(first.losses, measured[PLAIN].losses) <= LOSS_TOLERANCE:
        raise report.Disagreement("losses with noise are plain LoRA's: nothing was perturbed")


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest relative difference, infinite where one is not a number."""
    if len(a) != len(b):
        return math.inf
    apart = [abs(x - y) / abs(y) if y else abs(x) for x, y in zip(a, b, strict=True)]
    return max(math.inf if math.isnan(value) else value for value in apart)


def summary(tokens: int, trainer: Trainer, measured: dict[str, Measured]) -> dict[str, Any]:
    plain = measured[PLAIN]
    targets = FlatLora(trainer.model, FlatLoraConfig(SIGMA), TOTAL_STEPS).targets
    sizes = [target.weight.nbytes for target in targets]
    return {
        "tokens": tokens,
        "micro_batches": [list(batch.shape) for batch in trainer.batches(tokens)],
        "largest_target_bytes": max(sizes),
        "streamed_may_take_bytes": max(sizes) + SLACK,
        "targets_bytes": sum(sizes),
        "kinds": {
            kind: {
                "memory": found.memory,
                "seconds": found.seconds,
                "median_seconds": found.median(),
                "over_plain": found.median() / plain.median(),
                "over_plain_by_block": [
                    statistics.median(own) / statistics.median(theirs)
                    for own, theirs in zip(found.seconds, plain.seconds, strict=True)
                ],
                "losses": found.losses[:3],
                "gradient_norms": found.norms[:3],
                "same_losses_as_resident": found.losses == measured[MODES[0]].losses,
                "bytes_beyond_plain": found.peak - plain.peak,
            }
            for kind, found in measured.items()
        },
    }


def show(result: dict[str, Any], about: dict[str, Any], device: torch.device) -> None:
    rows = []
    for kind, found in result["kinds"].items():
        chosen = f"auto ({found['memory']})" if kind == "auto" else kind
        blocks = found["over_plain_by_block"]
        memory = "not known"
        if device.type == "cuda":
            memory = f"{found['bytes_beyond_plain'] / 1e6:,.1f}"
        if kind == "streamed":
            memory += f" (goal {result['streamed_may_take_bytes'] / 1e6:,.1f})"
        rows.append([
            chosen,
            f"{found['median_seconds']:.4f}",
            f"{result['tokens'] / found['median_seconds']:,.0f}",
            f"{found['over_plain']:.4f}",
            f"{min(blocks):.4f} to {max(blocks):.4f}",
            memory,
            f"{found['losses'][0]:.6f}",
        ])  # fmt: skip
    checkpointing = "with" if about["checkpointing"] else "without"
    graph = ", passes in a CUDA graph" if about["graph"] else ""
    title = (
        f"{result['tokens']:,} tokens a step in {len(result['micro_batches'])} micro-batches, "
        f"{about['parameters'] / 1e9:.2f}e9 parameters, {about['dtype']}, {checkpointing} "
        f"checkpointing{graph}; largest target {result['largest_target_bytes'] / 1e6:.1f} MB, "
        f"all {result['targets_bytes'] / 1e6:,.1f} MB. {report.headline(device)}"
    )
    columns = [
        "", "seconds a step", "tokens/s", "÷ plain LoRA", "by block", "MB beyond plain", "loss",
    ]  # fmt: skip
    report.show(title, columns, rows)


def _device_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step time of Flat-LoRA over that of plain LoRA.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--base-model", type=Path, help="a folder; default: random weights")
    parser.add_argument("--tokens", help="tokens a step, several with commas between")
    parser.add_argument("--rows", type=int, help="sequences of a micro-batch, at most")
    parser.add_argument("--length", type=int, help="tokens of a sequence, at most")
    parser.add_argument("--layers", type=int, help="layers of the model with random weights")
    parser.add_argument("--seconds", type=float, help="to spend on each number of tokens")
    parser.add_argument("--graph", action="store_true", help="capture a step's passes (GPU only)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction)
    parser.add_argument("--small", action="store_true", help="the tiny model, as on a CPU")
    options = parser.parse_args(arguments)
    tiny = options.small or not torch.cuda.is_available()
    if options.base_model is not None:
        rows, length, tokens, seconds = 16, 200, "3200", 60.0
    elif tiny:
        rows, length, tokens, seconds = 1, 32, "16,64", 1.0
    else:
        rows, length, tokens, seconds = 1, 4096, "1024,4096,16384,32768", 20.0
    options.rows, options.length = options.rows or rows, options.length or length
    if options.base_model is not None:
        tokens = str(options.rows * options.length)
    options.tokens = [int(number) for number in (options.tokens or tokens).split(",")]
    options.seconds = options.seconds or seconds
    return options


if __name__ == "__main__":
    sys.exit(main())
