"""The rows of a job: read, checked, rendered and split, before any model is loaded."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worker.training.config import Data, DataFile, TrainingJob
from worker.training.conversations import (
    Conversation,
    RowFormat,
    RowProblem,
    recognise_format,
    to_conversation,
)
from worker.training.errors import DatasetInvalid
from worker.training.order import total_steps
from worker.training.rendering import Example, Renderer
from worker.training.rows import BadRow, Source, read_rows, recognise_file

BAD_ROWS_SHOWN = 20
BAD_ROWS_IN_MESSAGE = 5


@dataclass(frozen=True)
class Read:
    """What was found in one file."""

    source: Source
    format: RowFormat
    conversations: list[Conversation]
    bad_rows: list[BadRow]

    @property
    def rows(self) -> int:
        """Good and bad ones."""
        return len(self.conversations) + len(self.bad_rows)


@dataclass
class Rendered:
    """Conversations as examples, with what became of those that are none."""

    examples: list[Example] = field(default_factory=list)
    truncated: int = 0
    without_targets: int = 0


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


def read(file: DataFile, options: Data) -> Read:
    """Read and check every row of a file.

    Raises:
        DatasetInvalid: If the file cannot be read, more rows are bad than ``max_bad_rows`` allows,
            or none is good.
    """
    source = recognise_file(file)
    mapping = options.mapping or {}
    row_format: RowFormat | None = None if options.format == "auto" else options.format
    conversations: list[Conversation] = []
    bad_rows: list[BadRow] = []
    for row in read_rows(file, source):
        if isinstance(row, BadRow):
            bad_rows.append(row)
            continue
        try:
            row_format = row_format or recognise_format(row.values, mapping)
            conversations.append(to_conversation(row.values, row_format, mapping))
        except RowProblem as problem:
            bad_rows.append(BadRow(row.place, str(problem)))
    _check_bad_rows(bad_rows, len(conversations), options.max_bad_rows)
    assert row_format is not None
    return Read(source, row_format, conversations, bad_rows)


def _check_bad_rows(bad_rows: Sequence[BadRow], good: int, allowed: int) -> None:
    if len(bad_rows) <= allowed and good:
        return
    total = good + len(bad_rows)
    shown = "; ".join(map(str, bad_rows[:BAD_ROWS_IN_MESSAGE]))
    more = len(bad_rows) - BAD_ROWS_IN_MESSAGE
    rest = f"; and {more} more" if more > 0 else ""
    raise DatasetInvalid(
        f"{len(bad_rows)} of {total} rows cannot be used: {shown}{rest}."
        if bad_rows
        else "The dataset has no rows.",
        "Correct these rows, or allow some with data.max_bad_rows.",
    )


def render(conversations: Sequence[Conversation], renderer: Renderer, max_length: int) -> Rendered:
    """Render conversations, cut what is too long, and drop what has nothing to learn."""
    rendered = Rendered()
    for conversation in conversations:
        example = renderer.render(conversation)
        if len(example.ids) > max_length:
            rendered.truncated += 1
            example = example.cut(max_length)
        if example.targets:
            rendered.examples.append(example)
        else:
            rendered.without_targets += 1
    return rendered


def prepare(job: TrainingJob, renderer: Renderer, max_positions: int | None = None) -> Prepared:
    """Everything between the fetched files and the first optimizer step.

    Args:
        job: The job; its files are local.
        renderer: Renders with the base model's chat template.
        max_positions: Longest row, in tokens, that the base model can read.

    Raises:
        DatasetInvalid: If rows are bad, or nothing is left to learn from or to hold out.
    """
    data = job.data
    max_length = min(data.max_length, max_positions or data.max_length)
    found = read(job.dataset, data)
    if job.validation:
        train_side, held_side = found.conversations, read(job.validation, data).conversations
        held_side = held_side[: job.evaluation.max_rows]
    else:
        train_side, held_side = split(
            found.conversations, job.evaluation.split, job.evaluation.max_rows, job.seed
        )
    train = render(train_side, renderer, max_length)
    held_out = render(held_side, renderer, max_length)
    for rendered, name in ((train, "train on"), (held_out, "hold out")):
        if not rendered.examples:
            raise DatasetInvalid(
                f"After cutting rows at {max_length} tokens nothing is left to {name}: no row has "
                "an assistant's token within that length.",
                "Raise data.max_length, or shorten the prompts.",
            )
    report = _report(job, found, train, held_out, renderer, max_length)
    report["warnings"] = list(_warnings(job, found, train_side, held_side, train, max_length))
    return Prepared(train.examples, held_out.examples, report)


def split(
    conversations: Sequence[Conversation], share: float, max_rows: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Rows to train on and rows to hold out, chosen by a hash of their content and the seed.

    Equal rows stay together, so that no held-out row was trained on. One row at least is held out.

    Raises:
        DatasetInvalid: If all rows are the same.
    """
    groups: dict[str, list[int]] = {}
    for index, conversation in enumerate(conversations):
        digest = hashlib.sha256(f"{seed}\0{conversation.canonical()}".encode()).hexdigest()
        groups.setdefault(digest, []).append(index)
    if len(groups) < 2:
        raise DatasetInvalid(
            "All rows are the same: none can be held out.",
            "Give other rows, or held-out rows of their own as evaluation.validation_uri.",
        )
    wanted = max(1, min(round(share * len(conversations)), max_rows))
    held: set[int] = set()
    for digest in sorted(groups)[:-1]:
        if held and len(held) + len(groups[digest]) > wanted:
            break
        held.update(groups[digest])
    return (
        [row for index, row in enumerate(conversations) if index not in held],
        [row for index, row in enumerate(conversations) if index in held],
    )


