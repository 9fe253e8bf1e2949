"""What remains in the base weights: ours, and the published add and subtract.

    python -m benchmarks.drift [--json PATH] [--small] [--steps 1000] [--seed 42]

Perturbed optimizer steps, a forward and a backward pass in each, on a stack of bfloat16 linear
layers with LoRA. Counts the bytes of the base weights that differ from those before the first
step, and the relative Frobenius distance. The published algorithm once with its schedule, and once
at full strength throughout, as a resumed or late step sees it.

Ends with 1, and without a table, if the methods do not perturb the layers' outputs equally.
`--small` is the default on a CPU.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import llama, published, report
from flatlora import FlatLora, FlatLoraConfig, sigma_at

SIGMA = 0.05
LAYERS = 4
TOKENS = 64
SHOWN = (1, 10, 100, 1000)
# Share by which the methods' effects on the outputs may differ: they draw other noise.
STRENGTH_TOLERANCE = 0.05
# So many that their mean is known to a quarter of that.
DRAWS = 65

Perturb = Callable[[int, int], AbstractContextManager[None]]
"""Perturbs at a step, by one of several draws."""


class Stack(nn.Module):
    """Linear layers in a row, square, with an adapter each."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(width, width, False, device, torch.bfloat16) for _ in range(LAYERS))
        )
        for weight in self.parameters():
            nn.init.normal_(weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = 96 if options.small or device.type == "cpu" else 4096
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = llama.adapted(Stack(width, device), targets="all-linear").to(device)
        methods = measure(model, width, options.steps, options.seed)
    try:
        require_same_strength(methods)
    except report.Disagreement as reason:
        return report.refuse(reason)
    show(methods, width, device)
    report.write(options.json, "drift", device, {"width": width, "methods": methods})
    return 0


def measure(model: nn.Module, width: int, steps: int, seed: int) -> dict[str, dict[str, Any]]:
    """Every method from the same weights."""
    flat = FlatLora(model, FlatLoraConfig(SIGMA, seed), total_steps=steps + 1)
    theirs = published.AddSubtract(flat.targets)
    last = sigma_at(steps, steps + 1, SIGMA)  # all but full strength, unless steps are few

    def add_subtract(sigma: Callable[[int], float]) -> Perturb:
        @contextmanager
        def perturbed(step: int, draw: int) -> Iterator[None]:
            address = seed + step * DRAWS + draw
            theirs.add(sigma(step), address)
            yield
            theirs.subtract(address)

        return perturbed

    methods: dict[str, Perturb] = {
        "flatlora": flat.perturbed,
        "add and subtract": add_subtract(lambda step: sigma_at(step, steps + 1, SIGMA)),
        "add and subtract, σ throughout": add_subtract(lambda _: last),
    }
    weights = [target.weight for target in flat.targets]
    before = [weight.detach().clone() for weight in weights]
    x = torch.randn(TOKENS, width, dtype=torch.bfloat16, device=weights[0].device)
    results = {}
    for name, perturb in methods.items():
        results[name] = run(model, perturb, x, weights, before, steps)
        for weight, original in zip(weights, before, strict=True):
            weight.data.copy_(original)
    return results


def run(
    model: nn.Module,
    perturb: Perturb,
    x: Tensor,
    weights: list[Tensor],
    before: list[Tensor],
    steps: int,
) -> dict[str, Any]:
    """Perturbed steps of one method; steps count from 1, as the schedule gives step 0 no noise."""
    drifts = []
    for step in range(1, steps + 1):
        with perturb(step, 0):
            model(x).float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        if step in SHOWN or step == steps:
            drifts.append({"steps": step, **drift(weights, before)})
    return {"drift": drifts, "relative_change_of_outputs": strength(model, perturb, x, steps)}


@torch.no_grad()
def strength(model: nn.Module, perturb: Perturb, x: Tensor, step: int) -> float:
    """How much a step's noise changes the outputs, by root mean square over some draws."""
    squares = 0.0
    for draw in range(1, DRAWS):
        clean = model(x).float()
        with perturb(step, draw):
            squares += float((model(x).float() - clean).square().mean() / clean.square().mean())
    return math.sqrt(squares / (DRAWS - 1))


@torch.no_grad()
def drift(weights: list[Tensor], before: list[Tensor]) -> dict[str, float]:
    """How far the weights are from what they were."""
    pairs = list(zip(weights, before, strict=True))
    changed = sum(int((w.view(torch.uint8) != b.view(torch.uint8)).sum()) for w, b in pairs)
    differing = sum(int((w.view(torch.int16) != b.view(torch.int16)).sum()) for w, b in pairs)
    distance = sum(float((w.double() - b.double()).square().sum()) for w, b in pairs)
    norm = sum(float(b.double().square().sum()) for b in before)
    return {
        "bytes_changed": changed,
        "bytes": sum(b.nbytes for b in before),
        "weights_changed": differing / sum(b.numel() for b in before),
        "relative_distance": math.sqrt(distance / norm),
    }


def require_same_strength(methods: dict[str, dict[str, Any]]) -> None:
    """All methods change the outputs of the last step as much: none drifts less by doing less.

    The last step is the one at which the schedule has reached full strength.

    Raises:
        Disagreement: If one changes them by another amount than ours.
    """
    ours = methods["flatlora"]["relative_change_of_outputs"]
    for name, method in methods.items():
        theirs = method["relative_change_of_outputs"]
        if not abs(theirs / ours - 1) <= STRENGTH_TOLERANCE:
            raise report.Disagreement(
                f"{name} changes the outputs by {theirs:.2%}, flatlora by {ours:.2%}"
            )


def show(methods: dict[str, dict[str, Any]], width: int, device: torch.device) -> None:
    columns = ["after steps"]
    for name in methods:
        columns += [f"{name}: bytes changed", "weights", "distance"]
    rows = []
    for drifts in zip(*(method["drift"] for method in methods.values()), strict=True):
        row = [str(drifts[0]["steps"])]
        for d in drifts:
            row += [
                f"{d['bytes_changed']:,}",
                f"{d['weights_changed']:.1%}",
                f"{d['relative_distance']:.2%}",
            ]
        rows.append(row)
    size = next(iter(methods.values()))["drift"][0]["bytes"]
    title = f"Base weights: {LAYERS} of {width}², bfloat16, {size:,} bytes, σ = {SIGMA}."
    report.show(f"{title} {report.headline(device)}", columns, rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bytes of base weights changed by a run.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="tiny layers, as on a CPU")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
