"""Every row of a file: read, checked and rendered, or named with what is wrong with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation, RowFormat, known_columns
from worker.training.data.parsing import Good, Parsed, parse
from worker.training.data.rendering import Example, Renderer, RowRefused
from worker.training.data.rows import BAD_ROWS_BEYOND, BAD_ROWS_KEPT, BadRow
from worker.training.data.sources import Source
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
        bad_rows: The first thousand of the others, in the order of the file.
        bad: How many others there are.
    """

    file: DataFile
    source: Source
    format: RowFormat
    conversations: list[Conversation]
    examples: list[Example]
    bad_rows: list[BadRow]
    bad: int

    @property
    def rows(self) -> int:
        """Good and bad ones."""
        return len(self.conversations) + self.bad


@dataclass
class _Progress:
    """Rows so far; ``bad`` begins with what parsing has found."""

    bad: int
    complete: bool
    conversations: list[Conversation] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    refused: int = 0
    refusal: RowRefused | None = None

    def keep(self, row: BadRow) -> None:
        if len(self.bad_rows) < BAD_ROWS_KEPT:
            self.bad_rows.append(row)


def read(
    file: DataFile, options: Data, renderer: Renderer | None = None, *, folder: Path | None = None
) -> Read:
    """Read and check every row of a file.

    Args:
        file: The local file.
        options: How to read its rows, and how many may be bad.
        renderer: Renders each row, as a part of the check.
        folder: Where rows are kept on their way from the process that reads the file; by default
            the system's folder for temporary files.

    Raises:
        DatasetInvalid: If the file cannot be read, more rows are bad than ``max_bad_rows`` allows,
            or none is good.
        ConfigInvalid: If the mapping names columns that do not exist, or the renderer's chat
            template takes no row, or there is none.
    """
    mapping = options.mapping or {}
    _check_mapping(mapping, None if options.format == "auto" else options.format)
    with parse(file, options, folder) as parsed:
        _check_columns(file, parsed.columns, mapping)
        done = _Progress(parsed.bad, parsed.complete)
        # Where reading was given up for bad rows, the others need not be rendered.
        _take(parsed, done, renderer if parsed.complete else None, options)
    _check_bad_rows(file, done, options.max_bad_rows)
    assert parsed.format is not None
    return Read(
        file,
        parsed.source,
        parsed.format,
        done.conversations,
        done.examples,
        done.bad_rows,
        done.bad,
    )


def _take(parsed: Parsed, done: _Progress, renderer: Renderer | None, options: Data) -> None:
    for row in parsed.rows():
        if not isinstance(row, Good):
            done.keep(row)
            continue
        try:
            if renderer:
                done.examples.append(renderer.render(row.conversation))
            done.conversations.append(row.conversation)
        except RowRefused as refusal:
            done.keep(BadRow(row.place, str(refusal)))
            done.bad += 1
            done.refused += 1
            done.refusal = done.refusal or refusal
            if done.bad > options.max_bad_rows + BAD_ROWS_BEYOND:
                done.complete = False
                return


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
    good = len(done.conversations)
    if done.bad <= allowed and good:
        return
    if done.refusal and not good and done.bad - done.refused <= allowed:
        raise ConfigInvalid(
            f"The base model's chat template can render no row of {file.uri}: {done.refusal}.",
            done.refusal.hint,
        )
    if not done.bad:
        raise DatasetInvalid(f"{file.uri} has no rows.", "Expected one row at least.")
    share = f"{done.bad} of {good + done.bad}" if done.complete else f"At least {done.bad:,}"
    raise DatasetInvalid(
        f"{share} rows of {file.uri} cannot be used: {_first(done)}.",
        "Correct these rows, or allow some with data.max_bad_rows.",
    )


def _first(done: _Progress) -> str:
    texts = [str(row) for row in done.bad_rows[:BAD_ROWS_IN_MESSAGE]]
    if more := done.bad - len(texts):
        texts.append(f"and {more:,} more")
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
