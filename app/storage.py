"""Where finished bytes lie: datasets and adapters, addressed by their content.

blobs/<first two hex digits>/<sha256>     a file, under its hash
jobs/<job id>/manifest.json               what a finished job consists of; written last, once
"""

import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, ObjectStore

CHUNK = 1 << 20
PARTS_AT_ONCE = 2  # of a multipart upload; each is held in memory


class Damaged(Exception):
    """Stored bytes are gone, or are not those that were put; putting them again repairs that."""


def make_private(folder: Path) -> None:
    """A folder, and those above it that are missing, which only this user may enter."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ArtifactStore:
    """Content-addressed files and one manifest per job, on any store that obstore reaches."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def local(cls, folder: Path) -> "ArtifactStore":
        make_private(folder)
        return cls(LocalStore(prefix=folder))

    def put_file(self, path: Path, sha256: str | None = None) -> str:
        """Store a file and return its sha256, which is computed where the caller does not know it.

        Storing the same bytes again writes nothing, unless what is there is damaged. On return
        they are on disk, so that a row may say so.
        """
        digest = sha256 or sha256_of(path)
        key = _blob(digest)
        if not self._holds(digest, path.stat().st_size):
            # Not mode="create", which reads the whole file into memory.
            obstore.put(self._store, key, path, max_concurrency=PARTS_AT_ONCE)
        self._sync(key)
        return digest

    async def probe(self) -> None:
        """Raises an error of obstore where nothing can be written."""
        await obstore.put_async(self._store, "probe", b"")

    def put_manifest(self, job_id: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest of a job, or return the one that an earlier attempt has written."""
        key, body = _manifest(job_id), json.dumps(manifest, sort_keys=True).encode()
        try:
            obstore.put(self._store, key, body, mode="create")
        except AlreadyExistsError:
            with suppress(ValueError):
                stored: dict[str, Any] = json.loads(bytes(obstore.get(self._store, key).bytes()))
                self._sync(key)
                return stored
            # Torn by a power cut, so before anybody was told of it.
            obstore.put(self._store, key, body)
        self._sync(key)
        return manifest

    def fetch(self, sha256: str, target: Path) -> None:
        """Write a stored file to a path, whole or not at all. Raises ``Damaged``."""
        partial = target.with_name(target.name + ".part")
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                for chunk in self.stream(sha256):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise Damaged(f"The stored file {sha256} has the hash {digest.hexdigest()}.")
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)

    def stream(self, sha256: str) -> Iterator[bytes]:
        """The bytes as they lie there; only ``fetch`` checks them. Raises ``Damaged`` for none."""
        try:
            found = obstore.get(self._store, _blob(sha256))
        except FileNotFoundError as error:
            raise Damaged(f"The stored file {sha256} is gone.") from error
        for chunk in found.stream(min_chunk_size=CHUNK):
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

    def _holds(self, sha256: str, size: int) -> bool:
        """Whether these bytes are there and whole: a crash may have torn them."""
        digest = hashlib.sha256()
        try:
            if obstore.head(self._store, _blob(sha256))["size"] != size:
                return False
            for chunk in self.stream(sha256):
                digest.update(chunk)
        except (FileNotFoundError, Damaged):
            return False
        return digest.hexdigest() == sha256

    def _sync(self, key: str) -> None:
        """Outlast a power cut: the file, its name, and the names of the folders around it."""
        if not isinstance(self._store, LocalStore) or self._store.prefix is None:
            return  # other stores answer when it is safe
        path = self._store.prefix / key
        for part in (path, *path.parents[: key.count("/") + 1]):
            _sync_path(part)


def open_store(settings: Any) -> ArtifactStore:
    return ArtifactStore.local(settings.artifacts_dir)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _blob(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def _manifest(job_id: str) -> str:
    return f"jobs/{job_id}/manifest.json"
