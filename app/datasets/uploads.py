"""Taking an upload in: streamed to a file, hashed on the way, then put into the store."""

import asyncio
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from app.datasets.names import MAX_FILENAME_BYTES
from app.datasets.names import SUFFIXES as SUFFIXES
from app.datasets.names import disposition_filename as disposition_filename
from app.errors import InvalidRequest, TooLarge, UnsupportedMediaType
from app.faults import Fault
from app.settings import Settings
from app.storage import ArtifactStore, make_private

BROKEN_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Upload:
    """Bytes that have arrived and been stored."""

    filename: str
    size: int
    sha256: str


async def receive(
    chunks: AsyncIterator[bytes], filename: str, settings: Settings, store: ArtifactStore
) -> Upload:
    """Take an upload in without holding it in memory; no database is held open meanwhile."""
    make_private(settings.uploads_dir)
    with tempfile.NamedTemporaryFile(dir=settings.uploads_dir) as file:
        size, digest = 0, hashlib.sha256()
        async for chunk in chunks:
            size += len(chunk)
            check_size(size, settings)
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
        if size == 0:
            raise InvalidRequest(
                "The dataset is empty.",
                "Send the file's bytes, or a form with a part named file.",
                faults=[Fault(pointer="", detail="no bytes", code="dataset_empty")],
            )
        file.flush()
        sha256 = digest.hexdigest()
        await asyncio.to_thread(store.put_file, Path(file.name), sha256)
    return Upload(filename, size, sha256)


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
