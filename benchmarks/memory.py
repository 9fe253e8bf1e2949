"""How near the estimate that a job is given comes to the memory that its steps then take.

    python -m benchmarks.memory [--json PATH] [--shapes 1B 3B 8B] [--only checkpointing]

Llamas of three sizes with random weights, LoRA of rank 16 on all linear layers, steps as the
trainer makes them (see `benchmarks.ladder`): packed rows and rows of one length, with and without
noise, activation checkpointing and a 4-bit base. Measured is the most that the allocator had given
out during two steps, of which the second has the optimizer's moments; estimated is what
``worker.training.model.memory`` says from the model's config alone. Ends with 1 if any estimate is
off by more than 15 % of what was measured.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ladder, llama, report
from benchmarks.ladder import Base, Rung
from benchmarks.sequences import Data, full_data, packed_data
from worker.training.config import Lora
from worker.training.model.memory import Estimate, estimate
from worker.training.model.shape import shape_of
from worker.training.packing import length as length_of
from worker.training.plan import Plan

ALLOWED = 0.15
SHAPES = {
    "1B": llama.Shape(layers=16, hidden=2048, kv=512, ffn=8192, heads=32, vocab=128_256),
    "3B": llama.Shape(layers=28, hidden=3072, kv=1024, ffn=8192, heads=24, vocab=128_256),
    "8B": llama.EIGHT_B,
    "tiny": llama.TINY,
}
STEPS = 2


@dataclass(frozen=True)
class Case:
    """One way to compute steps.

    Attributes:
        length: Most tokens of a sequence.
        is_packed: Whether a sequence has several rows.
        rung: The rest.
    """

    length: int
    is_packed: bool
    rung: Rung

    @property
    def name(self) -> str:
        return self.rung.name


@dataclass(frozen=True)
class Compared:
    """What a case was thought to take, and what it took.

    Attributes:
        shape: Of the model.
        case: Its name.
        estimated: Bytes.
        measured: Bytes; None if memory did not suffice.
        parts: Of the estimate, in bytes.
    """

    shape: str
    case: str
    estimated: int
    measured: int | None
    parts: dict[str, Any]

    @property
    def ratio(self) -> float | None:
        return self.estimated / self.measured if self.measured else None

    @property
    def is_near(self) -> bool:
        return self.ratio is None or abs(self.ratio - 1) <= ALLOWED


def cases() -> list[Case]:
    """What needs a 4-bit base comes last."""
    plain = Rung("2 × 4096, packed", rows=2)
    noisy = replace(plain, sigma=ladder.SIGMA)
    light = replace(plain, name="4 × 4096, packed, checkpointing", rows=4, checkpointing=True)
    four_bit = replace(light, name="1 × 2048, 4-bit, checkpointing", rows=1, bits=4)
    return [
        Case(4096, True, plain),
        Case(4096, False, replace(plain, name="2 × 4096, rows of one length")),
        Case(1024, True, replace(plain, name="1 × 1024, packed", rows=1)),
        Case(4096, True, replace(noisy, name="2 × 4096, packed, σ resident", memory="resident")),
        Case(4096, True, replace(noisy, name="2 × 4096, packed, σ streamed", memory="streamed")),
        Case(4096, True, light),
        Case(2048, True, replace(four_bit, name="1 × 2048, 4-bit", checkpointing=False)),
        Case(2048, True, four_bit),
        Case(
            2048,
            True,
            replace(
                four_bit,
                name="1 × 2048, 4-bit, checkpointing, σ streamed",
                sigma=ladder.SIGMA,
                memory="streamed",
            ),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if not torch.cuda.is_available():
        sys.exit("Only a GPU's allocator says how much memory was taken: there is none here.")
    device = torch.device("cuda")
    compared: list[Compared] = []
    for name in options.shapes:
        base = Base(SHAPES[name], device)
        for case in cases():
            if options.only is None or options.only in case.name:
                compared.append(compare(name, base, case))
                sys.stderr.write(f"{name}, {case.name}: {compared[-1].ratio or 0:.3f}\n")
        del base
        gc.collect()
        torch.cuda.empty_cache()
    show(compared, device)
    lines = [asdict(each) | {"ratio": each.ratio} for each in compared]
    report.write(options.json, "memory", device, lines)
    return 0 if all(each.is_near for each in compared) else 1


def compare(shape: str, base: Base, case: Case) -> Compared:
    """Estimate a case, and then compute it."""
    if case.rung.bits and not base.is_quantised:
        base.quantise()
    data = data_of(case, SHAPES[shape].vocab)
    thought = estimated(base, case, data)
    with ladder.untouched():
        try:
            measured: int | None = ladder.run_own(base, case.rung, data, warm=STEPS - 1).peak
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None
            measured = None
    return Compared(shape, case.name, thought.total, measured, thought.to_json())


def data_of(case: Case, vocab: int) -> Data:
    make = packed_data if case.is_packed else full_data
    return make(case.length, case.rung.rows, STEPS, vocab=vocab, seed=ladder.SEED)


def estimated(base: Base, case: Case, data: Data) -> Estimate:
    """What the trainer would say of it."""
    rung = case.rung
    lora = Lora(rank=llama.RANK, alpha=2.0 * llama.RANK, target_modules=list(llama.LINEARS))
    plan = Plan(
        max_length=case.length,
        micro_batch_size=rung.rows,
        packing=case.is_packed,
        varlen=True,
        activation_checkpointing=rung.checkpointing,
        perturbation_memory="streamed" if rung.memory == "streamed" else "resident",
    )
    return estimate(
        shape_of(base.config, lora, "4bit" if rung.bits else None),
        plan,
        dtype=base.dtype,
        on_gpu=True,
        tokens_per_pass=max(sum(map(length_of, sequences)) for sequences in data.steps),
        is_perturbed=rung.sigma > 0,
    )


def show(compared: Sequence[Compared], device: torch.device) -> None:
    rows = [
        [
            each.shape,
            each.case,
            f"{each.estimated / 2**30:.2f}",
            f"{each.measured / 2**30:.2f}" if each.measured else "out of memory",
            f"{each.ratio:.3f}" if each.ratio else "",
            "" if each.is_near else "OFF",
        ]
        for each in compared
    ]
    title = f"Estimated and measured peak, GiB; allowed is {ALLOWED:.0%}. {report.headline(device)}"
    report.show(title, ["shape", "steps", "estimated", "measured", "ratio", ""], rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Estimated memory over measured.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1B", "3B", "8B"])
    parser.add_argument("--only", help="cases that have this in their name")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
