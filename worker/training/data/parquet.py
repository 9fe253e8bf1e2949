"""Parquet read page by page: of a row group of any size, a few rows are in memory.

Only the columns that can be of use are read.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import pyarrow.parquet as pq

from worker.training.config import DataFile
from worker.training.data.rows import MAX_ROW_BYTES, TOO_LONG, BadRow, Row
from worker.training.data.sources import CHUNK_BYTES, Source
from worker.training.data.words import shown
from worker.training.errors import DatasetInvalid

BATCH_ROWS = 32
MAX_COLUMNS = 10_000
MAX_METADATA_BYTES = 16 << 20
FEWEST_ROWS = 100_000  # that may take less than a byte each

OPTIONS = {
    "buffer_size": 1 << 16,  # with a buffer, pages are read one at a time
    "pre_buffer": False,
    "memory_map": False,
    "thrift_string_size_limit": MAX_METADATA_BYTES,
    "thrift_container_size_limit": 100_000,
}


def read_parquet(
    stream: IO[bytes],
    file: DataFile,
    source: Source,
    wanted: set[str],
    proceed: Callable[[], None],
) -> Iterator[Row | BadRow]:
    """The rows of a file.

    Args:
        stream: Its bytes, decompressed.
        file: What to call it.
        source: Whether it is compressed as a whole.
        wanted: Columns to read; the others are None in each row.
        proceed: Called while it is decompressed as a whole.

    Raises:
        DatasetInvalid: If it is damaged, or decodes to far more than it should.
        MemoryError: If one page, or one row, does not fit.
    """
    number = 0
    try:
        with _seekable(stream, source, proceed) as content:
            for row in _rows(pq.ParquetFile(content, **OPTIONS), file, wanted):
                number += 1
                yield row
    except (DatasetInvalid, MemoryError):
        raise
    except Exception as error:  # of Arrow, OSError, UnicodeDecodeError: damage shows in many ways
        raise DatasetInvalid(
            f"{file.uri} cannot be read as Parquet after row {number}: {shown(str(error))}.",
            "Is the file whole?",
        ) from error


@contextmanager
def _seekable(
    stream: IO[bytes], source: Source, proceed: Callable[[], None]
) -> Iterator[IO[bytes]]:
    if source.compression is None:
        yield stream
        return
    with tempfile.TemporaryFile() as content:
        while chunk := stream.read(CHUNK_BYTES):
            content.write(chunk)
            proceed()
        content.seek(0)
        yield content


def _rows(table: Any, file: DataFile, wanted: set[str]) -> Iterator[Row | BadRow]:
    metadata = table.metadata
    if metadata.num_columns > MAX_COLUMNS:
        raise DatasetInvalid(
            f"{file.uri} has {metadata.num_columns:,} columns, expected {MAX_COLUMNS:,} at most.",
            "Keep the columns that hold the conversations.",
        )
    _check_rows(metadata, file)
    names = table.schema_arrow.names
    others = dict.fromkeys(names)
    columns = [name for name in dict.fromkeys(names) if name in wanted]
    number = 0
    for batch in table.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
        for values in _values(batch):
            number += 1
            place = f"row {number}"
            if isinstance(values, str):
                yield BadRow(place, values)
            else:
                yield Row(place, others | values)


def _check_rows(metadata: Any, file: DataFile) -> None:
    """Rows that differ take some bytes each, however they are encoded."""
    rows = sum(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    size = file.path.stat().st_size
    if rows > max(FEWEST_ROWS, size):
        raise DatasetInvalid(
            f"{file.uri} claims {rows:,} rows in {size:,} bytes: they are the same, or none.",
            "Leave out repeated rows; training.epochs repeats them.",
        )


def _values(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Each row of a batch, or what is wrong with it.

    Strings that are not UTF-8 and dates out of range spoil their row alone.
    """
    together = None
    if batch.nbytes <= MAX_ROW_BYTES:
        with suppress(Exception):
            together = batch.to_pylist()
    if together is None:
        yield from (_value(batch.slice(index, 1)) for index in range(batch.num_rows))
    else:
        yield from map(_without_nulls, together)


def _value(row: Any) -> dict[str, Any] | str:
    if row.nbytes > MAX_ROW_BYTES:
        return TOO_LONG
    try:
        values: dict[str, Any] = _without_nulls(row.to_pylist()[0])
    except MemoryError:
        raise
    except Exception as error:
        return f"cannot be read: {shown(str(error))}"
    return values


def _without_nulls(value: Any) -> Any:
    """Objects without the fields that another row has, and Parquet writes as null."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
