"""Does σ lower the held-out loss? Strengths × seeds × learning rates, each a job of the trainer.

    python -m benchmarks.study --base-model FOLDER --dataset ROWS --validation ROWS \\
        --folder CELLS [--sigmas 0 0.05 0.1] [--seeds 1 2 3] [--learning-rates 5e-4 1e-3] \\
        [--epochs 3] [--processes 2] [--sharpness-rows 64] [--json PATH]

Every cell is trained by ``worker.training.run.run``, as a job is, in a process of its own, and its
held-out loss is the job's. Jobs of one seed see the same rows in the same order and begin with the
same adapter, so strengths are compared seed by seed: the table gives the mean difference to σ = 0
and its standard error (the standard deviation over the seeds ÷ √ their number). A difference is
shown only if chance explains it less than once in twenty, by Student's t of the pairs: with three
seeds, if it is more than 4.3 times its error. Sharpness is the rise of the finished adapter's loss
under noise of strength 0.1, on some of the held-out rows (see `flatlora.sharpness`).

What is done is kept in ``--folder``: the command, given again, goes on where it was, inside a cell
from the newest checkpoint.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on CUDA

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks import report
from benchmarks.chance import t_95
from benchmarks.jobs import Kept, add_arguments, rows_of, training_job
from flatlora import sharpness
from worker.training.config import TrainingJob
from worker.training.data.examples import Example
from worker.training.model.base import choose_device, choose_dtype, load_base
from worker.training.run import run

SHARPNESS_SIGMA, SHARPNESS_DRAWS, SHARPNESS_BATCH = 0.1, 4, 8
RESULT = "result.json"
# What may change from one command on a folder to the next.
FREE_OPTIONS = ("json", "folder", "processes", "sigmas", "seeds", "learning_rates")


@dataclass(frozen=True)
class Cell:
    """One job of the study."""

    sigma: float
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"sigma-{self.sigma:g}-seed-{self.seed}-rate-{self.learning_rate:g}"


@dataclass(frozen=True)
class Outcome:
    """What came out of a cell.

    Attributes:
        before: Held-out loss of the base model.
        loss: Held-out loss of the finished adapter.
        accuracy: Share of the held-out target tokens that it predicts.
        lowest: Lowest held-out loss of all evaluations.
        rise: Of the loss under noise; None if not asked for.
        seconds: That the cell took, in this attempt.
        steps: Optimizer steps.
    """

    before: float
    loss: float
    accuracy: float
    lowest: float
    rise: float | None
    seconds: float
    steps: int


Outcomes = dict[Cell, Outcome]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    cells = [
        Cell(*values)
        for values in itertools.product(options.sigmas, options.seeds, options.learning_rates)
    ]
    options.folder.mkdir(parents=True, exist_ok=True)
    require_same_study(options)
    outcomes = dict(train_all(cells, options))
    show(outcomes, options)
    report.write(options.json, "study", choose_device(), results(outcomes, options))
    return 0


def require_same_study(options: argparse.Namespace) -> None:
    """Cells that are kept are of the same jobs.

    Raises:
        SystemExit: If they are not.
    """
    path = options.folder / "study.json"
    values = {name: value for name, value in vars(options).items() if name not in FREE_OPTIONS}
    asked = json.dumps(values, default=str, sort_keys=True, indent=2)
    if path.exists() and path.read_text() != asked:
        sys.exit(f"{options.folder} holds cells of another study, see {path}. Name another folder.")
    path.write_text(asked)


def train_all(cells: Sequence[Cell], options: argparse.Namespace) -> Iterator[tuple[Cell, Outcome]]:
    """Cells that are done, then the others as they end."""
    left = []
    for cell in cells:
        path = options.folder / cell.name / RESULT
        if path.exists():
            yield cell, Outcome(**json.loads(path.read_text()))
        else:
            left.append(cell)
    for number, (cell, outcome) in enumerate(_as_they_end(left, options), start=1):
        sys.stderr.write(
            f"{number}/{len(left)} {cell.name}: {outcome.loss:.4f}, {outcome.seconds:.0f} s\n"
        )
        yield cell, outcome


def _as_they_end(
    cells: Sequence[Cell], options: argparse.Namespace
) -> Iterator[tuple[Cell, Outcome]]:
    if not options.processes:
        yield from ((cell, train(cell, options)) for cell in cells)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, spawn, max_tasks_per_child=1) as pool:
        futures = {pool.submit(train_alone, cell, options): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()


def train_alone(cell: Cell, options: argparse.Namespace) -> Outcome:
    """One cell in a process of its own, with its share of the processors."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    return train(cell, options)


def train(cell: Cell, options: argparse.Namespace) -> Outcome:
    """One cell, from its newest checkpoint if it has one."""
    folder = options.folder / cell.name
    folder.mkdir(exist_ok=True)
    job = job_of(cell, options)
    started, kept = time.monotonic(), Kept()
    found = run(job, folder, kept, kept)
    held_out = found["held_out"]
    lowest = min([each["loss"] for each in kept.evaluations] + [held_out["after"]["loss"]])
    rows = options.sharpness_rows
    outcome = Outcome(
        before=held_out["before"]["loss"],
        loss=held_out["after"]["loss"],
        accuracy=held_out["after"]["accuracy"],
        lowest=lowest,
        rise=rise_under_noise(job, folder / "adapter", rows) if rows else None,
        seconds=round(time.monotonic() - started, 1),
        steps=found["steps"],
    )
    partial = folder / f"{RESULT}.tmp"
    partial.write_text(json.dumps(asdict(outcome)))
    partial.rename(folder / RESULT)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return outcome


