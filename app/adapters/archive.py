"""An adapter as a tar that is made while it is sent, the same bytes each time."""

import hashlib
import tarfile
from collections.abc import AsyncIterator

from app.jobs.schemas import Adapter
from app.storage import ArtifactStore

FOLDER = "adapter"
BLOCK = tarfile.BLOCKSIZE


def archive_etag(adapter: Adapter) -> str:
    names = "".join(f"{file.name}\0{file.sha256}\0" for file in adapter.files)
    return f'"tar-{hashlib.sha256(names.encode()).hexdigest()}"'


def archive_size(adapter: Adapter) -> int:
    members = sum(BLOCK + _padded(file.size) for file in adapter.files)
    return _to_records(members + 2 * BLOCK)


async def stream_archive(adapter: Adapter, store: ArtifactStore) -> AsyncIterator[bytes]:
    sent = 0
    for file in sorted(adapter.files, key=lambda file: file.name):
        header = _header(file.name, file.size)
        yield header
        if file.size:
            async for chunk in store.stream_async(file.sha256):
                yield chunk
        padding = _padded(file.size) - file.size
        if padding:
            yield bytes(padding)
        sent += len(header) + file.size + padding
    yield bytes(archive_size(adapter) - sent)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(f"{FOLDER}/{name}")
    member.size = size
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _to_records(size: int) -> int:
    return -(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
