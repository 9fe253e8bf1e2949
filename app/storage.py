"""Where finished bytes lie: datasets and adapters, addressed by their content.

blobs/<first two hex digits>/<sha256>           a file, under its hash
jobs/<job id>/manifest.json                     what a finished job consists of; written last, once
jobs/<job id>/checkpoints/<fence>/<step>/<name> for a worker on another machine to go on from
uploads/<project>/<sha256>/<upload id>/<name>   a part of an upload (app/datasets/parts.py)
collecting/<first two hex digits>               there while unreferenced blobs are deleted
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.store import LocalStore

from app.objects import Entry, Objects, connect, sync_path
from app.objects import Outage as Outage
from app.objects import sha256_of as sha256_of
from app.settings import Settings
from app.sources import Changed as Changed
from app.sources import Source

if TYPE_CHECKING:
    from obstore.store import ObjectStore

REFRESH_AFTER = timedelta(hours=12)
COLLECTING = timedelta(seconds=30)  # after its mark a collector begins no more deletions
MARK_LIFE = timedelta(minutes=6)  # after which its collector is dead, and its last request over
MARK_POLL_SECONDS = 0.1

SHA256 = re.compile(r"[0-9a-f]{64}")
CHECKPOINT = re.compile(r"jobs/[^/]+/checkpoints/(\d+)/(\d+)/[^/]+")


class Damaged(Exception):
    """Stored bytes are gone, or are not those that were put; putting them again repairs that."""


@dataclass(frozen=True)
class Freed:
    files: int = 0
    bytes: int = 0

    def __add__(self, other: "Freed") -> "Freed":
        return Freed(self.files + other.files, self.bytes + other.bytes)


def freed(entries: Collection[Entry]) -> Freed:
    return Freed(len(entries), sum(entry.size for entry in entries))


def make_private(folder: Path) -> None:
    """A folder, and those above it that are missing, which only this user may enter."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def open_store(settings: Settings) -> "ArtifactStore":
    """The store that the settings name. Raises ``ValueError`` where its variables are wrong.

    A process that has used any store must not fork: obstore's threads do not come along, and the
    child would wait for them for ever.
    """
    # What is put again while it is young stays young until its row is written.
    refresh_after = timedelta(hours=settings.keep_unreferenced_hours) / 2
    if folder := settings.store_folder:
        return ArtifactStore.local(folder, refresh_after=refresh_after)
    raw, public = connect(settings.store_url), None
    if settings.store_public_endpoint:
        public = connect(settings.store_url, settings.store_public_endpoint)
    return ArtifactStore(raw, public=public, refresh_after=refresh_after)


