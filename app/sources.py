"""What is put into the store: bytes that can be read more than once, and are checked as they go."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

CHUNK = 1 << 20


class Changed(ValueError):
    """Bytes have not the hash under which they were to be stored.

    A file has been changed since it was hashed; or an upload is not what it was said to be.
    """

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(
            f"{name} has the hash {found}; expected {expected}. It was changed while it was "
            "stored: store it again."
        )
        self.found = found


@dataclass(frozen=True)
class Source:
    """Bytes that are to be stored. They can be read more than once."""

    name: str
    size: int
    read: Callable[[], Iterator[bytes]]

    @classmethod
    def file(cls, path: Path) -> "Source":
        return cls(str(path), path.stat().st_size, partial(_read, path))

    def checked(self, sha256: str) -> Iterator[bytes]:
        """The bytes. Raises ``Changed`` in place of an end if they have another hash."""
        digest = hashlib.sha256()
        for chunk in self.read():
            digest.update(chunk)
            yield chunk
        if (found := digest.hexdigest()) != sha256:
            raise Changed(self.name, found, sha256)

    def check(self, sha256: str) -> None:
        """Raises ``Changed``."""
        for _ in self.checked(sha256):
            pass


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def read_ahead(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same, read in a thread of its own.

    While obstore stores what an iterator gives, that must not ask obstore for anything itself:
    its runtime cannot be entered twice by one thread.
    """
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, chunks, None)
        while (chunk := waiting.result()) is not None:
            waiting = reader.submit(next, chunks, None)
            yield chunk
