"""Tokens a second of LoRA and Flat-LoRA, rung by rung, and of TRL's trainer, in one run.

    python -m benchmarks.throughput [--json PATH] [--only TRL …] [--layers N] [--compile]
    python -m benchmarks.throughput --data ROWS.jsonl [--learnt 0.5]

The model has the shape of Llama-3.1-8B and random weights; LoRA of rank 16 on all linear layers
with float32 weights; AdamW; no dropout. A step is four sequences of up to 4,096 tokens, packed with
rows of varied lengths (see `benchmarks.sequences`); only real tokens are counted, and only those of
steps after the first two. TRL is fed the same sequences in the same order, and once more
sequences that are one full row each: these need no mask, which is the best that its attention can
have without flash-attn. A rung's memory is the highest that the allocator had given out.

A rung does not count unless it computes what the reference does: PEFT's layers and transformers',
each row by itself. Its loss and its gradients of the first step may differ by roundings (see
`LOSS_TOLERANCE` and `GRADIENT_TOLERANCE`), and with noise its gradients must be nearer to the
reference with that noise than to the one without. A rung for which memory does not suffice is tried
again with half as many sequences a micro-batch. Ends with 1 if a rung was refused.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ladder, llama, report
from benchmarks.ladder import Base, Measured, Rung
from benchmarks.sequences import Data, from_file, full_data, packed_data

LENGTH, SEQUENCES, WARM, TIMED = 4096, 4, 2, 4
TINY_LENGTH = 64
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-4}
"""Share of a loss by which two ways to compute it may differ."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Length of the difference of two gradients, a share of the gradient's own."""

DEFAULT = "TRL, its defaults"
LIGER = "TRL, no checkpointing, Liger"
PLAIN = "+ repeatable, as the trainer runs"
NOISY = "σ, resident", "σ, streamed"
CHECKPOINTED = "checkpointing"
FOUR_BIT, NOISY_FOUR_BIT = "4-bit, checkpointing", "4-bit, checkpointing, σ"


def rungs() -> Iterator[Rung]:
    """From TRL's defaults to ours; what needs a 4-bit base comes last.

    TRL has no repeatable kernels by default, and is measured without.
    """
    for data in ("full", "packed"):
        theirs = Rung(DEFAULT, data, rows=4, trl=True, fused_kernels=False, checkpointing=True)
        yield theirs
        theirs = replace(theirs, name="TRL, no checkpointing", rows=2, checkpointing=False)
        yield theirs
        yield replace(theirs, name=LIGER, fused_kernels=True)
    rung = Rung(
        "PEFT, its input cast, eager loss",
        input_cast=True,
        fused_loss=False,
        fused_kernels=False,
        varlen=False,
        fast=False,
        repeatable=False,
    )
    yield rung
    for step in (
        partial(replace, name="no input cast", input_cast=False),
        partial(replace, name="+ fused cross-entropy", fused_loss=True),
        partial(replace, name="+ fused norms, rotations, activations", fused_kernels=True),
        partial(replace, name="+ variable-length attention", varlen=True),
        partial(replace, name="+ our LoRA path", fast=True),
        partial(replace, name=PLAIN, repeatable=True),
    ):
        rung = step(rung)
        yield rung
    yield replace(rung, name=PLAIN, data="full")
    yield replace(rung, name="+ compiled layers", compiled=True)
    yield replace(rung, name=NOISY[0], sigma=ladder.SIGMA, memory="resident")
    yield replace(rung, name=NOISY[1], sigma=ladder.SIGMA, memory="streamed")
    checkpointed = replace(rung, name=CHECKPOINTED, rows=4, checkpointing=True)
    yield checkpointed
    yield replace(checkpointed, name="checkpointing, σ", sigma=ladder.SIGMA, memory="streamed")
    four_bit = replace(checkpointed, name=FOUR_BIT, data="short", rows=1, bits=4)
    yield four_bit
    yield replace(four_bit, name=NOISY_FOUR_BIT, sigma=ladder.SIGMA, memory="streamed")


@dataclass
class Step:
    """A rung as it came out.

    Attributes:
        rung: What was asked for.
        rows: Sequences of a micro-batch that memory sufficed for; 0 if not even one.
        found: What was seen.
        tokens: Real tokens of each timed step.
        gradient_apart: By how much its first gradients differ from the reference's, a share.
        refusal: Why it does not count.
    """

    rung: Rung
    rows: int
    found: Measured
    tokens: list[int]
    gradient_apart: float | None = None
    refusal: str | None = None

    @property
    def speed(self) -> float | None:
        """Real tokens a second: the median over steps, each with its own tokens."""
        if not self.found.seconds or self.refusal:
            return None
        pairs = zip(self.tokens, self.found.seconds, strict=True)
        speeds = torch.tensor([tokens / seconds for tokens, seconds in pairs])
        return float(speeds.quantile(0.5))


