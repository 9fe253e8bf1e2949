"""The rows of a job: read, checked, rendered and split, before any model is loaded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from worker.training.config import TrainingJob
from worker.training.data.examples import Example
from worker.training.data.keys import split
from worker.training.data.reading import Read, read
from worker.training.data.rendering import Renderer
from worker.training.data.report import describe, describe_report
from worker.training.data.tally import Tally
from worker.training.data.usable import read_usable

__all__ = ["Prepared", "Read", "describe_report", "fingerprint", "prepare", "read"]


@dataclass(frozen=True)
class Prepared:
    """All that a run needs of its data.

    Attributes:
        train: Examples to learn from, in the order of the file.
        held_out: Examples that are only evaluated.
        report: The preflight report: plain JSON.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    report: dict[str, Any]


def prepare(
    job: TrainingJob,
    renderer: Renderer,
    max_positions: int | None = None,
    *,
    folder: Path | None = None,
    tally: Tally | None = None,
) -> Prepared:
    """Everything between the fetched files and the first optimizer step.

    Args:
        job: The job; its files are local.
        renderer: Renders with the base model's chat template.
        max_positions: Longest row, in tokens, that the base model can read.
        folder: Where rows are kept; by default the system's folder for temporary files. Nothing
            stays there once they are not used any more.
        tally: Counts rows as they are read and rendered.

    Raises:
        DatasetInvalid: If rows are bad, or nothing is left to learn from or to hold out.
        ConfigInvalid: If the mapping or the chat template fits no row.
        Stopped: If somebody wishes so.
    """
    max_length = min(job.data.max_length, max_positions or job.data.max_length)
    evaluation = job.evaluation
    read_file = partial(
        read_usable,
        options=job.data,
        renderer=renderer,
        max_length=max_length,
        seed=job.seed,
        folder=folder,
        tally=tally,
    )
    dataset = read_file(job.dataset)
    validation = read_file(job.validation) if job.validation else None
    if validation:
        train, held_out = dataset.examples, validation.examples[: evaluation.max_rows]
    else:
        is_held = split(dataset.keys, evaluation.split, evaluation.max_rows)
        train = dataset.examples.chosen(np.flatnonzero(~is_held))
        held_out = dataset.examples.chosen(np.flatnonzero(is_held))
    report = describe(job, dataset, validation, train, renderer, max_length)
    return Prepared(train, held_out, report)


def fingerprint(prepared: Prepared) -> str:
    """SHA-256 over all examples, trained on or held out: a run can only go on if it is the same."""
    digest = hashlib.sha256()
    for side in (prepared.train, prepared.held_out):
        digest.update(len(side).to_bytes(8, "little"))
        for example in side:
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(example.ids.astype("<i4").tobytes())
            digest.update(example.in_loss.tobytes())
    return digest.hexdigest()
