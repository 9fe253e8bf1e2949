"""Jobs of the trainer made of files, and a reporter that keeps what matters of a run."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker.training.config import (
    BaseModel,
    Data,
    DataFile,
    Evaluation,
    Lora,
    Training,
    TrainingJob,
)
from worker.training.data.dataset import Prepared, prepare
from worker.training.data.rendering import Renderer
from worker.training.files import sha256_of
from worker.training.model.base import load_tokenizer, max_positions


@dataclass
class Kept:
    """A reporter that keeps evaluations and steps, and a control that wants nothing."""

    evaluations: list[dict[str, float]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        """Nothing is made of it."""

    def rows(self, done: int, total: int | None) -> None:
        """Nothing is made of it."""

    def preflight(self, report: Mapping[str, Any]) -> None:
        """Nothing is made of it."""

    def step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        self.steps.append({"step": step, "total": total, **metrics})

    def held_out(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.evaluations.append({"step": step, **metrics})

    def event(self, type_: str, message: str, **data: Any) -> None:
        """Nothing is made of it."""

    def wish(self) -> None:
        """Go on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a job is made of."""
    parser.add_argument("--base-model", type=Path, required=True, help="folder")
    parser.add_argument("--dataset", type=Path, required=True, help="rows, as the service takes")
    parser.add_argument("--validation", type=Path, required=True, help="held-out rows")
    parser.add_argument("--held-out", type=int, default=500, help="rows of them, at most")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="write the numbers there too")


def training_job(
    options: argparse.Namespace, *, sigma: float, seed: int, **training: Any
) -> TrainingJob:
    """A job on the files of the options; alpha is twice the rank, no dropout."""
    return TrainingJob(
        job_id="job_benchmark",
        base_model=BaseModel(f"file:{options.base_model.resolve()}", options.base_model.resolve()),
        dataset=_data_file(options.dataset),
        validation=_data_file(options.validation),
        sigma=sigma,
        seed=seed,
        lora=Lora(rank=options.rank, alpha=2.0 * options.rank),
        data=Data(max_length=options.max_length),
        training=Training(batch_size=options.batch_size, **training),
        evaluation=Evaluation(max_rows=options.held_out),
    )


def rows_of(job: TrainingJob) -> Prepared:
    """The job's rows as the model sees them."""
    renderer = Renderer(load_tokenizer(job.base_model), job.data.loss_on, today=job.clock)
    return prepare(job, renderer, max_positions(job.base_model))


def _data_file(path: Path) -> DataFile:
    return DataFile(f"file:{path.resolve()}", path, path.name, sha256_of(path))
