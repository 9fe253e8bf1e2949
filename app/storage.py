"""Where finished bytes lie: datasets and adapters, addressed by their content.

blobs/<first two hex digits>/<sha256>     a file, under its hash
jobs/<job id>/manifest.json               what a finished job consists of; written last, once
"""

import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, ObjectStore

CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ArtifactStore:
    """Content-addressed files and one manifest per job, on any store that obstore reaches."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def local(cls, folder: Path) -> "ArtifactStore":
        folder.mkdir(parents=True, exist_ok=True)
        return cls(LocalStore(prefix=folder))

    def put_file(self, path: Path, sha256: str | None = None) -> str:
        """Store a file and return its sha256, which is computed where the caller does not know it.

        Storing the same bytes again writes nothing.
        """
        digest = sha256 or sha256_of(path)
        with suppress(AlreadyExistsError):
            obstore.put(self._store, _blob(digest), path, mode="create")
        return digest

    async def probe(self) -> None:
        """Raises an error of obstore where nothing can be written."""
        await obstore.put_async(self._store, "probe", b"")

    def put_manifest(self, job_id: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest of a job, or return the one that an earlier attempt has written."""
        body = json.dumps(manifest, sort_keys=True).encode()
        try:
            obstore.put(self._store, _manifest(job_id), body, mode="create")
        except AlreadyExistsError:
            stored: dict[str, Any] = json.loads(
                bytes(obstore.get(self._store, _manifest(job_id)).bytes())
            )
            return stored
        return manifest

    def fetch(self, sha256: str, target: Path) -> None:
        """Write a stored file to a path, whole or not at all, and check its hash."""
        partial = target.with_name(target.name + ".part")
        digest = hashlib.sha256()
        with partial.open("wb") as file:
            for chunk in self.stream(sha256):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            partial.unlink()
            raise OSError(f"stored file {sha256} has the hash {digest.hexdigest()}: it is damaged")
        partial.rename(target)

    def stream(self, sha256: str) -> Iterator[bytes]:
        for chunk in obstore.get(self._store, _blob(sha256)).stream(min_chunk_size=CHUNK):
            yield bytes(chunk)

    async def stream_async(
        self, sha256: str, start: int = 0, end: int | None = None
    ) -> AsyncIterator[bytes]:
        """The bytes from start up to, not including, end."""
        options: obstore.GetOptions = {}
        if end is not None:
            options = {"range": (start, end)}
        elif start:
            options = {"range": {"offset": start}}
        result = await obstore.get_async(self._store, _blob(sha256), options=options)
        async for chunk in result.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)


def _blob(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def _manifest(job_id: str) -> str:
    return f"jobs/{job_id}/manifest.json"
