"""Taking an upload in: streamed to a file, hashed on the way, then put into the store."""

import asyncio
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from starlette.datastructures import Headers

from app.datasets.digests import compare
from app.datasets.names import MAX_FILENAME_BYTES, SUFFIXES
from app.errors import (
    HashMismatch,
    InvalidRequest,
    QuotaExceeded,
    StoreUnavailable,
    TooLarge,
    UnsupportedMediaType,
)
from app.faults import Fault
from app.settings import Settings
from app.storage import ArtifactStore, make_private

BROKEN_SECONDS = 24 * 3600

OF_RECEIVING = (
    TooLarge, UnsupportedMediaType, InvalidRequest, HashMismatch, QuotaExceeded, StoreUnavailable,
)  # fmt: skip
"""What may be wrong wherever bytes are received."""


@dataclass(frozen=True)
class Upload:
    """Bytes that have arrived and been stored."""

    filename: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Spooled:
    """Bytes that have arrived, in a file that goes with the block."""

    path: Path
    size: int
    sha256: str


@asynccontextmanager
async def spooled(
    chunks: AsyncIterator[bytes], folder: Path, check: Callable[[int], None]
) -> AsyncIterator[Spooled]:
    """Bytes as they arrive, on disk; ``check`` is told how many there are and may refuse more."""
    make_private(folder)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        size, digest = 0, hashlib.sha256()
        async for chunk in chunks:
            size += len(chunk)
            check(size)
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
        file.flush()
        yield Spooled(Path(file.name), size, digest.hexdigest())


async def receive(
    chunks: AsyncIterator[bytes],
    filename: str,
    expected: Collection[str],
    settings: Settings,
    store: ArtifactStore,
    admit: Callable[[int, str], Awaitable[None]],
) -> Upload:
    """Take an upload in without holding it in memory; no database is held open meanwhile.

    ``expected``: the hash that it must have, as often as the client has named one. ``admit``:
    refuses what has arrived, by its size and hash, before the store has it.
    """
    check = partial(check_size, settings=settings)
    async with spooled(chunks, settings.uploads_dir, check) as file:
        if file.size == 0:
            raise InvalidRequest(
                "The dataset is empty.",
                "Send the file's bytes, or a form with a part named file.",
                faults=[Fault(pointer="", detail="no bytes", code="dataset_empty")],
            )
        compare(file.sha256, expected)
        await admit(file.size, file.sha256)
        await asyncio.to_thread(store.put_file, file.path, file.sha256)
    return Upload(filename, file.size, file.sha256)


def check_size(size: int, settings: Settings) -> None:
    if size > settings.max_dataset_bytes:
        raise TooLarge(
            f"A dataset may have {settings.max_dataset_bytes} bytes.",
            "Compress it (.gz, .zst), or raise FLATLORA_MAX_DATASET_BYTES.",
        )


def forget_broken(folder: Path) -> None:
    """Remove what uploads left behind whose process was killed."""
    for path in folder.glob("tmp*"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - BROKEN_SECONDS:
                path.unlink()


def refuse_encoding(headers: Headers) -> None:
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType(
            "A body with a Content-Encoding is not taken.",
            "Send a compressed file as it is: filename=rows.jsonl.gz, no Content-Encoding.",
        )


def media_type(content_type: str) -> str:
    found = content_type.partition(";")[0].strip().lower()
    if found not in SUFFIXES:
        raise UnsupportedMediaType(
            f"An upload of {content_type or 'no type'!r} is not understood.",
            f"Send one of {', '.join(SUFFIXES)} or multipart/form-data. With curl: "
            "-F file=@rows.jsonl.",
        )
    return found


def safe_filename(name: str, media_type: str) -> str:
    """The last part of a path, whichever system wrote it.

    It is only ever shown, and read for its suffix; files are stored under their hash.
    """
    last = PurePosixPath(PureWindowsPath(name).name).name
    cleaned = "".join(letter for letter in last if letter.isprintable()).strip()
    if cleaned in {"", ".", ".."}:
        cleaned = "dataset"
    if not PurePosixPath(cleaned).suffix:
        cleaned += SUFFIXES.get(media_type, "")
    if not PurePosixPath(cleaned).suffix:
        raise InvalidRequest(
            f"The upload has no file name with a suffix; found {name!r}.",
            "Name it: POST /datasets?filename=rows.jsonl. The suffix tells the format.",
            faults=[Fault(pointer="filename", detail="no suffix", code="filename_missing")],
        )
    # The end is kept: the suffix stands there.
    return cleaned.encode()[-MAX_FILENAME_BYTES:].decode(errors="ignore")
