"""Without noise our loop learns what TRL's trainer learns: the held-out loss of both, over seeds.

    python -m benchmarks.parity --base-model FOLDER --dataset ROWS --validation ROWS \\
        [--steps 60] [--seeds 1 2 3] [--learning-rate 1e-3] [--json PATH]

Both train on the rows as our renderer has them, with the same rank, batch, clipping, type, AdamW
and learning rate at every step (a warm-up of transformers' begins with a step of rate 0, which
tells in a short run); each begins with an adapter of its own and shuffles by itself. The finished
adapters are loaded anew and evaluated by one function, on the logits of transformers. That the same
start and the same order give the same numbers to rounding is a test
(`tests/worker/training/test_parity.py`); here the question is whether a user would see the change.

Within noise means: the means over the seeds differ by no more than chance explains nineteen times
in twenty, by Student's t of two samples with one variance. Ends with 1 if they differ by more.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on CUDA

import torch
from peft import PeftModel

from benchmarks import report
from benchmarks.chance import t_95
from benchmarks.jobs import Kept, add_arguments, rows_of, training_job
from benchmarks.ladder import eager_loss
from benchmarks.trl_trainer import make_trainer
from worker.training.batches import Batch
from worker.training.config import TrainingJob
from worker.training.data.dataset import Prepared
from worker.training.data.examples import Example
from worker.training.model.base import (
    attach_adapter,
    choose_device,
    choose_dtype,
    load_base,
    load_tokenizer,
)
from worker.training.optimizer import learning_rate_at, make_optimizer
from worker.training.run import run

EVALUATED_TOGETHER = 8
OTHER_SEED = 1_000_000  # TRL's start is not ours


@dataclass(frozen=True)
class Verdict:
    """Two samples of held-out losses.

    Attributes:
        ours: Mean and standard deviation.
        theirs: Mean and standard deviation.
        difference: Of the means, ours less theirs.
        allowed: What chance explains.
    """

    ours: tuple[float, float]
    theirs: tuple[float, float]
    difference: float
    allowed: float

    @property
    def is_within_noise(self) -> bool:
        return abs(self.difference) <= self.allowed


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device = choose_device()
    losses: dict[str, list[float]] = {"ours": [], "TRL": []}
    settings = {"max_steps": options.steps, "learning_rate": options.learning_rate}
    jobs = [
        training_job(options, sigma=0.0, seed=seed, epochs=None, **settings)
        for seed in options.seeds
    ]
    prepared = rows_of(jobs[0])  # the same for every seed
    before = held_out_loss(jobs[0], None, prepared.held_out)
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            for name, train in (("ours", train_ours), ("TRL", train_trl)):
                adapter = train(job, prepared, Path(folder) / name)
                losses[name].append(held_out_loss(job, adapter, prepared.held_out))
        found = ", ".join(f"{name} {values[-1]:.4f}" for name, values in losses.items())
        sys.stderr.write(f"seed {job.seed}: {found}\n")
    verdict = judge(losses["ours"], losses["TRL"])
    show(options, before, losses, verdict, device)
    report.write(options.json, "parity", device, {
        "options": {name: str(value) for name, value in vars(options).items()},
        "before": before, "losses": losses, "verdict": asdict(verdict),
        "within_noise": verdict.is_within_noise,
    })  # fmt: skip
    return 0 if verdict.is_within_noise else 1


def train_ours(job: TrainingJob, _: Prepared, folder: Path) -> Path:
    """Our loop; the folder of the adapter."""
    folder.mkdir()
    kept = Kept()
    run(job, folder, kept, kept)
    return folder / "adapter"


def train_trl(job: TrainingJob, prepared: Prepared, folder: Path) -> Path:
    """TRL's trainer; the folder of the adapter."""
    job = replace(job, seed=job.seed + OTHER_SEED)
    settings, device = job.training, choose_device()
    dtype = choose_dtype(settings, device)
    model = attach_adapter(load_base(job.base_model, device, dtype), job)
    micro_batch = math.gcd(settings.batch_size, EVALUATED_TOGETHER)
    trainer = make_trainer(
        model,
        [[row] for row in prepared.train],
        folder,
        tokenizer=load_tokenizer(job.base_model),
        optimizer=make_optimizer(model, settings, device),
        schedule=lambda step: (
            learning_rate_at(step, settings.max_steps or 1, settings) / settings.learning_rate
        ),
        in_order=False,
        checkpointing=False,
        seed=job.seed,
        max_steps=settings.max_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.batch_size // micro_batch,
        max_grad_norm=settings.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
    )
    trainer.train()
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    return folder / "adapter"


@torch.no_grad()
def held_out_loss(job: TrainingJob, adapter: Path | None, rows: Sequence[Example]) -> float:
    """Mean cross-entropy over the target tokens, on transformers' logits."""
    device = choose_device()
    model: Any = load_base(job.base_model, device, choose_dtype(job.training, device))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    ordered, total = sorted(rows, key=lambda row: len(row.ids)), 0.0
    for start in range(0, len(ordered), EVALUATED_TOGETHER):
        together = [[row] for row in ordered[start : start + EVALUATED_TOGETHER]]
        total += float(eager_loss(model, Batch.of(together, device)))
    return total / sum(row.targets for row in rows)


def judge(ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
    """Whether two samples of the same size may have one mean."""
    count = len(ours)
    spreads = [statistics.stdev(values) for values in (ours, theirs)]
    pooled = math.sqrt(sum(spread**2 for spread in spreads) / 2)
    means = [statistics.fmean(values) for values in (ours, theirs)]
    return Verdict(
        (means[0], spreads[0]),
        (means[1], spreads[1]),
        means[0] - means[1],
        t_95(2 * (count - 1)) * pooled * math.sqrt(2 / count),
    )


def show(
    options: argparse.Namespace,
    before: float,
    losses: dict[str, list[float]],
    verdict: Verdict,
    device: torch.device,
) -> None:
    rows = [
        [f"seed {seed}", f"{ours:.4f}", f"{theirs:.4f}", f"{ours - theirs:+.4f}"]
        for seed, ours, theirs in zip(options.seeds, losses["ours"], losses["TRL"], strict=True)
    ]
    (mean, spread), (their_mean, their_spread) = verdict.ours, verdict.theirs
    said = "within noise" if verdict.is_within_noise else "NOT within noise"
    rows.append([
        "mean ± standard deviation",
        f"{mean:.4f} ± {spread:.4f}",
        f"{their_mean:.4f} ± {their_spread:.4f}",
        f"{verdict.difference:+.4f}, {said} (± {verdict.allowed:.4f})",
    ])  # fmt: skip
    title = (
        f"Held-out loss after {options.steps} steps of {options.batch_size} rows, σ = 0; "
        f"{before:.4f} before. {report.headline(device)}"
    )
    report.show(title, ["", "ours", "TRL", "difference"], rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our loop and TRL's, over seeds.")
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args(arguments)
    if len(options.seeds) < 2:
        parser.error("a spread needs at least two seeds")
    return options


if __name__ == "__main__":
    sys.exit(main())
