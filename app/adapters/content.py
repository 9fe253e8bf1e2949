"""What a download consists of: bytes that we make, and files of the store, one after the other."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from app.storage import ArtifactStore


@dataclass(frozen=True)
class Blob:
    """A file of the store."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Content:
    """Bytes that are the same whenever the ETag is."""

    parts: Sequence[bytes | Blob]
    etag: str
    filename: str
    media_type: str

    @property
    def size(self) -> int:
        return sum(_size(part) for part in self.parts)

    async def stream(self, store: ArtifactStore, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from start up to, not including, end."""
        for part in self.parts:
            size = _size(part)
            first, last = max(start, 0), min(end, size)
            start, end = start - size, end - size
            if first >= last:
                continue
            if isinstance(part, bytes):
                yield part[first:last]
            else:
                async for chunk in store.stream_async(part.sha256, first, last):
                    yield chunk


def _size(part: bytes | Blob) -> int:
    return len(part) if isinstance(part, bytes) else part.size
