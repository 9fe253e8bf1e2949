"""What a download consists of: bytes that we make, and files of the store, one after the other."""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from app.storage import ArtifactStore


@dataclass(frozen=True)
class Blob:
    """A file of the store."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Piece:
    """A part, from its byte ``first`` up to, not including, ``last``."""

    part: bytes | Blob
    first: int
    last: int


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

    async def open(self, store: ArtifactStore, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from start up to, not including, end.

        The store is asked for the first of its files before anything is given out, so that one
        that does not answer is an error of its own and not a download that breaks off.
        """
        pieces = self._pieces(start, end)
        made: list[bytes] = []
        for piece in pieces:
            if isinstance(piece.part, Blob):
                opened = await store.open(piece.part.sha256, piece.first, piece.last)
                return _chunks(store, made, opened, pieces)
            made.append(piece.part[piece.first : piece.last])
        return _chunks(store, made, None, pieces)

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        for part in self.parts:
            size = _size(part)
            first, last = max(start, 0), min(end, size)
            start, end = start - size, end - size
            if first < last:
                yield Piece(part, first, last)


async def _chunks(
    store: ArtifactStore,
    made: Sequence[bytes],
    opened: AsyncIterator[bytes] | None,
    rest: Iterable[Piece],
) -> AsyncIterator[bytes]:
    for chunk in made:
        yield chunk
    if opened:
        async for chunk in opened:
            yield chunk
    for piece in rest:
        if isinstance(piece.part, bytes):
            yield piece.part[piece.first : piece.last]
        else:
            async for chunk in await store.open(piece.part.sha256, piece.first, piece.last):
                yield chunk


def _size(part: bytes | Blob) -> int:
    return len(part) if isinstance(part, bytes) else part.size
