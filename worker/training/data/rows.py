"""Reading rows from a file, whatever its type; every bad row keeps its place.

JSONL, a JSON array, CSV, TSV and Parquet, each plain, gzipped or compressed with Zstandard. The
suffixes of the file's name tell the type; where they do not, its first bytes do.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, Literal, cast

import zstandard

from worker.training.config import DataFile
from worker.training.data.words import describe, shown
from worker.training.errors import DatasetInvalid

FileType = Literal["jsonl", "json", "csv", "tsv", "parquet"]

SUFFIXES: dict[str, FileType] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

MAX_LINE_BYTES = 1 << 20


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


@dataclass(frozen=True)
class Source:
    """What a file turned out to be."""

    type: FileType
    compression: str | None


def recognise_file(file: DataFile) -> Source:
    """The type and compression of a file, by its name, else by its first bytes.

    Raises:
        DatasetInvalid: If the file is empty, or nothing that we read.
    """
    suffixes = [suffix.lower() for suffix in _suffixes(file.filename)]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    start = _start_of(file, compression)
    named = SUFFIXES.get(suffixes[-1]) if suffixes else None
    return Source(_check_type(named, start, file), compression)


def read_rows(file: DataFile, source: Source) -> Iterator[Row | BadRow]:
    """All rows of a file, in order.

    Raises:
        DatasetInvalid: If the file as a whole cannot be read (truncated, not its type).
    """
    with _explained(file, source.compression), _open(file, source.compression) as stream:
        yield from READERS[source.type](stream, file)


@contextmanager
def _explained(file: DataFile, compression: str | None) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise DatasetInvalid(
            f"{file.uri} cannot be decompressed: its {compression} data end too early.",
            "Is the file whole?",
        ) from error
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DatasetInvalid(
            f"{file.uri} cannot be decompressed: it is not {compression} ({error}).",
            "Is the file whole, and named by what it is?",
        ) from error


def _suffixes(filename: str) -> list[str]:
    return ["." + part for part in filename.split(".")[1:]]


@contextmanager
def _open(file: DataFile, compression: str | None) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed as they are read."""
    with file.path.open("rb") as raw:
        if compression == "gzip":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield cast(IO[bytes], stream)
        elif compression == "zstd":
            with io.BufferedReader(_ZstdReader(raw)) as stream:
                yield stream
        else:
            yield raw


class _ZstdReader(io.RawIOBase):
    """Frame after frame. ``zstandard``'s own reader takes a truncated frame for a whole one."""

    READ_BYTES = 4096  # a hostile file grows 32,000-fold: as much of it as memory bears

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._decompress():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self) -> bool:
        """Whether there was more to decompress."""
        compressed = self._frame.unused_data or self._raw.read(self.READ_BYTES)
        if not compressed:
            if self._is_inside:
                raise EOFError
            return False
        if self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = self._frame.decompress(compressed)
        self._is_inside = not self._frame.eof
        return True


def _start_of(file: DataFile, compression: str | None) -> bytes:
    """The first bytes that are not blank; a byte-order mark counts as blank."""
    with _explained(file, compression), _open(file, compression) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise DatasetInvalid(f"{file.uri} is empty.", "Expected one row at least.")
    return start


def _check_type(named: FileType | None, start: bytes, file: DataFile) -> FileType:
    """The type that the name claims, where the first bytes allow it."""
    if named in ("csv", "tsv"):
        return named  # a header may begin with anything
    signs: dict[bytes, FileType] = {b"PAR1": "parquet", b"[": "json", b"{": "jsonl"}
    seen = next((type_ for sign, type_ in signs.items() if start.startswith(sign)), named)
    if seen is None:
        raise DatasetInvalid(
            f"{file.uri} is none of JSONL, a JSON array, CSV, TSV and Parquet by its name and its "
            "first bytes.",
            "Name it by its type: .jsonl, .json, .csv, .tsv or .parquet, plain, .gz or .zst.",
        )
    if named is None or {named, seen} <= {"json", "jsonl"}:
        return seen
    if named != seen:
        raise DatasetInvalid(
            f"{file.uri} is named as {named} and begins like {seen}.", "Name it by what it is."
        )
    return named