def _report(
    job: TrainingJob,
    found: Read,
    train: Rendered,
    held_out: Rendered,
    renderer: Renderer,
    max_length: int,
) -> dict[str, Any]:
    lengths = np.array([len(example.ids) for example in train.examples])
    dropped = train.without_targets + held_out.without_targets
    steps = total_steps(job.training, len(train.examples))
    return {
        "format": {
            "name": found.format,
            "file": found.source.type,
            "compression": found.source.compression,
        },
        "rows": {
            "read": found.rows,
            "used": len(train.examples),
            "held_out": len(held_out.examples),
            "bad": len(found.bad_rows),
            "truncated": train.truncated + held_out.truncated,
            "dropped_without_targets": dropped,
            "duplicates": _duplicates(found.conversations),
        },
        "bad_rows": [
            {"place": row.place, "problem": row.problem} for row in found.bad_rows[:BAD_ROWS_SHOWN]
        ],
        "tokens": {
            "all": int(lengths.sum()),
            "in_loss": sum(example.targets for example in train.examples),
        },
        "length": {
            "p50": int(np.percentile(lengths, 50)),
            "p90": int(np.percentile(lengths, 90)),
            "p99": int(np.percentile(lengths, 99)),
            "max": int(lengths.max()),
            "limit": max_length,
        },
        "steps": steps,
        "tokens_per_step": round(float(lengths.mean()) * job.training.batch_size),
        "first_example": renderer.segments(train.examples[0]),
    }


def _duplicates(conversations: Sequence[Conversation]) -> int:
    counts = Counter(conversation.canonical() for conversation in conversations)
    return sum(count - 1 for count in counts.values())


def _warnings(
    job: TrainingJob,
    found: Read,
    train_side: Sequence[Conversation],
    held_side: Sequence[Conversation],
    train: Rendered,
    max_length: int,
) -> Iterator[str]:
    if max_length < job.data.max_length:
        yield (
            f"data.max_length {job.data.max_length} is more than the {max_length} positions of the "
            f"base model: rows are cut at {max_length}."
        )
    if found.bad_rows:
        yield f"{len(found.bad_rows)} bad rows were skipped, as data.max_bad_rows allows."
    if train.truncated:
        yield f"{train.truncated} rows were cut at {max_length} tokens."
    if train.without_targets:
        yield f"{train.without_targets} rows were dropped: no token in the loss was left in them."
    if job.validation:
        seen = {conversation.canonical() for conversation in train_side}
        both = sum(conversation.canonical() in seen for conversation in held_side)
        if both:
            yield f"{both} held-out rows are also among the rows to train on."


def describe_report(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report in lines of two, for a person."""
    rows, tokens, length = report["rows"], report["tokens"], report["length"]
    kind = " ".join(filter(None, (report["format"]["file"], report["format"]["compression"])))
    return [
        ("format", f"{report['format']['name']} in {kind}"),
        ("rows", f"{rows['read']} read, {rows['used']} to train on, {rows['held_out']} held out"),
        ("left out", f"{rows['bad']} bad, {rows['dropped_without_targets']} without targets"),
        ("truncated", f"{rows['truncated']} at {length['limit']} tokens"),
        ("duplicates", str(rows["duplicates"])),
        ("tokens", f"{tokens['all']:,}, of them {tokens['in_loss']:,} in the loss"),
        ("length", f"median {length['p50']}, p90 {length['p90']}, longest {length['max']}"),
        ("steps", f"{report['steps']} of about {report['tokens_per_step']:,} tokens"),
    ]
