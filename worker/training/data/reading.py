"""Every row of a file: read, checked and rendered, or named with what is wrong with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from worker.training.config import Data, DataFile
from worker.training.data.conversations import (
    Conversation,
    RowFormat,
    RowProblem,
    known_columns,
    recognise_format,
    to_conversation,
)
from worker.training.data.rendering import Example, Renderer, RowRefused
from worker.training.data.rows import BadRow, Source, read_rows, recognise_file
from worker.training.data.words import shown
from worker.training.errors import ConfigInvalid, DatasetInvalid

BAD_ROWS_IN_MESSAGE = 5


@dataclass(frozen=True)
class Read:
    """What was found in one file.

    Attributes:
        file: The file.
        source: Its type and compression.
        format: How its rows were read.
        conversations: The good rows.
        examples: The same as the model sees them, uncut; empty if no renderer was given.
        bad_rows: The others, in the order of the file.
    """

    file: DataFile
    source: Source
    format: RowFormat
    conversations: list[Conversation]
    examples: list[Example]
    bad_rows: list[BadRow]

    @property
    def rows(self) -> int:
        """Good and bad ones."""
        return len(self.conversations) + len(self.bad_rows)


@dataclass
class _Progress:
    conversations: list[Conversation] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    refusals: list[RowRefused] = field(default_factory=list)


def read(file: DataFile, options: Data, renderer: Renderer | None = None) -> Read:
    """Read and check every row of a file.

    Args:
        file: The local file.
        options: How to read its rows, and how many may be bad.
        renderer: Renders each row, as a part of the check.

    Raises:
        DatasetInvalid: If the file cannot be read, more rows are bad than ``max_bad_rows`` allows,
            or none is good.
        ConfigInvalid: If the mapping names columns that do not exist, or the renderer's chat
            template takes no row.
    """
    mapping = options.mapping or {}
    row_format: RowFormat | None = None if options.format == "auto" else options.format
    _check_mapping(mapping, row_format)
    source = recognise_file(file)
    done = _Progress()
    columns: set[str] = set()
    for row in read_rows(file, source):
        if isinstance(row, BadRow):
            done.bad_rows.append(row)
            continue
        columns |= row.values.keys()
        try:
            row_format = row_format or recognise_format(row.values, mapping)
            conversation = to_conversation(row.values, row_format, mapping)
            if renderer:
                done.examples.append(renderer.render(conversation))
            done.conversations.append(conversation)
        except RowProblem as problem:
            done.bad_rows.append(BadRow(row.place, str(problem)))
        except RowRefused as refusal:
            done.bad_rows.append(BadRow(row.place, str(refusal)))
            done.refusals.append(refusal)
    _check_columns(file, columns, mapping)
    _check_bad_rows(file, done, options.max_bad_rows)
    assert row_format is not None
    return Read(file, source, row_format, done.conversations, done.examples, done.bad_rows)


def _check_mapping(mapping: Mapping[str, str], row_format: RowFormat | None) -> None:
    known = known_columns(row_format)
    if unknown := sorted(mapping.keys() - known):
        where = f"the format {row_format} does not read" if row_format else "no format reads"
        raise ConfigInvalid(
            f"data.mapping renames to {shown(', '.join(unknown))}, which {where}.",
            f"It goes from an expected name to the name in the file, and may rename "
            f"{', '.join(sorted(known))}.",
        )


def _check_columns(file: DataFile, columns: set[str], mapping: Mapping[str, str]) -> None:
    missing = sorted(set(mapping.values()) - columns)
    if columns and missing:
        raise ConfigInvalid(
            f"data.mapping names {shown(', '.join(missing))}, which no row of {file.uri} has.",
            f"Its rows have {shown(', '.join(sorted(columns)))}.",
        )


def _check_bad_rows(file: DataFile, done: _Progress, allowed: int) -> None:
    bad, good = done.bad_rows, len(done.conversations)
    if len(bad) <= allowed and good:
        return
    if done.refusals and not good and len(bad) - len(done.refusals) <= allowed:
        raise ConfigInvalid(
            f"The base model's chat template can render no row of {file.uri}: {done.refusals[0]}.",
            done.refusals[0].hint,
        )
    raise DatasetInvalid(
        f"{len(bad)} of {good + len(bad)} rows of {file.uri} cannot be used: {_first(bad)}."
        if bad
        else f"{file.uri} has no rows.",
        "Correct these rows, or allow some with data.max_bad_rows.",
    )


def _first(bad_rows: Sequence[BadRow]) -> str:
    texts = [str(row) for row in bad_rows[:BAD_ROWS_IN_MESSAGE]]
    if more := len(bad_rows) - len(texts):
        texts.append(f"and {more} more")
    return "; ".join(texts)


@dataclass(frozen=True)
class Usable:
    """Good rows, cut to a length, that still hold something to learn; and how many do not.

    Attributes:
        found: All rows of the file.
        conversations: The usable ones.
        examples: The same as the model sees them.
        truncated: How many rows were cut, whatever became of them.
        without_targets: How many rows were dropped: no token in the loss was left in them.
    """

    found: Read
    conversations: list[Conversation]
    examples: list[Example]
    truncated: int
    without_targets: int


def cut(found: Read, max_length: int) -> Usable:
    """Cut what is too long, and drop what has nothing to learn.

    Raises:
        DatasetInvalid: If nothing is left.
    """
    rows = [
        (conversation, example.cut(max_length))
        for conversation, example in zip(found.conversations, found.examples, strict=True)
    ]
    usable = [(conversation, example) for conversation, example in rows if example.targets]
    if not usable:
        raise DatasetInvalid(
            f"After cutting rows at {max_length} tokens nothing is left of {found.file.uri}: no "
            "row has an assistant's token within that length.",
            "Raise data.max_length, or shorten the prompts.",
        )
    return Usable(
        found,
        conversations=[conversation for conversation, _ in usable],
        examples=[example for _, example in usable],
        truncated=sum(len(example.ids) > max_length for example in found.examples),
        without_targets=len(rows) - len(usable),
    )