def _read_jsonl(stream: IO[bytes], _file: DataFile) -> Iterator[Row | BadRow]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        place = f"line {number}"
        if len(line) > MAX_LINE_BYTES:
            yield BadRow(place, f"longer than {MAX_LINE_BYTES:,} bytes")
            while not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES)):
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
        value = _loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(place, _json_problem(error))
    return _as_row(value, place)


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return "not JSON: nested too deeply" if isinstance(error, RecursionError) else str(error)


def _as_row(value: Any, place: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(place, f"expected an object, found {describe(value)}")
    return Row(place, value)


def _read_json_array(stream: IO[bytes], file: DataFile) -> Iterator[Row | BadRow]:
    try:
        values = _loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DatasetInvalid(f"{file.uri} is not UTF-8: byte {error.start}.", None) from error
    except (ValueError, RecursionError) as error:
        line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise DatasetInvalid(
            f"{file.uri} is not a JSON array: {_json_problem(error)}{line}.",
            "One broken row spoils a JSON array; JSONL keeps rows apart.",
        ) from error
    if not isinstance(values, list):
        raise DatasetInvalid(
            f"{file.uri}: expected an array of rows, found {describe(values)}.", None
        )
    for number, value in enumerate(values, 1):
        yield _as_row(value, f"row {number}")


def _read_table(stream: IO[bytes], file: DataFile, delimiter: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # Line by line, not by a decoder that reads ahead: an error is then on the line that is told.
    lines = (line.decode() for line in stream)
    records = csv.reader(lines, strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        begins = records.line_num + 1
        try:
            fields = next(records)
        except StopIteration:
            return
        except (csv.Error, UnicodeDecodeError) as error:
            line = records.line_num + 1 if isinstance(error, UnicodeDecodeError) else begins
            raise DatasetInvalid(
                f"{file.uri} cannot be read at line {line}: {error}.",
                "Expected UTF-8 with a header line, quotes doubled inside quotes, and fields of at "
                f"most {MAX_LINE_BYTES:,} bytes.",
            ) from error
        if header is None:
            header = [fields[0].removeprefix("\ufeff"), *fields[1:]] if fields else []
        elif fields and len(fields) != len(header):
            yield BadRow(f"line {begins}", f"expected {len(header)} fields, found {len(fields)}")
        elif fields:
            yield Row(f"line {begins}", dict(zip(header, fields, strict=True)))


def _read_parquet(stream: IO[bytes], file: DataFile) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.BufferReader(stream.read())
    number = 0
    try:
        for batch in pq.ParquetFile(content).iter_batches(batch_size=1024):
            for index in range(batch.num_rows):
                number += 1
                yield _row_of(batch, index, f"row {number}")
    except Exception as error:  # of Arrow, OSError, UnicodeDecodeError: damage shows in many ways
        raise DatasetInvalid(
            f"{file.uri} cannot be read as Parquet after row {number}: {shown(str(error))}.",
            "Is the file whole?",
        ) from error


def _row_of(batch: Any, index: int, place: str) -> Row | BadRow:
    """A row of a record batch; strings that are not UTF-8 and dates out of range spoil it alone."""
    try:
        return Row(place, batch.slice(index, 1).to_pylist()[0])
    except Exception as error:
        return BadRow(place, f"cannot be read: {shown(str(error))}")


Reader = Callable[[IO[bytes], DataFile], Iterator[Row | BadRow]]
READERS: dict[FileType, Reader] = {
    "jsonl": _read_jsonl,
    "json": _read_json_array,
    "csv": partial(_read_table, delimiter=","),
    "tsv": partial(_read_table, delimiter="\t"),
    "parquet": _read_parquet,
}
