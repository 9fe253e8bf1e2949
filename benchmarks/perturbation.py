"""What the noise itself costs: one noisy copy against a plain copy, and one step's overhead.

    python -m benchmarks.perturbation [--json PATH] [--small] [--rounds 15]

First, for each shape, a noisy copy by the library (kernels where it has them), the same by its
reference, and the published algorithm's one direction, against a copy of the weight to a workspace.
Then all linear layers of an 8B Llama: one optimizer step's overhead against one copy of the same
bytes, and against the published algorithm's in the same step. Resident mode's is entering the
perturbation, where all noisy copies are written; streamed mode's is entering it, where the norms
are taken, and two noisy copies of each layer for each micro-batch, forward and backward. Beside
them what comes once in a run, and the memory that each mode takes beyond the model. Kinds take
turns; medians. The device's time is measured behind a pause that lets the host ask for everything
in advance; the host's time and the time of both (wall) without one.

Ends with 1, and without ratios, if a kernel's noisy copies differ from the reference's, or if in a
mode any layer's noisy weight does at one of two steps (see `agreement.require_same_noise`).
`--small` is the default on a CPU, where no kernel is compared.
"""

import argparse
import gc
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks import agreement, llama, published, report
from benchmarks.timing import Kind, Times, synchronise, take_turns
from flatlora import FlatLora, FlatLoraConfig, Memory, ops

SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
SMALL_SHAPES = ((96, 64), (128, 256))
SIGMA, SEED = 0.05, 42
STEP, TOTAL_STEPS = 5000, 10_000
MODES = ("resident", "streamed")
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
    size = shape[0] * shape[1] * torch.bfloat16.itemsize
    pairs = 2 if small else max(2, math.ceil(WORKING_SET / (2 * size)))
    weights = [_weight(shape, device) for _ in range(pairs)]
    outs = [torch.empty_like(weight) for weight in weights]
    std = weights[0].float().norm(dim=1, keepdim=True) * (SIGMA / math.sqrt(shape[1]))
    kinds, agreed = _copy_kinds(weights, outs, std, stream), {}
    if ops.kernels_serve(weights[0]):
        agreed = agreement.require_same_normals(shape, stream, device)
        agreed |= agreement.require_same_noisy_copy(weights[0], std, stream)
    else:
        del kinds["reference"]  # it is what makes the noisy copies here
    times = take_turns(kinds, device, rounds=rounds)
    copy, noisy = times["copy"].device, times["noisy copy"].device
    return {
        "shape": shape,
        "agreement": agreed or report.NO_KERNELS,
        "seconds": {name: asdict(taken) for name, taken in times.items()},
        "copy_bytes_per_second": 2 * size / copy,
        "share_of_copy_bandwidth": copy / noisy,
        "reference_over_noisy_copy": (
            times["reference"].device / noisy if "reference" in times else None
        ),
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
    agreed = {mode: require_same_step(model, mode) for mode in MODES}
    engines, set_up = {}, {}
    for mode in MODES:
        engines[mode], set_up[mode] = _set_up(model, mode, device)
    times = take_turns(_step_kinds(engines, flat_weights), device, rounds=rounds)
    copy = min(times[name].device for name in ("copy by tensor", "copy at once"))
    ours = [name for name in times if name.startswith(MODES)]
    return {
        "shape": asdict(shape),
        "targets": len(engines["resident"].targets),
        "bytes": flat_weights.nbytes,
        "largest_target_bytes": max(t.weight.nbytes for t in engines["resident"].targets),
        "agreement": agreed,
        "set_up": set_up,
        "seconds": {name: asdict(taken) for name, taken in times.items()},
        "over_copy": {name: times[name].device / copy for name in ours},
        "wall_over_copy": {name: times[name].wall / copy for name in ours},
        "published_over": {name: times["published"].device / times[name].device for name in ours},
        "published_over_wall": {name: times["published"].wall / times[name].wall for name in ours},
    }


def require_same_step(model: nn.Module, mode: str) -> dict[str, float]:
    """At two steps all layers compute with the reference's noisy weights, as strong as published.

    Raises:
        Disagreement: If a noisy weight differs by more than roundings, or a standard deviation of
            the published algorithm by more than bfloat16's.
    """
    flat, worst = _engine(model, mode), {"published_std_error": 0.0}
    for step in (STEP, STEP + 1):
        worst |= agreement.require_same_noise(
            model, flat, step=step, total_steps=TOTAL_STEPS, sigma=SIGMA, seed=SEED
        )
    for layer in agreement.adapted_layers(model).values():
        units = agreement.compared_units(layer)
        theirs = published.merged_row_std(
            layer.base_layer.weight[units],
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight[units],
            scaling=layer.scaling["default"],
            sigma=SIGMA,
        )
        std = agreement.reference_std(layer, units, SIGMA)
        agreed = agreement.require_same_std(theirs, std, agreement.BFLOAT16_STD_TOLERANCE)
        worst["published_std_error"] = max(worst["published_std_error"], agreed["std_error"])
    return worst


def _engine(model: nn.Module, mode: str) -> FlatLora:
    memory: Memory = next(known for known in get_args(Memory) if known == mode)
    return FlatLora(model, FlatLoraConfig(SIGMA, SEED, memory=memory), TOTAL_STEPS)


def _set_up(
    model: nn.Module, mode: str, device: torch.device
) -> tuple[FlatLora, dict[str, float | None]]:
    """An engine; the seconds that it needs once in a run, and the bytes it takes at most.

    Kernels are compiled already: other engines of the same model have been entered.
    """
    before = _allocated(device)
    moments = [_now(device)]
    flat = _engine(model, mode)
    moments.append(_now(device))
    for noise in flat._perturbation._noises:
        noise.square_norm()
    moments.append(_now(device))
    with flat.perturbed(STEP):
        moments.append(_now(device))
        if mode == "streamed":
            _write_all(flat, times=1)
    build, norms, enter = (b - a for a, b in itertools.pairwise(moments))
    taken = None
    if before is not None:
        taken = torch.cuda.max_memory_allocated(device) - before
    return flat, {
        "build": build, "base_norms": norms, "first_entry": enter, "bytes": taken,
    }  # fmt: skip


def _allocated(device: torch.device) -> int | None:
    """Bytes allocated on a GPU, from where the peak starts anew; not known elsewhere."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


@torch.no_grad()
def _write_all(flat: FlatLora, times: int) -> None:
    """What the passes of streamed mode do but for the products."""
    for _ in range(times):
        for noise in flat._perturbation._noises:
            noise.write_to_workspace(noise.target.weight, noise.std, noise.clock)


def _step_kinds(engines: dict[str, FlatLora], flat_weights: Tensor) -> dict[str, Kind]:
    targets = engines["resident"].targets
    weights = [target.weight for target in targets]
    flat_out = torch.empty_like(flat_weights)
    ends = list(itertools.accumulate(weight.numel() for weight in weights))
    outs = [
        flat_out[end - weight.numel() : end].view(weight.shape)
        for end, weight in zip(ends, weights, strict=True)
    ]
    steps, theirs = itertools.cycle(range(STEP, TOTAL_STEPS)), published.AddSubtract(targets)
    adapters = [matrix for t in targets for matrix in (t.lora_a, t.lora_b)]

    @torch.no_grad()
    def optimizer_step() -> None:  # so that nothing of the last step's norms may be kept
        torch._foreach_mul_(adapters, 1.0)

    @torch.no_grad()
    def by_tensor(_: int) -> None:
        for out, weight in zip(outs, weights, strict=True):
            out.copy_(weight)

    def engine(mode: str, writings: int = 0) -> Kind:
        def enter(_: int) -> None:
            with engines[mode].perturbed(next(steps)):
                _write_all(engines[mode], writings)

        return Kind(enter, prepare=optimizer_step)

    def add_subtract(_: int) -> None:
        theirs.add(SIGMA, SEED)
        theirs.subtract(SEED)

    return {
        "copy by tensor": Kind(by_tensor),
        "copy at once": Kind(lambda _: flat_out.copy_(flat_weights)),
        "resident": engine("resident"),
        "streamed, entry": engine("streamed"),
        "streamed, 1 micro-batch": engine("streamed", 2),
        "streamed, 4 micro-batches": engine("streamed", 8),
        "published": Kind(add_subtract, prepare=optimizer_step),
    }


def _weight(shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)


def show_copies(copies: list[dict[str, Any]], device: torch.device) -> None:
    rows = []
    for measured in copies:
        seconds = measured["seconds"]
        rows.append([
            "×".join(map(str, measured["shape"])),
            *(
                f"{seconds[name]['device'] * 1e6:.1f}" if name in seconds else report.NO_KERNELS
                for name in ("copy", "noisy copy", "reference", "published, one direction")
            ),
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
        ratios = [
            f"{step[over][name]:.1f}" if name in step[over] else ""
            for over in ("published_over", "published_over_wall")
        ]
        rows.append([name, *milliseconds, f"{taken.device / copy:.2f}", *ratios])
    title = f"One step, {step['targets']} targets, {step['bytes'] / 1e9:.2f} GB."
    columns = [
        "", "device ms", "host ms", "wall ms", "÷ faster copy", "published ÷ ours, device", "wall",
    ]  # fmt: skip
    report.show(f"{title} {report.headline(device)}", columns, rows)
    rows = []
    for mode, needed in step["set_up"].items():
        parts = [needed[name] for name in ("build", "base_norms", "first_entry")]
        memory = "not known" if needed["bytes"] is None else f"{needed['bytes'] / 1e6:,.1f}"
        rows.append([mode, *(f"{s * 1e3:.1f}" for s in (sum(parts), *parts)), memory])
    title = f"Once in a run; largest target {step['largest_target_bytes'] / 1e6:.1f} MB."
    columns = ["", "set-up ms", "building", "base norms", "first entry", "MB beyond the model"]
    report.show(title, columns, rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The cost of the noise itself.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="tiny shapes, as on a CPU")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