class Climb:
    """The rungs of one run, on one base model.

    Args:
        base: The base model.
        data: By name.
    """

    def __init__(self, base: Base, data: dict[str, Data]) -> None:
        self._base, self._data = base, data
        self._references: dict[tuple[str, float, bool], Measured] = {}

    def measure(self, rung: Rung) -> Step:
        """One rung, refused if it computes something else."""
        if rung.bits and not self._base.is_quantised:
            self._base.quantise()
        data = self._data[rung.data]
        expected = self._reference(rung.data, rung.sigma)
        run = run_trl if rung.trl else ladder.run_own
        rows, found = ladder.with_what_fits(
            lambda rows: run(self._base, replace(rung, rows=rows), data, WARM), rung.rows
        )
        if found is None:
            return Step(rung, 0, Measured(), [], refusal="out of memory")
        tokens = [data.tokens(step) for step in range(WARM, len(data.steps))]
        step = Step(rung, rows, found, tokens, apart(found.gradient, expected.gradient))
        step.refusal = differs(found, expected, self._base.dtype)
        if rung.sigma and not step.refusal:
            step.refusal = is_without(found, expected, self._reference(rung.data, 0.0))
        found.gradient = torch.empty(0)  # as large as the adapter, and compared
        return step

    def _reference(self, data: str, sigma: float) -> Measured:
        key = data, sigma, self._base.is_quantised
        if key not in self._references:
            with ladder.untouched():
                self._references[key] = ladder.reference(self._base, self._data[data], sigma)
        return self._references[key]


def differs(found: Measured, expected: Measured, dtype: torch.dtype) -> str | None:
    """In what a rung's first step differs from the reference's by more than roundings."""
    loss = abs(found.losses[0] / expected.losses[0] - 1)
    if not loss <= LOSS_TOLERANCE[dtype]:
        return f"its loss differs by {loss:.1e} of itself"
    gradient = apart(found.gradient, expected.gradient)
    if not gradient <= GRADIENT_TOLERANCE[dtype]:
        return f"its gradients differ by {gradient:.1e} of themselves"
    return None


def is_without(found: Measured, noisy: Measured, plain: Measured) -> str | None:
    """Whether a rung with noise computes what the reference does without."""
    own, other = (apart(found.gradient, each.gradient) for each in (noisy, plain))
    return None if own < other else f"its noise is not there ({own:.1e}, without {other:.1e})"


def apart(found: Tensor, expected: Tensor) -> float:
    """Length of the difference, a share of what was expected."""
    return float((found - expected).norm() / expected.norm())