def job_of(cell: Cell, options: argparse.Namespace) -> TrainingJob:
    length: dict[str, Any] = (
        {"epochs": options.epochs}
        if options.max_steps is None
        else {"epochs": None, "max_steps": options.max_steps}
    )
    rate = cell.learning_rate
    return training_job(options, sigma=cell.sigma, seed=cell.seed, learning_rate=rate, **length)


def rise_under_noise(job: TrainingJob, adapter: Path, rows: int) -> float:
    """How much the loss rises under noise, on some of the held-out rows."""
    device = choose_device()
    base = load_base(job.base_model, device, choose_dtype(job.training, device))
    model = PeftModel.from_pretrained(base, str(adapter))
    assert job.validation
    held_out = rows_of(replace(job, dataset=job.validation)).held_out  # and no other rows
    examples = sorted(held_out[:rows], key=lambda row: len(row.ids))
    batches = [
        padded(examples[start : start + SHARPNESS_BATCH])
        for start in range(0, len(examples), SHARPNESS_BATCH)
    ]
    found = sharpness(model, batches, sigmas=[SHARPNESS_SIGMA], draws=SHARPNESS_DRAWS)
    return found.points[0].mean - found.clean_loss


def padded(rows: Sequence[Example]) -> dict[str, Tensor]:
    """Rows as transformers takes them."""
    shape = len(rows), max(len(row.ids) for row in rows)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size] = torch.from_numpy(row.ids)
        mask[index, :size] = 1
        labels[index, :size] = ids[index, :size].where(torch.from_numpy(row.in_loss), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def results(outcomes: Outcomes, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "options": {name: str(value) for name, value in vars(options).items()},
        "cells": [asdict(cell) | asdict(outcome) for cell, outcome in outcomes.items()],
        "table": [asdict(line) for line in lines(outcomes)],
    }


@dataclass(frozen=True)
class Line:
    """One strength at one learning rate, over the seeds.

    Attributes:
        loss: Mean and standard deviation of the held-out loss.
        difference: Mean difference to σ = 0 of the same seed, and its standard error; None for σ =
            0 itself, and where fewer than two seeds have both.
        accuracy: Mean of the token accuracy.
        lowest: Mean of the lowest held-out loss of a run.
        rise: Mean rise of the loss under noise.
    """

    sigma: float
    learning_rate: float
    seeds: int
    loss: tuple[float, float]
    difference: tuple[float, float] | None
    accuracy: float
    lowest: float
    rise: float | None


def lines(outcomes: Outcomes) -> list[Line]:
    """The table, by learning rate and strength."""
    groups: dict[tuple[float, float], dict[int, Outcome]] = {}
    for cell, outcome in outcomes.items():
        groups.setdefault((cell.learning_rate, cell.sigma), {})[cell.seed] = outcome
    return [_line(*key, groups) for key in sorted(groups)]


def _line(rate: float, sigma: float, groups: dict[tuple[float, float], dict[int, Outcome]]) -> Line:
    own = groups[rate, sigma]
    plain = groups.get((rate, 0.0), {}) if sigma else {}
    pairs = [own[seed].loss - plain[seed].loss for seed in own if seed in plain]
    rises = [outcome.rise for outcome in own.values() if outcome.rise is not None]
    return Line(
        sigma=sigma,
        learning_rate=rate,
        seeds=len(pairs) or len(own),
        loss=_mean_and_spread([outcome.loss for outcome in own.values()]),
        difference=_mean_and_error(pairs) if len(pairs) > 1 else None,
        accuracy=statistics.fmean(outcome.accuracy for outcome in own.values()),
        lowest=statistics.fmean(outcome.lowest for outcome in own.values()),
        rise=statistics.fmean(rises) if rises else None,
    )


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def show(outcomes: Outcomes, options: argparse.Namespace) -> None:
    first = next(iter(outcomes.values()))
    title = (
        f"Held-out loss after {first.steps} steps of {options.batch_size} rows, rank "
        f"{options.rank}; {first.before:.4f} before; mean and standard deviation over the seeds, "
        f"difference to σ = 0 with its standard error. {report.headline(choose_device())}"
    )
    columns = [
        "learning rate", "σ", "seeds", "held-out loss", "− σ = 0", "shown", "lowest", "accuracy",
        "rise under noise",
    ]  # fmt: skip
    rows = []
    for line in lines(outcomes):
        (mean, spread), paired = line.loss, line.difference
        rows.append([
            f"{line.learning_rate:g}",
            f"{line.sigma:g}",
            str(line.seeds),
            f"{mean:.4f} ± {spread:.4f}",
            f"{paired[0]:+.4f} ± {paired[1]:.4f}" if paired else "",
            _shown(paired, line.seeds) if paired else "",
            f"{line.lowest:.4f}",
            f"{line.accuracy:.2%}",
            "" if line.rise is None else f"{line.rise:.4f}",
        ])  # fmt: skip
    report.show(title, columns, rows)


def _shown(difference: tuple[float, float], seeds: int) -> str:
    mean, error = difference
    if abs(mean) <= t_95(seeds - 1) * error:
        return "no"
    return "lower" if mean < 0 else "higher"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Held-out loss by strength, over seeds.")
    add_arguments(parser)
    parser.add_argument("--folder", type=Path, required=True, help="keeps what is done")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.0, 0.05, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--max-steps", type=int, help="in place of epochs")
    parser.add_argument(
        "--processes", type=int, default=1, help="cells at a time; 0: all in this one"
    )
    parser.add_argument("--sharpness-rows", type=int, default=64, help="0: not measured")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
