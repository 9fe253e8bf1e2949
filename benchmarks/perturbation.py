"""What the noise itself costs: one noisy copy against a plain copy, and one step's overhead.

    python -m benchmarks.perturbation [--json PATH] [--small] [--rounds 15]

First, for each shape, a noisy copy by the library (kernels where it has them), the same by its
reference, and the published algorithm's one direction, against a copy of the weight to a workspace.
Then all linear layers of an 8B Llama in resident mode: entering and leaving the perturbation of one
optimizer step, against one copy of the same bytes and against the published algorithm's overhead in
the same step. Kinds take turns; medians. The device's time is measured behind a pause that lets the
host ask for everything in advance; the host's time and the time of both (wall) without one.

Ends with 1, and without ratios, if the noisy copies disagree. `--small` is the default on a CPU.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import agreement, llama, published, report
from benchmarks.timing import Kind, Times, take_turns
from flatlora import FlatLora, FlatLoraConfig, Target, ops, sigma_at

SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
SMALL_SHAPES = ((96, 64), (128, 256))
SIGMA, SEED = 0.05, 42
STEP, TOTAL_STEPS = 5000, 10_000
# Far more than any cache holds.
WORKING_SET = 1.5e9


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = options.small or device.type == "cpu"
    try:
        with torch.random.fork_rng(devices=[]):
            copies = [
                noisy_copy_times(shape, device, small=small, rounds=options.rounds)
                for shape in (SMALL_SHAPES if small else SHAPES)
            ]
            show_copies(copies, device)
            step = step_times(llama.TINY if small else llama.EIGHT_B, device, rounds=options.rounds)
            show_step(step, device)
    except report.Disagreement as reason:
        return report.refuse(reason)
    report.write(options.json, "perturbation", device, {"copies": copies, "step": step})
    return 0


def noisy_copy_times(
    shape: tuple[int, int], device: torch.device, *, small: bool, rounds: int
) -> dict[str, Any]:
    """One shape: agreement first, then times in turns."""
    stream = ops.Stream(ops.noise_key(SEED, "layer"), STEP, 0)
    agreed = agreement.require_same_normals(shape, stream, device)
    size = shape[0] * shape[1] * torch.bfloat16.itemsize
    pairs = 2 if small else max(2, math.ceil(WORKING_SET / (2 * size)))
    weights = [_weight(shape, device) for _ in range(pairs)]
    outs = [torch.empty_like(weight) for weight in weights]
    std = weights[0].float().norm(dim=1, keepdim=True) * (SIGMA / math.sqrt(shape[1]))
    agreed |= agreement.require_same_noisy_copy(weights[0], std, stream)
    kinds = _copy_kinds(weights, outs, std, stream)
    times = take_turns(kinds, device, rounds=rounds)
    copy, noisy = times["copy"].device, times["noisy copy"].device
    return {
        "shape": shape,
        "agreement": agreed,
        "seconds": {name: asdict(taken) for name, taken in times.items()},
        "copy_bytes_per_second": 2 * size / copy,
        "share_of_copy_bandwidth": copy / noisy,
        "reference_over_noisy_copy": times["reference"].device / noisy,
        "published_over_copy": times["published, one direction"].device / copy,
        "published_over_noisy_copy": times["published, one direction"].device / noisy,
    }


def _copy_kinds(
    weights: list[Tensor], outs: list[Tensor], std: Tensor, stream: ops.Stream
) -> dict[str, Kind]:
    low = std.to(weights[0].dtype)
    pairs = len(weights)

    def noisy(i: int) -> None:
        ops.noisy_copy(weights[i], std, stream, out=outs[i])

    def reference(i: int) -> None:
        with ops.use("reference"):
            ops.noisy_copy(weights[i], std, stream, out=outs[i])

    return {
        "copy": Kind(lambda i: outs[i].copy_(weights[i]), pairs),
        "noisy copy": Kind(noisy, pairs),
        "reference": Kind(reference, 1),
        "published, one direction": Kind(lambda i: published.add_(weights[i], low, SEED), pairs),
    }


def step_times(shape: llama.Shape, device: torch.device, *, rounds: int) -> dict[str, Any]:
    """All adapted layers of one model: agreement first, then one step's overhead in turns."""
    model, flat_weights = llama.bare_linears(shape, device, torch.bfloat16)
    config = FlatLoraConfig(SIGMA, SEED, memory="resident")
    flat = FlatLora(model, config, TOTAL_STEPS)
    agreed = require_same_step(flat, model, count=len(llama.LINEARS))
    times = take_turns(_step_kinds(flat, flat_weights), device, rounds=rounds)
    copy = min(times[name].device for name in ("copy by tensor", "copy at once"))
    engine, theirs = times["engine"], times["published"]
    return {
        "shape": asdict(shape),
        "targets": len(flat.targets),
        "bytes": flat_weights.nbytes,
        "agreement": agreed,
        "seconds": {name: asdict(taken) for name, taken in times.items()},
        "engine_over_copy": engine.device / copy,
        "engine_wall_over_copy": engine.wall / copy,
        "published_over_engine": theirs.device / engine.device,
        "published_over_engine_wall": theirs.wall / engine.wall,
    }