class ArtifactStore:
    """Content-addressed files, and what belongs to one job, on any store that obstore reaches.

    Every method raises ``Outage`` where the store does not answer.
    """

    def __init__(
        self,
        raw: "ObjectStore",
        *,
        public: "ObjectStore | None" = None,
        refresh_after: timedelta = REFRESH_AFTER,
    ) -> None:
        self.raw = raw
        self._objects = Objects(raw, public)
        self._refresh_after = refresh_after

    @classmethod
    def local(cls, folder: Path, *, refresh_after: timedelta = REFRESH_AFTER) -> "ArtifactStore":
        make_private(folder)
        return cls(LocalStore(prefix=folder, automatic_cleanup=True), refresh_after=refresh_after)

    @property
    def objects(self) -> Objects:
        """For what lies there beside the files: it has a module of its own."""
        return self._objects

    async def probe(self) -> None:
        """Raises ``Outage`` where nothing can be written."""
        await self._objects.write_async("probe", b"")

    def put_file(self, path: Path, sha256: str | None = None) -> str:
        """Store a file and return its sha256, which is computed where the caller does not know it.

        Storing the same bytes again writes nothing, unless what is there is damaged, or so old
        that it may be taken for garbage before a row refers to it. On return they are on disk, so
        that a row may say so.
        """
        digest = sha256 or sha256_of(path)
        self.put(Source.file(path), digest)
        return digest

    def put(self, source: Source, sha256: str) -> bool:
        """As ``put_file``. Whether the source was read to its end, and so has this hash.

        Raises ``Changed`` if it was read and has another.
        """
        key, was_read = _blob(sha256), False
        while True:
            found = self._objects.find(key)
            if not found or not self._objects.is_same(found, source, sha256):
                self._objects.put(key, source, sha256)
                was_read = True
            elif datetime.now(UTC) - found.modified > self._refresh_after:
                self._objects.refresh(key, source, sha256)
            else:
                self._objects.sync(key)
                return was_read
            if self._survives(sha256):
                return was_read

    def _survives(self, sha256: str) -> bool:
        """Whether a blob is there once nobody collects around it: then it stays (``collect``)."""
        started = time.monotonic()
        while mark := self._objects.find(_mark(sha256[:2])):
            blob = self._objects.find(_blob(sha256))
            is_abandoned = blob is not None and blob.modified - mark.modified > MARK_LIFE
            if is_abandoned or time.monotonic() - started > MARK_LIFE.total_seconds():
                break
            time.sleep(MARK_POLL_SECONDS)
        return self._objects.find(_blob(sha256)) is not None

    def fetch(self, sha256: str, target: Path) -> None:
        """Write a stored file to a path, whole or not at all. Raises ``Damaged``."""
        self._fetch(_blob(sha256), sha256, target)

    def _fetch(self, key: str, sha256: str, target: Path) -> None:
        partial = target.with_name(target.name + ".part")
        digest = hashlib.sha256()
        try:
            with partial.open("wb") as file:
                for chunk in self._stream(key):
                    digest.update(chunk)
                    file.write(chunk)
            if (found := digest.hexdigest()) != sha256:
                raise Damaged(f"The stored file {key} has the hash {found}; expected {sha256}.")
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)

    def stream(self, sha256: str) -> Iterator[bytes]:
        """The bytes as they lie there; only ``fetch`` checks them. Raises ``Damaged`` for none."""
        return self._stream(_blob(sha256))

    def _stream(self, key: str) -> Iterator[bytes]:
        try:
            yield from self._objects.stream(key)
        except FileNotFoundError as error:
            raise Damaged(f"The stored file {key} is gone.") from error

    async def open(self, sha256: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from start up to, not including, end. Raises at once if there are none."""
        try:
            return await self._objects.open(_blob(sha256), start, end)
        except FileNotFoundError as error:
            raise Damaged(f"The stored file {sha256} is gone.") from error

    async def presigned(self, sha256: str, seconds: int) -> str:
        """A URL at the store itself, for a client without credentials."""
        return await self._objects.presigned(_blob(sha256), timedelta(seconds=seconds))

    async def holds(self, sha256: str, size: int) -> bool:
        """Whether a file of this hash lies there, whole as far as its size tells."""
        return await self._objects.size_of(_blob(sha256)) == size

    def put_manifest(self, job_id: str, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest of a job, or return the one that an earlier attempt has written."""
        key, body = _manifest(job_id), json.dumps(manifest, sort_keys=True).encode()
        if self._objects.create(key, body):
            return manifest
        try:
            stored: dict[str, Any] = json.loads(self._objects.read(key))
        except ValueError as error:
            if not self._objects.is_local:
                raise Damaged(f"{key} in the store is not JSON.") from error
            # Torn by a power cut, so before anybody was told of it.
            self._objects.write(key, body)
            return manifest
        self._objects.sync(key)
        return stored

    def manifest(self, job_id: str) -> dict[str, Any] | None:
        """That of an attempt that has published; none where that cannot be read either."""
        with suppress(FileNotFoundError, ValueError):
            found: dict[str, Any] = json.loads(self._objects.read(_manifest(job_id)))
            return found
        return None

    def put_checkpoint(
        self, job_id: str, fence: int, step: int, folder: Path
    ) -> list[dict[str, Any]]:
        """Store a folder's files, as ``{name, size, sha256}`` each.

        The fence is in the keys, so that a worker that was thought dead and wakes up overwrites
        nothing of the one that has taken its place.
        """
        files = []
        for path in sorted(folder.iterdir()):
            size, digest = path.stat().st_size, sha256_of(path)
            key = _checkpoint(job_id, fence, step, path.name)
            self._objects.put(key, Source.file(path), digest)
            files.append({"name": path.name, "size": size, "sha256": digest})
        return files

    def fetch_checkpoint(self, job_id: str, checkpoint: Mapping[str, Any], target: Path) -> None:
        """Write ``{fence, step, files}`` as a folder, whole or not at all. Raises ``Damaged``."""
        fence, step = checkpoint["fence"], checkpoint["step"]
        partial = target.with_name(target.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for file in checkpoint["files"]:
                name = file["name"]
                if "/" in name or name in {"", ".", ".."}:
                    raise Damaged(f"A checkpoint's file is named {name!r}.")
                key = _checkpoint(job_id, fence, step, name)
                self._fetch(key, file["sha256"], partial / name)
                sync_path(partial / name)
            sync_path(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            sync_path(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def forget_checkpoints(self, job_id: str, *, fence: int, keep_step: int | None) -> Freed:
        """Delete those of earlier attempts, and of this one all but a step's.

        Never those of a later attempt: whoever calls this may have lost the job without knowing.
        """

        def is_past(entry: Entry) -> bool:
            found = CHECKPOINT.fullmatch(entry.key)
            if found is None:
                return False
            attempt, step = int(found[1]), int(found[2])
            return attempt < fence or (attempt == fence and step != keep_step)

        return self._forget(f"jobs/{job_id}/checkpoints", is_past)

    def forget_job(self, job_id: str) -> Freed:
        """Delete all that lies there of a job."""
        return self._forget(f"jobs/{job_id}", lambda _: True)

    def _forget(self, prefix: str, is_past: Callable[[Entry], bool]) -> Freed:
        total = Freed()
        for page in self._objects.list(prefix):
            total += self.delete([entry for entry in page if is_past(entry)])
        return total

    def delete(self, entries: Sequence[Entry]) -> Freed:
        self._objects.delete([entry.key for entry in entries])
        return freed(entries)

    def blobs(self) -> Iterator[list[Entry]]:
        """All files under their hashes, in pages."""
        for page in self._objects.list("blobs"):
            yield [entry for entry in page if SHA256.fullmatch(hash_of(entry))]

    def job_files(self) -> Iterator[Sequence[Entry]]:
        """All that lies there of jobs, in pages."""
        yield from self._objects.list("jobs")

    def clock(self) -> datetime:
        """The store's own time, by which ``Entry.modified`` is told."""
        self._objects.write("clock", b"")
        found = self._objects.find("clock")
        assert found is not None, "the store has lost what was just written"
        return found.modified

    def forget_unfinished(self, before: datetime, *, dry_run: bool = False) -> Freed:
        """Delete what killed writes have left in a local store.

        S3 keeps the parts of an unfinished upload where no listing shows them; a lifecycle rule of
        the bucket removes them.
        """
        total = Freed()
        for path in self._objects.unfinished(before):
            with suppress(FileNotFoundError):
                total += Freed(1, path.stat().st_size)
                if not dry_run:
                    path.unlink()
        return total

    def collect(self, shard: str, hashes: Collection[str], before: datetime) -> Freed:
        """Delete those of a shard's blobs that nothing refers to, unless they were put again since.

        A look at a blob's age and its deletion are two requests, between which somebody may put
        it again. So the shard is marked, and only then ages are read. ``put_file`` puts, then
        looks for the mark. If there is none, either the ages are read later, and show that the
        blob is young, or all deletions are done, and it sees whether the blob has survived. If
        there is one, it waits.
        """
        if not self._take_mark(shard):
            return Freed()
        deadline = time.monotonic() + COLLECTING.total_seconds()
        total = Freed()
        for page in self._objects.list(f"blobs/{shard}"):
            old = [entry for entry in page if hash_of(entry) in hashes and entry.modified < before]
            if time.monotonic() > deadline:
                break  # the rest at the next time
            total += self.delete(old)
        # Not where that failed: a deletion may still be on its way.
        self._objects.delete([_mark(shard)])
        return total

    def _take_mark(self, shard: str) -> bool:
        key = _mark(shard)
        if self._objects.create(key, b""):
            return True
        mark = self._objects.find(key)
        if mark and self.clock() - mark.modified < MARK_LIFE:
            return False  # another collector is at work
        self._objects.write(key, b"")
        return True


def hash_of(entry: Entry) -> str:
    return entry.key.rpartition("/")[2]


def _blob(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def _mark(shard: str) -> str:
    return f"collecting/{shard}"


def _manifest(job_id: str) -> str:
    return f"jobs/{job_id}/manifest.json"


def _checkpoint(job_id: str, fence: int, step: int, name: str) -> str:
    return f"jobs/{job_id}/checkpoints/{fence}/{step}/{name}"
