"""What the perturbation costs: an optimizer step of Flat-LoRA over one of plain LoRA.

    python -m benchmarks.step_time [--json PATH] [--tokens 1024,4096,16384,32768] [--graph]
    python -m benchmarks.step_time --rows 4 --length 4096 --checkpointing --tokens 4096,16384
    python -m benchmarks.step_time --base-model FOLDER [--rows 16] [--length 200]

A step is the forward and backward passes of its micro-batches, clipping, and AdamW's update of
float32 adapters; on a GPU of an 8B Llama with random weights, on a CPU of a tiny one, or of the
base model in a folder. Plain LoRA, resident and streamed take turns in blocks of several steps,
A B C C B A, each block with an engine of its own, so that no mode's buffers count for another; all
have run before the first. Auto mode is one of the two, and it is said which. Nothing waits between
the steps of a block. Medians of all steps of a kind. On a GPU the matrix products run under
autocast to bfloat16. A small step is bound by the host that asks for it; `--graph` captures its
passes in a CUDA graph, so that the device alone is measured. `--checkpointing` keeps no activations
within a layer, so it lengthens a step and *lowers* the ratio; without it is the harder comparison,
and the default.

`--limit` is what the whole run may take, about: a block has five steps or more where that fits, and
never fewer than two.

Ends with 1, and without ratios, unless in every mode and at two steps all adapted layers compute
with the reference's noisy weights (see `agreement.require_same_noise`), the modes have the same
losses (to 2e-5 of a loss; what they compute is the same to the bit, but for the choice of a matrix
product's kernel) and gradient norms (to 1 %), a graph's losses are those without one, and plain
LoRA has others.
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
from torch import Tensor

from benchmarks import agreement, llama, report
from benchmarks.timing import Ticks, synchronise
from benchmarks.trainer import Graph, Trainer
from flatlora import FlatLora, FlatLoraConfig, Memory

PLAIN = "plain LoRA"
MODES = ("resident", "streamed")
BLOCKS = 2 * (1 + len(MODES))
ENOUGH_STEPS, FEWEST_STEPS, MOST_STEPS = 5, 2, 200
SIGMA, SEED = 0.05, 42
FIRST_STEP, TOTAL_STEPS = 500, 1000
LOSS_TOLERANCE, NORM_TOLERANCE = 2e-5, 1e-2
# Inside a capture cuBLAS chooses other kernels. Losses of two steps that are nearer than the second
# number cannot tell a stale graph; those of small steps are not.
GRAPH_TOLERANCE, GRAPH_ROUNDING = 2e-4, 6e-5
# What streamed mode may take beside one noisy copy of the largest target.
SLACK = 16_000_000
# The step, of a block, whose loss a graph has to give too, and that at which it is captured.
CHECKED, CAPTURED = FIRST_STEP + 1, FIRST_STEP - 1

Noise = Callable[[int], AbstractContextManager[None]]


@dataclass
class Measured:
    """What was seen of one kind at one size of step.

    Attributes:
        seconds: Of each step, block by block.
        losses: Of each step of a block; every block has the same.
        norms: Gradient norms before clipping, likewise.
        peak: Most bytes that were allocated on the GPU.
    """

    seconds: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    peak: int = 0

    def median(self) -> float:
        return statistics.median(second for block in self.seconds for second in block)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.monotonic() + options.limit
    trainer, about = build(options, device)
    results = []
    try:
        about["agreement"] = {mode: require_same_noise(trainer, mode) for mode in MODES}
        for i, tokens in enumerate(options.tokens):
            share = tokens / sum(options.tokens[i:]) * (deadline - time.monotonic())
            auto, measured = measure(trainer, tokens, options.seconds, share)
            require_agreement(measured)
            results.append({"auto": auto, **summary(tokens, trainer, measured)})
            show(results[-1], about, device)
    except report.Disagreement as reason:
        return report.refuse(reason)
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
    if options.checkpointing:
        llama.checkpoint_activations(model)
    trainer = Trainer(model, device, vocab, options.rows, options.length, graphs=options.graph)
    about = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "checkpointing": options.checkpointing,
        "graph": options.graph,
        "micro_batch": [options.rows, options.length],
        "base_model": None if options.base_model is None else str(options.base_model),
    }
    return trainer, about


def require_same_noise(trainer: Trainer, mode: str) -> dict[str, float]:
    """One engine's noise is the reference's at two steps, in all layers.

    Raises:
        Disagreement: If it is not.
    """
    _forget_memory(trainer.device)
    flat = _engine(trainer.model, mode)
    assert flat is not None
    found = [
        agreement.require_same_noise(
            trainer.model, flat, step=step, total_steps=TOTAL_STEPS, sigma=SIGMA, seed=SEED
        )
        for step in (FIRST_STEP, FIRST_STEP + 1)
    ]
    return {name: max(agreed[name] for agreed in found) for name in found[0]}


def measure(
    trainer: Trainer, tokens: int, seconds: float, share: float
) -> tuple[str, dict[str, Measured]]:
    """All kinds at one size of step, in blocks A B C C B A.

    Args:
        trainer: The model.
        tokens: Of a step.
        seconds: To spend on steps, unless five of each block take longer.
        share: Seconds that all of this may take, unless two steps of each block take longer.

    Returns:
        The mode that auto chooses, and what was measured by kind.
    """
    started, batches = time.monotonic(), trainer.batches(tokens)
    kinds: dict[str, Measured] = {kind: Measured() for kind in (PLAIN, *MODES)}
    warm = {kind: _warm_up(trainer, batches, kind) for kind in kinds}
    once = max(warm.values()) * len(batches)
    auto = _auto_mode(trainer, batches)
    # beside its steps a block warms up and, with graphs, captures one or compares with it
    beside = (3 if trainer.graphs else 0) * once + 2 * max(warm.values())
    room = (share - (time.monotonic() - started)) / BLOCKS - beside
    steps = min(MOST_STEPS, max(ENOUGH_STEPS, int(seconds / BLOCKS / once)), int(room / once))
    for kind in (*kinds, *reversed(kinds)):
        _run_block(trainer, batches, kind, kinds[kind], max(FEWEST_STEPS, steps))
    return auto, kinds


def _warm_up(trainer: Trainer, batches: Sequence[Tensor], kind: str) -> float:
    """Run one kind; seconds of a micro-batch."""
    _forget_memory(trainer.device)
    flat = _engine(trainer.model, kind)
    noise = _noise(flat)
    _block(trainer, batches[:1], noise, steps=1)
    (second,), _ = _block(trainer, batches[:1], noise, steps=1)
    return second


def _auto_mode(trainer: Trainer, batches: Sequence[Tensor]) -> str:
    """What auto mode is, after a step that shows what training needs."""
    _forget_memory(trainer.device)
    trainer.step(batches[:1], nullcontext())
    flat = FlatLora(trainer.model, FlatLoraConfig(SIGMA, SEED, memory="auto"), TOTAL_STEPS)
    with flat.perturbed(FIRST_STEP):
        return flat.memory


def _run_block(
    trainer: Trainer, batches: Sequence[Tensor], kind: str, into: Measured, steps: int
) -> None:
    """Steps of one kind with an engine of its own, gone with its buffers afterwards.

    Raises:
        Disagreement: If a graph, replayed at another step than it was captured at, has another
            loss than the same step without it.
    """
    _forget_memory(trainer.device)
    flat = _engine(trainer.model, kind)
    noise = _noise(flat)
    for step in (FIRST_STEP - 2, FIRST_STEP - 1):  # the norms of the base, the allocator
        trainer.step(batches[:1], noise(step))
    graph, eager = None, []
    if trainer.graphs:
        if not into.seconds:
            eager = [_eager_loss(trainer, batches, noise, step) for step in (CHECKED, CAPTURED)]
        with noise(CAPTURED):
            graph = Graph(trainer, batches)
    seconds, outputs = _block(trainer, batches, noise, steps, graph)
    trainer.forget()
    into.seconds.append(seconds)
    into.losses, into.norms = ([float(x) for x in column] for column in zip(*outputs, strict=True))
    if trainer.device.type == "cuda":
        into.peak = max(into.peak, torch.cuda.max_memory_allocated(trainer.device))
    if eager:
        _require_own_step(kind, into.losses[CHECKED - FIRST_STEP], *eager)


def _eager_loss(trainer: Trainer, batches: Sequence[Tensor], noise: Noise, step: int) -> float:
    with noise(step):
        loss = float(trainer.passes(batches))
    trainer.forget()
    return loss


def _require_own_step(kind: str, replayed: float, own: float, captured: float) -> None:
    """A replay has the loss of its own step, and not of the step that was captured."""
    apart = _apart([replayed], [own])
    stale = kind != PLAIN and apart >= _apart([replayed], [captured])
    stale &= _apart([own], [captured]) > GRAPH_ROUNDING
    if apart > GRAPH_TOLERANCE or stale:
        raise report.Disagreement(f"{kind}: a graph's loss differs by {apart:.1e} from its step's")


def _forget_memory(device: torch.device) -> None:
    """Let go of what nothing uses, and of the highest use so far."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


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


