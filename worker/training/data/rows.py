"""Reading rows from a file, whatever its type; every bad row keeps its place.

However large the file is, no more of it than a few rows is held in memory.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from worker.training.config import DataFile
from worker.training.data.sources import FileType, Source, opened
from worker.training.data.words import describe
from worker.training.errors import DatasetInvalid

MAX_ROW_BYTES = 1 << 20
BAD_ROWS_KEPT = 1000  # of which it is told what is wrong
BAD_ROWS_BEYOND = 1000  # more than are allowed, after which nothing is gained by going on
TOO_LONG = f"longer than {MAX_ROW_BYTES:,} bytes"


@dataclass(frozen=True)
class Row:
    """One row: where it stands in the file (``line 37``) and what it holds."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


class Overflow(Exception):
    """The rows take more than a file of that size should hold."""


def read_rows(
    file: DataFile,
    source: Source,
    wanted: set[str],
    proceed: Callable[[], None] = lambda: None,
) -> Iterator[Row | BadRow]:
    """All rows of a file, in order.

    Args:
        file: The file.
        source: What it is.
        wanted: Columns that may be read. Where others need not be, they are None in each row.
        proceed: Called where something goes on that gives no row yet.

    Raises:
        DatasetInvalid: If the file as a whole cannot be read (truncated, not its type).
    """
    with opened(file, source.compression) as stream:
        if source.type == "parquet":
            # Only here: it takes as long to import as the rest of this process.
            from worker.training.data.parquet import read_parquet

            yield from read_parquet(stream, file, source, wanted, proceed)
        else:
            yield from READERS[source.type](stream, file)


def as_row(value: Any, place: str) -> Row | BadRow:
    """A JSON value as a row."""
    if not isinstance(value, dict):
        return BadRow(place, f"expected an object, found {describe(value)}")
    return Row(place, value)


def refuse_constant(name: str) -> Any:
    """``parse_constant`` of a JSON decoder that knows no NaN."""
    raise ValueError(f"{name} is not JSON")


def json_problem(error: ValueError | RecursionError) -> str:
    """Why something is not JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return "not JSON: nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_jsonl(stream: IO[bytes], _file: DataFile) -> Iterator[Row | BadRow]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        place = f"line {number}"
        if len(line) > MAX_ROW_BYTES:
            yield BadRow(place, TOO_LONG)
            while not line.endswith(b"\n") and (line := stream.readline(MAX_ROW_BYTES)):
                pass
            continue
        if line.strip():
            yield _parse_line(line, place)


def _parse_line(line: bytes, place: str) -> Row | BadRow:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return BadRow(place, f"not UTF-8: {found}")
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        return BadRow(place, json_problem(error))
    return as_row(value, place)


def _read_json_array(stream: IO[bytes], file: DataFile) -> Iterator[Row | BadRow]:
    from worker.training.data.json_array import read_json_array

    yield from read_json_array(stream, file)


class _Lines:
    """Lines of a table as text, as many as a row may have."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.row_bytes = 0

    def __iter__(self) -> Iterator[str]:
        # Line by line, not by a decoder that reads ahead: an error is then on the line that is told
        mark = b"\xef\xbb\xbf"  # before the header's quotes are read
        while line := self._stream.readline(MAX_ROW_BYTES + 1):
            line, mark = line.removeprefix(mark), b""
            self.row_bytes += len(line)
            if self.row_bytes > MAX_ROW_BYTES:
                raise csv.Error(f"a row {TOO_LONG}")
            yield line.decode()


def _read_table(stream: IO[bytes], file: DataFile, delimiter: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _Lines(stream)
    records = csv.reader(iter(lines), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        begins = records.line_num + 1
        lines.row_bytes = 0
        try:
            fields = next(records)
        except StopIteration:
            return
        except (csv.Error, UnicodeDecodeError) as error:
            line = records.line_num + 1 if isinstance(error, UnicodeDecodeError) else begins
            raise DatasetInvalid(
                f"{file.uri} cannot be read at line {line}: {error}.",
                "Expected UTF-8 with a header line, quotes doubled inside quotes and closed, and "
                f"rows of at most {MAX_ROW_BYTES:,} bytes.",
            ) from error
        if header is None:
            header = fields
        elif fields and len(fields) != len(header):
            yield BadRow(f"line {begins}", f"expected {len(header)} fields, found {len(fields)}")
        elif fields:
            yield Row(f"line {begins}", dict(zip(header, fields, strict=True)))


Reader = Callable[[IO[bytes], DataFile], Iterator[Row | BadRow]]
READERS: dict[FileType, Reader] = {
    "jsonl": _read_jsonl,
    "json": _read_json_array,
    "csv": partial(_read_table, delimiter=","),
    "tsv": partial(_read_table, delimiter="\t"),
}
