"""A dataset's file as a stream of bytes: what type it is, and how it is decompressed.

JSONL, a JSON array, CSV, TSV and Parquet, each plain, gzipped or compressed with Zstandard. The
suffixes of the file's name tell the type; where they do not, its first bytes do.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal, cast

import zstandard

from worker.training.config import DataFile
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

# A file that holds more than both is not there to be read: text shrinks to a tenth, seldom to less.
GROWN_BYTES = 64 << 20
GROWTH = 100

CHUNK_BYTES = 1 << 20


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
    suffixes = ["." + part.lower() for part in file.filename.split(".")[1:]]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    if compression and suffixes and suffixes[-1] in COMPRESSIONS:
        raise DatasetInvalid(
            f"{file.uri} is compressed twice, as its name says.", "Compress it once, or not at all."
        )
    start = _start_of(file, compression)
    named = SUFFIXES.get(suffixes[-1]) if suffixes else None
    return Source(_check_type(named, start, file), compression)


@contextmanager
def opened(file: DataFile, compression: str | None) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed as they are read.

    Raises:
        DatasetInvalid: If they cannot be decompressed.
    """
    with (
        _explained(file, compression),
        file.path.open("rb", buffering=CHUNK_BYTES) as raw,
        _decompressed(raw, compression) as stream,
    ):
        yield stream


def most_bytes(file: DataFile) -> int:
    """How many bytes of rows a file may decode to."""
    return max(GROWN_BYTES, GROWTH * file.path.stat().st_size)


def check_compressed(file: DataFile, compression: str, proceed: Callable[[], None]) -> None:
    """Decompress once to no end: whether it can be, and is no bomb.

    It takes a tenth of the time of reading rows, of which a bomb would have millions.

    Args:
        file: The file.
        compression: How it is compressed.
        proceed: Called as bytes come.

    Raises:
        DatasetInvalid: If it cannot, or grows beyond measure.
    """
    size = 0
    with (
        _explained(file, compression),
        file.path.open("rb", buffering=0) as raw,
        _decompressed(raw, compression) as stream,
    ):
        while chunk := stream.read(CHUNK_BYTES):
            proceed()
            size += len(chunk)
            if size > max(GROWN_BYTES, GROWTH * raw.tell()):
                raise DatasetInvalid(
                    f"{file.uri} holds more than {size >> 20:,} MiB in its first {raw.tell():,} "
                    f"bytes of {compression}: more than {GROWTH} times as much.",
                    "If these are your rows, give the file uncompressed.",
                )


@contextmanager
def _decompressed(raw: IO[bytes], compression: str | None) -> Iterator[IO[bytes]]:
    if compression == "gzip":
        with gzip.GzipFile(fileobj=raw) as unzipped:
            yield cast(IO[bytes], io.BufferedReader(unzipped, CHUNK_BYTES))
    elif compression == "zstd":
        with io.BufferedReader(_ZstdReader(raw), CHUNK_BYTES) as stream:
            yield stream
    else:
        yield raw


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


class _ZstdReader(io.RawIOBase):
    """Frame after frame. ``zstandard``'s own reader takes a truncated frame for a whole one."""

    READ_BYTES = 1024  # a hostile file grows 32,000-fold: as much of it as memory bears

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside = False
        self._ready = memoryview(b"")

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
        self._ready = memoryview(self._frame.decompress(compressed))
        self._is_inside = not self._frame.eof
        return True


def _start_of(file: DataFile, compression: str | None) -> bytes:
    """The first bytes that are not blank; a byte-order mark counts as blank."""
    with opened(file, compression) as stream:
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