def _engine(model: torch.nn.Module, kind: str) -> FlatLora | None:
    if kind == PLAIN:
        return None
    memory: Memory = next(mode for mode in get_args(Memory) if mode == kind)
    return FlatLora(model, FlatLoraConfig(SIGMA, SEED, memory=memory), TOTAL_STEPS)


def _noise(flat: FlatLora | None) -> Noise:
    return (lambda _: nullcontext()) if flat is None else flat.perturbed


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
        blocks = found["over_plain_by_block"]
        memory = "not known"
        if device.type == "cuda":
            memory = f"{found['bytes_beyond_plain'] / 1e6:,.1f}"
        if kind == "streamed":
            memory += f" (goal {result['streamed_may_take_bytes'] / 1e6:,.1f})"
        rows.append([
            kind,
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
        f"all {result['targets_bytes'] / 1e6:,.1f} MB; auto is {result['auto']}; blocks of "
        f"{len(result['kinds'][PLAIN]['seconds'][0])} steps. {report.headline(device)}"
    )
    columns = [
        "", "seconds a step", "tokens/s", "÷ plain LoRA", "by block", "MB beyond plain", "loss",
    ]  # fmt: skip
    report.show(title, columns, rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Step time of Flat-LoRA over that of plain LoRA.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--base-model", type=Path, help="a folder; default: random weights")
    parser.add_argument("--tokens", help="tokens a step, several with commas between")
    parser.add_argument("--rows", type=int, help="sequences of a micro-batch, at most")
    parser.add_argument("--length", type=int, help="tokens of a sequence, at most")
    parser.add_argument("--layers", type=int, help="layers of the model with random weights")
    parser.add_argument("--seconds", type=float, help="of steps, for each number of tokens")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of the whole run")
    parser.add_argument("--graph", action="store_true", help="capture a step's passes (GPU only)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--small", action="store_true", help="the tiny model, as on a CPU")
    options = parser.parse_args(arguments)
    tiny = options.small or not torch.cuda.is_available()
    if options.base_model is not None:
        rows, length, tokens, seconds = 16, 200, "3200", 60.0
    elif tiny:
        rows, length, tokens, seconds = 1, 32, "16,64", 1.0
    else:
        rows, length, tokens, seconds = 1, 2048, "1024,4096,16384,32768", 12.0
    options.rows, options.length = options.rows or rows, options.length or length
    if options.base_model is not None:
        tokens = str(options.rows * options.length)
    options.tokens = [int(number) for number in (options.tokens or tokens).split(",")]
    options.seconds = options.seconds or seconds
    return options


if __name__ == "__main__":
    sys.exit(main())
