"""Parquet read page by page: of a row group of any size, a few rows are in memory.

Only the columns that can be of use are read. The file is mapped, so what is compressed takes no
memory of ours; what does is a page of each column that is read at a time, decompressed. Most
writers end a page at about a megabyte. DuckDB's have up to 100 MiB, and for as long as a column
with so much in it is read the process may have room for them: see ``_room``. Where several columns
are that large they are read one after the other, and wait on the disk for the rest of their rows.
"""

import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from worker.training.config import DataFile
from worker.training.data.limits import more_memory
from worker.training.data.rows import MAX_ROW_BYTES, TOO_LONG, BadRow, Overflow, Row
from worker.training.data.sources import CHUNK_BYTES, Source, most_bytes
from worker.training.data.words import shown
from worker.training.errors import DatasetInvalid

BATCH_ROWS = 32
MAX_COLUMNS = 10_000
MAX_METADATA_BYTES = 16 << 20
FEWEST_ROWS = 100_000  # that may take less than a byte each
BATCHES_KEPT = 64  # after which the system may forget what it has read of the file

SMALL_BYTES = 32 << 20  # of columns, whose pages then find room in any case
LARGEST_PAGE = 128 << 20
GROWTH_OF_PAGES = 16  # of large ones: text shrinks to a tenth, seldom to less

OPTIONS = {
    "buffer_size": 0,  # a buffer would be a copy of what is mapped
    "pre_buffer": False,
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
            mapped = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
            table = pq.ParquetFile(pa.BufferReader(pa.py_buffer(mapped)), **OPTIONS)
            for row in _rows(table, mapped, file, wanted, proceed):
                number += 1
                yield row
    except (DatasetInvalid, Overflow, MemoryError):
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


def _rows(
    table: Any,
    mapped: mmap.mmap,
    file: DataFile,
    wanted: set[str],
    proceed: Callable[[], None],
) -> Iterator[Row | BadRow]:
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
    columns_of = _Columns(table, mapped, most_bytes(file), proceed)
    number = 0
    for batch in columns_of.batches(columns):
        for values in _values(batch):
            number += 1
            place = f"row {number}"
            if isinstance(values, str):
                yield BadRow(place, values)
            else:
                yield Row(place, others | values)


class _Columns:
    """Some columns of a file, read a few rows at a time.

    Args:
        table: The file.
        mapped: The same, as it lies in memory.
        most: Bytes that columns may take on the disk.
        proceed: Called as they come there.
    """

    def __init__(
        self, table: Any, mapped: mmap.mmap, most: int, proceed: Callable[[], None]
    ) -> None:
        self._table = table
        self._mapped = mapped
        self._most = most
        self._proceed = proceed

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Rows of these columns, of one row group after the other."""
        for index in range(self._table.metadata.num_row_groups):
            group = self._table.metadata.row_group(index)
            large = [column for column in columns if _size(group, column) > SMALL_BYTES]
            if large and len(columns) > 1:
                yield from self._one_after_the_other(index, columns)
            else:
                yield from self._together(index, columns)

    def _together(self, index: int, columns: Sequence[str]) -> Iterator[Any]:
        group = self._table.metadata.row_group(index)
        with more_memory(sum(_room(group, column, len(self._mapped)) for column in columns)):
            batches = self._table.iter_batches(
                BATCH_ROWS, row_groups=[index], columns=list(columns), use_threads=False
            )
            for number, batch in enumerate(batches):
                if number % BATCHES_KEPT == 0:
                    self._mapped.madvise(mmap.MADV_DONTNEED)
                yield batch

    def _one_after_the_other(self, index: int, columns: Sequence[str]) -> Iterator[Any]:
        """Each column is written to the disk before the first row is complete.

        Raises:
            Overflow: If that takes too many bytes.
        """
        with ExitStack() as kept:
            streams = []
            left = self._most
            for column in columns:
                file = kept.enter_context(tempfile.TemporaryFile())
                left -= self._keep(index, column, file, left)
                streams.append(pa.ipc.open_stream(file))
            for batches in zip(*streams, strict=True):
                arrays = [batch.column(0) for batch in batches]
                yield pa.RecordBatch.from_arrays(arrays, names=list(columns))

    def _keep(self, index: int, column: str, file: IO[bytes], most: int) -> int:
        """Write one column to a file, which is left at its beginning; how many bytes."""
        schema = pa.schema([self._table.schema_arrow.field(column)])
        with pa.ipc.new_stream(file, schema) as stream:
            for batch in self._together(index, [column]):
                stream.write_batch(batch)
                self._proceed()
                if file.tell() > most:
                    raise Overflow
        size = file.tell()
        file.seek(0)
        return size


def _chunks(group: Any, column: str) -> Iterator[Any]:
    """What a row group has of a column: one chunk, or one for each field that is nested in it."""
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema.partition(".")[0] == column:
            yield chunk


def _size(group: Any, column: str) -> int:
    return sum(chunk.total_uncompressed_size for chunk in _chunks(group, column))


def _room(group: Any, column: str, file_bytes: int) -> int:
    """Bytes that a column's pages may take, where they are more than there is room for in any case.

    Arrow needs a page twice: when the next one is larger it is moved, and as much as a page may
    hold of strings is reserved for those of a few rows. The file only says how large its columns
    are, so it is believed no more than a multiple of the bytes that it really has.
    """
    room = 0
    for chunk in _chunks(group, column):
        real = GROWTH_OF_PAGES * min(chunk.total_compressed_size, file_bytes)
        page = min(chunk.total_uncompressed_size, real, LARGEST_PAGE)
        room += 2 * page if page > SMALL_BYTES else 0
    return room


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