def run_trl(base: Base, rung: Rung, data: Data, warm: int) -> Measured:
    """The same steps by ``SFTTrainer``."""
    from benchmarks.trl_run import run

    with tempfile.TemporaryDirectory() as folder:
        return run(base, rung, data, warm, Path(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = llama.TINY if options.small or device.type == "cpu" else llama.EIGHT_B
    shape = replace(shape, layers=options.layers or shape.layers)
    base = Base(shape, device)
    weights = base.matrix_weights()
    climb = Climb(base, datasets(options, shape))
    steps: list[Step] = []
    for rung in chosen(options, device):
        steps.append(climb.measure(rung))
        sys.stderr.write(f"{rung.name} ({rung.data}): {_said(steps[-1])}\n")
        report.write(options.json, "throughput", device, results(steps, climb, weights, device))
    show(steps, climb, weights, device)
    return 1 if any(step.refusal and step.rows for step in steps) else 0


def chosen(options: argparse.Namespace, device: torch.device) -> list[Rung]:
    """The rungs that were asked for; 4-bit ones on a GPU alone."""
    found = [rung for rung in rungs() if options.compile or not rung.compiled]
    found = [rung for rung in found if not rung.bits or device.type == "cuda"]
    wanted = options.only or [""]
    return [rung for rung in found if any(name in f"{rung.name} ({rung.data})" for name in wanted)]


def datasets(options: argparse.Namespace, shape: llama.Shape) -> dict[str, Data]:
    sizes: dict[str, Any] = {"sequences": SEQUENCES, "steps": WARM + options.steps}
    drawn: dict[str, Any] = {**sizes, "vocab": shape.vocab, "seed": ladder.SEED}
    length = TINY_LENGTH if shape.hidden == llama.TINY.hidden else LENGTH
    return {
        "full": full_data(length, **drawn),
        "packed": packed_data(length, **drawn, learnt=options.learnt)
        if options.data is None
        else from_file(options.data, length, **sizes, seed=ladder.SEED),
        "short": packed_data(length // 2, **drawn, learnt=options.learnt),
    }


def results(
    steps: Sequence[Step], climb: Climb, weights: int, device: torch.device
) -> dict[str, Any]:
    asked = bars(steps) if _is_whole(weights, device) else []
    return {
        "matrix_weights": weights,
        "data": {name: facts(data) for name, data in climb._data.items()},
        "rungs": [record(step, weights) for step in steps],
        "bars": [dict(zip(("bar", "found", "reached"), bar, strict=True)) for bar in asked],
    }


def facts(data: Data) -> dict[str, Any]:
    sequences = [sequence for step in data.steps for sequence in step]
    sizes = torch.tensor([float(len(row.ids)) for rows in sequences for row in rows])
    return {
        "name": data.name,
        "length": data.length,
        "rows": len(sizes),
        "mean_row": float(sizes.mean()),
        "percentiles": sizes.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(),
        "filled": float(sizes.sum()) / (len(sequences) * data.length),
    }


def record(step: Step, weights: int) -> dict[str, Any]:
    found, speed = step.found, step.speed
    return {
        "rung": vars(step.rung),
        "rows": step.rows,
        "refusal": step.refusal,
        "missing": found.missing,
        "seconds": found.seconds,
        "tokens": step.tokens,
        "tokens_per_second": speed,
        "tflops": speed and 4 * weights * speed / 1e12,
        "peak_bytes": found.peak,
        "losses": found.losses,
        "gradient_apart": step.gradient_apart,
    }


def bars(steps: Sequence[Step]) -> list[tuple[str, float, bool]]:
    """What the design asks for on an 8B model, what was found, and whether that reaches it."""

    def best(*names: str, data: str | None = None) -> Step | None:
        counted = [s for s in steps if s.rung.name in names and data in (None, s.rung.data)]
        return max((s for s in counted if s.speed), key=lambda s: s.speed or 0.0, default=None)

    plain, noisy = best(PLAIN, data="packed"), best(*NOISY)
    their_fast, their_default = best(LIGER), best(DEFAULT)
    asked: list[tuple[str, float, bool]] = []

    def at_least(what: str, found: float | None, bar: float) -> None:
        if found is not None:
            asked.append((f"{what} ≥ {bar:,g}", found, found >= bar))

    def at_most(what: str, step: Step | None, gib: float) -> None:
        if step is not None and step.found.peak:
            asked.append((f"{what}, GiB ≤ {gib:g}", used := _gib(step), used <= gib))

    at_least("plain, tokens/s", plain.speed if plain else None, 15_000)
    at_least("σ, tokens/s", noisy.speed if noisy else None, 14_850)
    at_most("plain", plain, 50)
    at_most("σ", noisy, 50)
    at_least("plain ÷ TRL with Liger", _over(plain, their_fast), 1.25)
    at_least("checkpointing ÷ TRL's defaults", _over(best(CHECKPOINTED), their_default), 1.25)
    at_most("4-bit with σ", best(NOISY_FOUR_BIT), 12)
    return asked


def _over(ours: Step | None, theirs: Step | None) -> float | None:
    if ours is None or theirs is None or not ours.speed or not theirs.speed:
        return None
    return ours.speed / theirs.speed


def _is_whole(weights: int, device: torch.device) -> bool:
    """Whether it is an 8B model on a GPU."""
    return device.type == "cuda" and weights > 7e9


def _gib(step: Step) -> float:
    return step.found.peak / 2**30


def show(steps: Sequence[Step], climb: Climb, weights: int, device: torch.device) -> None:
    rows, before = [], None
    for step in steps:
        speed = step.speed
        found = record(step, weights)
        rows.append([
            step.rung.name,
            step.rung.data,
            f"{step.rows}×{climb._data[step.rung.data].length}",
            f"{speed:,.0f}" if speed else (step.refusal or ""),
            f"{speed / before:.3f}" if speed and before else "",
            f"{found['tflops']:.0f}" if speed else "",
            f"{_gib(step):.1f}" if step.found.peak else "",
            f"{step.found.losses[0]:.5f}" if step.found.losses else "",
            "" if step.gradient_apart is None else f"{step.gradient_apart:.1e}",
            ", ".join(step.found.missing),
        ])  # fmt: skip
        before = speed or before
    columns = [
        "", "data", "micro-batch", "tokens/s", "÷ before", "TFLOP/s", "GiB", "loss",
        "gradient off", "not here",
    ]  # fmt: skip
    packed = facts(climb._data["packed"])
    title = (
        f"LoRA r {llama.RANK}, {weights / 1e9:.2f}e9 matrix weights, steps of {SEQUENCES} "
        f"sequences; packed: {packed['rows']} rows of {packed['mean_row']:.0f} tokens in the mean, "
        f"{packed['filled']:.1%} filled. {report.headline(device)}"
    )
    report.show(title, columns, rows)
    if asked := bars(steps) if _is_whole(weights, device) else []:
        report.show(
            "What the design asks for on an H200 with 8B",
            ["", "found", ""],
            [[what, f"{found:,.2f}", "yes" if ok else "NO"] for what, found, ok in asked],
        )


def _said(step: Step) -> str:
    return step.refusal or f"{step.speed:,.0f} tokens/s, {_gib(step):.1f} GiB"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens a second, rung by rung.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, help="JSON lines with input_ids and labels")
    parser.add_argument(
        "--learnt", type=float, default=1.0, help="share of a row's tokens in the loss"
    )
    parser.add_argument(
        "--only", nargs="+", help="rungs that have this, as in 'σ, resident (packed)'"
    )
    parser.add_argument("--steps", type=int, default=TIMED, help="that are timed")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--compile", action="store_true", help="also compile the layers")
    parser.add_argument("--small", action="store_true", help="the tiny model, as on a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
