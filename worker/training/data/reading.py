"""Every row of a file: read, checked and handed on, or named with what is wrong with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from worker.training.config import Data, DataFile
from worker.training.data.conversations import Conversation, RowFormat, known_columns
from worker.training.data.parsing import Good, Parsed, parse
from worker.training.data.rendering import RowRefused
from worker.training.data.rows import BAD_ROWS_BEYOND, BAD_ROWS_KEPT, BadRow
from worker.training.data.sources import Source
from worker.training.data.tally import Tally
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
        good: How many rows can be used.
        bad_rows: The first thousand of the others, in the order of the file.
        bad: How many others there are.
    """

    file: DataFile
    source: Source
    format: RowFormat
    good: int
    bad_rows: list[BadRow]
    bad: int

    @property
    def rows(self) -> int:
        """Good and bad ones."""
        return self.good + self.bad


Take = Callable[[Conversation], object]
"""What is done with a good row, which is not kept; may raise ``RowRefused``."""


@dataclass
class _Progress:
    """Rows so far; ``bad`` begins with what parsing has found."""

    bad: int
    complete: bool
    good: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    refused: int = 0
    refusal: RowRefused | None = None

    def keep(self, row: BadRow) -> None:
        if len(self.bad_rows) < BAD_ROWS_KEPT:
            self.bad_rows.append(row)


def read(
    file: DataFile,
    options: Data,
    take: Take = lambda _: None,
    *,
    folder: Path | None = None,
    tally: Tally | None = None,
) -> Read:
    """Read and check every row of a file.

    Args:
        file: The local file.
        options: How to read its rows, and how many may be bad.
        take: Is given each good row in order, as a part of the check.
        folder: Where rows are kept on their way from the process that reads the file; by default
            the system's folder for temporary files.
        tally: Counts the rows: once as they are read, and once as they are taken.

    Raises:
        DatasetInvalid: If the file cannot be read, more rows are bad than ``max_bad_rows`` allows,
            or none is good.
        ConfigInvalid: If the mapping names columns that do not exist, or ``take`` refuses all rows,
            or raises it.
        Stopped: If somebody wishes so.
    """
    mapping = options.mapping or {}
    tally = tally or Tally()
    _check_mapping(mapping, None if options.format == "auto" else options.format)
    with parse(file, options, folder, tally) as parsed:
        _check_columns(file, parsed.columns, mapping)
        done = _Progress(parsed.bad, parsed.complete)
        # Where reading was given up for bad rows, the others need not be rendered.
        _take(parsed, done, take if parsed.complete else lambda _: None, options, tally)
    _check_bad_rows(file, done, options.max_bad_rows)
    assert parsed.format is not None
    return Read(file, parsed.source, parsed.format, done.good, done.bad_rows, done.bad)


def _take(parsed: Parsed, done: _Progress, take: Take, options: Data, tally: Tally) -> None:
    tally.begin(parsed.rows_found)
    for row in parsed.rows():
        tally.row()
        if not isinstance(row, Good):
            done.keep(row)
            continue
        try:
            take(row.conversation)
            done.good += 1
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
    good = done.good
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