def _step_kinds(flat: FlatLora, flat_weights: Tensor) -> dict[str, Kind]:
    weights = [target.weight for target in flat.targets]
    flat_out = torch.empty_like(flat_weights)
    ends = list(itertools.accumulate(weight.numel() for weight in weights))
    outs = [
        flat_out[end - weight.numel() : end].view(weight.shape)
        for end, weight in zip(ends, weights, strict=True)
    ]
    steps, theirs = itertools.cycle(range(STEP, TOTAL_STEPS)), published.AddSubtract(flat.targets)

    adapters = [matrix for t in flat.targets for matrix in (t.lora_a, t.lora_b)]

    @torch.no_grad()
    def optimizer_step() -> None:  # so that nothing of the last step's norms may be kept
        torch._foreach_mul_(adapters, 1.0)

    @torch.no_grad()
    def by_tensor(_: int) -> None:
        for out, weight in zip(outs, weights, strict=True):
            out.copy_(weight)

    def engine(_: int) -> None:
        with flat.perturbed(next(steps)):
            pass

    def add_subtract(_: int) -> None:
        theirs.add(SIGMA, SEED)
        theirs.subtract(SEED)

    return {
        "copy by tensor": Kind(by_tensor),
        "copy at once": Kind(lambda _: flat_out.copy_(flat_weights)),
        "engine": Kind(engine, prepare=optimizer_step),
        "published": Kind(add_subtract, prepare=optimizer_step),
    }


@torch.no_grad()
def require_same_step(flat: FlatLora, model: torch.nn.Module, count: int) -> dict[str, float]:
    """The first and last layers' noisy weights inside a step are the reference's.

    A frozen layer that is given the unit matrix answers with the weight that it computes with.

    Raises:
        Disagreement: If a standard deviation or a noisy weight differs by more than roundings.
    """
    sigma, worst = sigma_at(STEP, TOTAL_STEPS, SIGMA), {"std_error": 0.0, "rounded_otherwise": 0.0}
    modules = dict(model.named_modules())
    with flat.perturbed(STEP):
        for target in (*flat.targets[:count], *flat.targets[-count:]):
            weight = target.weight
            base = modules[f"base_model.model.{target.name}.base_layer"]
            unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
            found = base(unit).T.contiguous()
            std, reference_std = _row_std(target, sigma), _by_reference(_row_std, target, sigma)
            stream = ops.Stream(ops.noise_key(SEED, target.name), STEP, 0)
            expected = _by_reference(
                ops.noisy_copy, weight, reference_std, stream, out=torch.empty_like(weight)
            )
            agreed = agreement.require_same_std(std, reference_std)
            theirs = published.merged_row_std(
                weight, target.lora_a, target.lora_b, scaling=target.scaling, sigma=sigma
            )
            agreement.require_same_std(theirs, reference_std, agreement.BFLOAT16_STD_TOLERANCE)
            agreed |= agreement.require_rounded_alike(found, expected, reference_std)
            worst = {name: max(worst[name], agreed[name]) for name in worst}
    return worst


def _row_std(target: Target, sigma: float) -> Tensor:
    return ops.merged_row_std(
        target.weight,
        ops.row_square_norm(target.weight, transposed=False),
        target.lora_a,
        target.lora_b,
        scaling=target.scaling,
        sigma=sigma,
        transposed=False,
    )


def _by_reference(operation: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
    with ops.use("reference"):
        return operation(*given, **named)


def _weight(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)


def show_copies(copies: list[dict[str, Any]], device: torch.device) -> None:
    rows = []
    for measured in copies:
        seconds = measured["seconds"]
        rows.append([
            "×".join(map(str, measured["shape"])),
            *(f"{seconds[name]['device'] * 1e6:.1f}" for name in seconds),
            f"{measured['copy_bytes_per_second'] / 1e12:.2f}",
            f"{measured['share_of_copy_bandwidth']:.3f}",
            f"{measured['published_over_copy']:.1f}",
            f"{measured['published_over_noisy_copy']:.1f}",
        ])  # fmt: skip
    columns = [
        "bfloat16", "copy µs", "noisy copy µs", "reference µs", "published µs", "copy TB/s",
        "share of copy bandwidth", "published ÷ copy", "published ÷ ours",
    ]  # fmt: skip
    report.show(f"One weight. {report.headline(device)}", columns, rows)


def show_step(step: dict[str, Any], device: torch.device) -> None:
    copy = min(step["seconds"][name]["device"] for name in ("copy by tensor", "copy at once"))
    rows = []
    for name, seconds in step["seconds"].items():
        taken = Times(**seconds)
        milliseconds = [f"{s * 1e3:.2f}" for s in (taken.device, taken.host, taken.wall)]
        rows.append([name, *milliseconds, f"{taken.device / copy:.2f}"])
    title = f"One step, {step['targets']} targets, {step['bytes'] / 1e9:.2f} GB, resident."
    columns = ["", "device ms", "host ms", "wall ms", "÷ faster copy"]
    report.show(f"{title} {report.headline(device)}", columns, rows)
    report.show(
        "Overhead of a step",
        ["published ÷ engine, device", "published ÷ engine, wall"],
        [[f"{step['published_over_engine']:.1f}", f"{step['published_over_engine_wall']:.1f}"]],
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The cost of the noise itself.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="tiny shapes, as on a CPU")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
