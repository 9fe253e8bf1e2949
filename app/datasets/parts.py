"""Where the parts of an upload lie until they are all there: in the store, for any API process."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from app.objects import Entry
from app.sources import Source, read_ahead
from app.storage import ArtifactStore, Damaged, Freed


class Parts:
    """Each upload has a folder of its own (``UploadRow.folder``), each part a name there."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._objects = store.objects

    def put(self, folder: str, name: str, path: Path, sha256: str) -> None:
        with suppress(FileNotFoundError):  # the upload is forgotten meanwhile, with its folder
            self._objects.put(_key(folder, name), Source.file(path), sha256)

    def join(self, folder: str, parts: Mapping[str, int], sha256: str) -> None:
        """Store the file of which these are the parts, by name with their sizes, in order.

        Raises ``Changed`` if it has another hash, and ``Damaged`` where a part is gone.
        """

        def joined() -> Iterator[bytes]:
            for name in parts:
                yield from self._stream(_key(folder, name))

        source = Source(f"uploads/{folder}", sum(parts.values()), lambda: read_ahead(joined()))
        # Where the file was there already, nobody has looked at the parts. Whoever sends others
        # must not be given it: a hash alone opens nothing.
        if not self._store.put(source, sha256):
            source.check(sha256)

    def delete(self, folder: str, name: str) -> None:
        self._objects.delete([_key(folder, name)])

    def forget(self, folder: str) -> Freed:
        """Delete all that lies there of an upload."""
        total = Freed()
        for page in self._objects.list(f"uploads/{folder}"):
            total += self._store.delete(page)
        return total

    def files(self) -> Iterator[Sequence[Entry]]:
        """The parts of all uploads, in pages."""
        yield from self._objects.list("uploads")

    def _stream(self, key: str) -> Iterator[bytes]:
        try:
            yield from self._objects.stream(key)
        except FileNotFoundError as error:
            raise Damaged(f"The stored part {key} is gone.") from error


def upload_of(entry: Entry) -> str:
    """The id of the upload to which a part belongs; empty for what is no part."""
    below = entry.key.split("/")
    return below[3] if len(below) == 5 else ""


def _key(folder: str, name: str) -> str:
    return f"uploads/{folder}/{name}"
