"""The rows of a job: read, checked, rendered and split, before any model is loaded."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.training.config import TrainingJob
from worker.training.data.conversations import Conversation
from worker.training.data.reading import Read, cut, read
from worker.training.data.rendering import Example, Renderer
from worker.training.data.report import describe, describe_report
from worker.training.errors import DatasetInvalid

__all__ = ["Prepared", "Read", "describe_report", "fingerprint", "prepare", "read", "split"]


@dataclass(frozen=True)
class Prepared:
    """All that a run needs of its data.

    Attributes:
        train: Examples to learn from, in the order of the file.
        held_out: Examples that are only evaluated.
        report: The preflight report: plain JSON.
    """

    train: list[Example]
    held_out: list[Example]
    report: dict[str, Any]


def prepare(
    job: TrainingJob,
    renderer: Renderer,
    max_positions: int | None = None,
    *,
    folder: Path | None = None,
) -> Prepared:
    """Everything between the fetched files and the first optimizer step.

    Args:
        job: The job; its files are local.
        renderer: Renders with the base model's chat template.
        max_positions: Longest row, in tokens, that the base model can read.
        folder: Where rows are kept while they are read; by default the system's folder for
            temporary files. Nothing stays there.

    Raises:
        DatasetInvalid: If rows are bad, or nothing is left to learn from or to hold out.
        ConfigInvalid: If the mapping or the chat template fits no row.
    """
    max_length = min(job.data.max_length, max_positions or job.data.max_length)
    evaluation = job.evaluation
    dataset = cut(read(job.dataset, job.data, renderer, folder=folder), max_length)
    if job.validation:
        validation = cut(read(job.validation, job.data, renderer, folder=folder), max_length)
        train, held_out = dataset.examples, validation.examples[: evaluation.max_rows]
    else:
        validation = None
        held = split(dataset.conversations, evaluation.split, evaluation.max_rows, job.seed)
        train = [row for index, row in enumerate(dataset.examples) if index not in held]
        held_out = [row for index, row in enumerate(dataset.examples) if index in held]
    report = describe(job, dataset, validation, train, renderer, max_length)
    return Prepared(train, held_out, report)


def split(
    conversations: Sequence[Conversation], share: float, max_rows: int, seed: int
) -> set[int]:
    """Which rows to hold out, chosen by a hash of their content and the seed.

    Equal rows stay together, so that no held-out row was trained on. Groups of them are taken while
    they fit; where none does, the smallest is, so one row at least is held out.

    Args:
        conversations: Rows that can be used on either side.
        share: Of the rows.
        max_rows: At most so many.
        seed: Chooses.

    Returns:
        Indices of the rows to hold out.

    Raises:
        DatasetInvalid: If all rows are the same.
    """
    groups: dict[str, list[int]] = {}
    for index, conversation in enumerate(conversations):
        digest = hashlib.sha256(f"{seed}\0{conversation.canonical()}".encode()).hexdigest()
        groups.setdefault(digest, []).append(index)
    if len(groups) < 2:
        raise DatasetInvalid(
            "All rows that can be used are the same: none can be held out.",
            "Give other rows, or held-out rows of their own as evaluation.validation_uri.",
        )
    wanted = max(1, min(round(share * len(conversations)), max_rows))
    in_order = [groups[digest] for digest in sorted(groups)]
    held: set[int] = set()
    for group in in_order:
        if len(held) + len(group) <= wanted:
            held.update(group)
    smallest: list[int] = min(in_order, key=len)
    return held or set(smallest)


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
