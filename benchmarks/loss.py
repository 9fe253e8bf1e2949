"""What the head and its loss take, by how many targets' logits are made at once.

    python -m benchmarks.loss [--json PATH] [--small]

Forward and backward pass of ``worker.training.model.loss.linear_cross_entropy`` by Liger's kernel:
once with the chunks that it chooses by itself, once with ours. Ends with 1, and without a table, if
losses or gradients differ by more than roundings. `--small` is the default on a CPU, where the
kernel is interpreted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.timing import Kind, take_turns
from worker.training.model.loss import liger_chunk, liger_cross_entropy, liger_rows

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# targets, vocabulary, hidden
SHAPES = [
    (8192, 128_256, 4096),
    (3200, 128_256, 4096),
    (8192, 128_256, 2048),
    (2000, 151_936, 896),
    (16_000, 151_936, 896),
    (2000, 262_144, 640),
    (4000, 32_000, 4096),
]
SMALL_SHAPES = [(50, 300, 16)]
TOLERANCE = 1e-2


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_small = options.small or device.type == "cpu"
    try:
        found = [measure(shape, device) for shape in (SMALL_SHAPES if is_small else SHAPES)]
    except report.Disagreement as reason:
        return report.refuse(reason)
    columns = ("targets, vocabulary, hidden", "rows by itself", "ms", "our rows", "ms", "faster by")
    rows = [
        (
            ", ".join(f"{size:,}" for size in one["shape"]),
            str(one["itself"]["rows"]),
            f"{one['itself']['ms']:.2f}",
            str(one["ours"]["rows"]),
            f"{one['ours']['ms']:.2f}",
            f"{one['itself']['ms'] / one['ours']['ms']:.2f} ×",
        )
        for one in found
    ]
    report.show(f"head and loss, {report.headline(device)}", columns, rows)
    report.write(options.json, "loss", device, found)
    return 0


def measure(shape: tuple[int, int, int], device: torch.device) -> dict[str, Any]:
    """Milliseconds of both, in turns."""
    targets, vocabulary, hidden = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    drawn = partial(torch.randn, device=device, dtype=dtype, generator=generator)
    states = drawn(targets, hidden).requires_grad_()
    weight = drawn(vocabulary, hidden) * hidden**-0.5
    wanted = torch.randint(vocabulary, (targets,), device=device, generator=generator)

    def once(budget: int, _: int = 0) -> tuple[Tensor, ...]:
        loss = liger_cross_entropy(states, weight, wanted, budget)
        return loss.detach(), *torch.autograd.grad(loss, states)

    budgets = {"itself": 1, "ours": liger_chunk(*shape).budget}
    pairs = [once(budget) for budget in budgets.values()]
    for one, other in zip(*pairs, strict=True):
        apart = float((one.float() - other.float()).norm() / one.float().norm())
        if not apart < TOLERANCE:
            raise report.Disagreement(f"{shape}: {apart:.1e} of itself")
    kinds = {name: Kind(partial(once, budget)) for name, budget in budgets.items()}
    times = take_turns(kinds, device, rounds=10)
    return {"shape": shape} | {
        name: {"rows": liger_rows(*shape, budget), "ms": 1e3 * times[name].device}
        for name, budget in budgets.items()
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--small", action="store_true", help="a tiny shape")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
