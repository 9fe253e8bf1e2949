"""Objects under keys in any store that obstore reaches: a folder, S3, GCS or Azure.

Each is whole or not there, and safe when its write returns. However a store fails, the error is an
``Outage``.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from anyio import to_thread
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from app.sources import Source

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

CHUNK = 1 << 20
PAGE = 1000  # of a listing; S3 gives no more at a time
PART = 5 << 20  # of an upload in parts; S3 takes no less
MOST_PARTS = 9000  # S3 takes 10,000
PARTS_AT_ONCE = 2  # each is held in memory

# A request lasts as long as its client takes to read, so what is limited is silence, which is also
# how long a part may take to be sent. A refused connection is told within seconds: whoever can
# wait for longer tries again. The time for retries is long, as it includes that of a broken stream.
CLIENT: "ClientConfig" = {
    "connect_timeout": "5s",
    "read_timeout": "60s",
    "timeout": "24h",
    "default_content_type": "application/octet-stream",  # no browser shows what it is redirected to
}
RETRIES: "RetryConfig" = {
    "max_retries": 4,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {
        "init_backoff": timedelta(seconds=0.1),
        "max_backoff": timedelta(seconds=1),
        "base": 2,
    },
}
ANSWER_SECONDS = 30  # a request of a client waits no longer for a download to begin
ENDPOINTS = {  # as obstore reads them
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}

MESSAGE = 600  # characters of a provider's, which may be a page
# Of a deletion Azure tells no code, only the sentence.
NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified container does not exist")
OS_ERROR = re.compile(r"\bos error (\d+)\b")
MD5 = re.compile(r'"?([0-9a-f]{32}(?:-\d+)?)"?')


class Outage(ConnectionError):
    """The store does not answer, or refuses. Later it may not."""


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    size: int
    modified: datetime
    """By the store's clock."""
    etag: str | None


@contextmanager
def outages() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise Outage("the store has not answered in time") from error
    except FileNotFoundError as error:
        if NO_BUCKET.search(str(error)):
            raise Outage(_told(error)) from error
        raise
    except BaseError as error:
        if found := OS_ERROR.search(str(error)):
            raise Outage(int(found[1]), _told(error)) from error
        raise Outage(_told(error)) from error


def _told(error: Exception) -> str:
    """What a provider says, on one line and without obstore's own view of it."""
    return " ".join(str(error).partition("\n\nDebug source")[0].split())[:MESSAGE]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def connect(url: str, endpoint: str = "") -> "ObjectStore":
    """The store of a URL; what the URL does not say comes from the provider's usual variables.

    Raises ``ValueError`` where something is missing or wrong. Nothing is sent yet.
    """
    scheme = url.partition(":")[0]
    given = [endpoint] if endpoint else [os.environ.get(name, "") for name in ENDPOINTS[scheme]]
    client = CLIENT
    if any(address.startswith("http://") for address in given):
        client = {**CLIENT, "allow_http": True}
    try:
        match scheme:
            case "s3":
                return _s3(url, endpoint, client)
            case "gs":
                return GCSStore.from_url(
                    url,
                    config={"base_url": endpoint} if endpoint else {},
                    client_options=client,
                    retry_config=RETRIES,
                )
            case _:
                return AzureStore.from_url(
                    url,
                    config={"endpoint": endpoint} if endpoint else {},
                    client_options=client,
                    retry_config=RETRIES,
                )
    except BaseError as error:
        raise ValueError(f"no store can be made of {url}: {_told(error)}") from error


def _s3(url: str, endpoint: str, client: "ClientConfig") -> S3Store:
    if endpoint and "AWS_ENDPOINT_URL_S3" in os.environ:
        raise ValueError(
            "found AWS_ENDPOINT_URL_S3, which would replace FLATLORA_STORE_PUBLIC_ENDPOINT too; "
            "name the store's endpoint with AWS_ENDPOINT_URL"
        )
    return S3Store.from_url(
        url,
        config={"endpoint": endpoint} if endpoint else {},
        client_options=client,
        retry_config=RETRIES,
    )


class Objects:
    """One store.

    ``public`` is the same store at the address where clients reach it: a presigned URL is signed
    with its host.
    """

    def __init__(self, raw: "ObjectStore", public: "ObjectStore | None" = None) -> None:
        self.raw = raw
        self._public = public or raw

    @property
    def is_local(self) -> bool:
        return isinstance(self.raw, LocalStore)

    def put(self, key: str, source: Source, sha256: str) -> None:
        """Store bytes of this hash. Raises ``Changed``, and stores nothing, if they have another.

        An upload whose last chunk does not come is given up by the store.
        """
        chunks = source.checked(sha256)
        with outages():
            body = chunks if source.size > PART else b"".join(chunks)
            obstore.put(
                self.raw, key, body, chunk_size=_part(source.size), max_concurrency=PARTS_AT_ONCE
            )
        self.sync(key)

    def is_same(self, entry: Entry, source: Source, sha256: str) -> bool:
        """Whether what is stored is what has this hash.

        A folder's files may have been torn by a power cut, so they are read. Another store keeps
        what it was given, and that was checked; what it says is enough: the size, and the MD5
        where it tells that (Azure tells none). One that encrypts may tell another hash, and is
        given the file again.
        """
        if entry.size != source.size:
            return False
        if not self.is_local:
            told = MD5.fullmatch(entry.etag or "")
            return told is None or told[1] == _md5(source)
        digest = hashlib.sha256()
        with suppress(FileNotFoundError):
            for chunk in self.stream(entry.key):
                digest.update(chunk)
        return digest.hexdigest() == sha256

    def refresh(self, key: str, source: Source, sha256: str) -> None:
        """Make it young again."""
        if folder := self._folder:
            with suppress(FileNotFoundError):
                os.utime(folder / key)
                self.sync(key)
        else:
            self.put(key, source, sha256)

    def write(self, key: str, body: bytes) -> None:
        with outages():
            obstore.put(self.raw, key, body)
        self.sync(key)

    async def write_async(self, key: str, body: bytes) -> None:
        """Without waiting for the disk."""
        with outages():
            await obstore.put_async(self.raw, key, body)

    def create(self, key: str, body: bytes) -> bool:
        """Whether it was not there: of many that create it, one does."""
        with outages():
            try:
                obstore.put(self.raw, key, body, mode="create")
            except AlreadyExistsError:
                return False
        self.sync(key)
        return True

    def read(self, key: str) -> bytes:
        """A small one. Raises ``FileNotFoundError``."""
        return b"".join(self.stream(key))

    def find(self, key: str) -> Entry | None:
        try:
            with outages():
                return _entry(obstore.head(self.raw, key))
        except FileNotFoundError:
            return None

    async def size_of(self, key: str) -> int | None:
        try:
            with outages():
                async with asyncio.timeout(ANSWER_SECONDS):
                    return (await obstore.head_async(self.raw, key))["size"]
        except FileNotFoundError:
            return None

    def stream(self, key: str) -> Iterator[bytes]:
        """Raises ``FileNotFoundError``."""
        with outages():
            for chunk in obstore.get(self.raw, key).stream(min_chunk_size=CHUNK):
                yield bytes(chunk)

    async def open(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from start up to, not including, end. Raises ``FileNotFoundError`` at once.

        A file that ends before is an ``Outage`` at once, too.
        """
        with outages():
            async with asyncio.timeout(ANSWER_SECONDS):
                if folder := self._folder:  # obstore takes ten times the work to hand out a file
                    opening = partial(_open, folder / key, start, end)
                    file = await to_thread.run_sync(opening, abandon_on_cancel=True)
                    return _portions(file, end - start)
                found = await obstore.get_async(self.raw, key, options={"range": (start, end)})
        return _chunks(found)

    def list(self, prefix: str) -> Iterator[Sequence[Entry]]:
        """All below a prefix, in pages, in no order."""
        with outages():
            for page in obstore.list(self.raw, prefix, chunk_size=PAGE):
                yield [_entry(found) for found in page]

    def delete(self, keys: Sequence[str]) -> None:
        """Those that are there."""
        with outages():
            try:
                if keys:
                    obstore.delete(self.raw, keys)
            except FileNotFoundError as error:  # some stores end there
                if NO_BUCKET.search(str(error)):
                    raise
                for key in keys:
                    with suppress(FileNotFoundError):
                        obstore.delete(self.raw, key)

    async def presigned(self, key: str, lifetime: timedelta) -> str:
        """A URL that needs no credentials for a while.

        obstore signs paths, not queries, so the store cannot be asked for a Content-Disposition
        (``response-content-disposition``); the URL's last part is the only name that it suggests.
        """
        assert isinstance(self._public, S3Store | GCSStore | AzureStore)
        with outages():
            return await obstore.sign_async(self._public, "GET", key, lifetime)

    def sync(self, key: str) -> None:
        """Outlast a power cut: the file, its name, and the names of the folders around it."""
        if folder := self._folder:  # other stores answer when it is safe
            path = folder / key
            for part in (path, *path.parents[: key.count("/") + 1]):
                sync_path(part)

    @property
    def _folder(self) -> Path | None:
        return self.raw.prefix if isinstance(self.raw, LocalStore) else None

    def unfinished(self, before: datetime) -> Iterator[Path]:
        """What writes into a folder have left whose process was killed."""
        if folder := self._folder:
            for path in folder.rglob("*#*"):
                with suppress(FileNotFoundError):
                    is_ours = path.name.rpartition("#")[2].isdecimal()
                    if is_ours and path.stat().st_mtime < before.timestamp():
                        yield path


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path, start: int, end: int) -> FileIO:
    """A file of a folder, at its byte ``start``. Raises ``FileNotFoundError``."""
    try:
        with ExitStack() as guard:
            file = guard.enter_context(FileIO(path))
            size = file.seek(0, os.SEEK_END)
            if size < end:
                raise Outage(f"{path} has {size} bytes; at least {end} were expected")
            file.seek(start)
            guard.pop_all()
            return file
    except (FileNotFoundError, Outage):
        raise
    except OSError as error:
        raise Outage(error.errno, f"{path} cannot be read: {error.strerror}") from error


async def _portions(file: FileIO, left: int) -> AsyncIterator[bytes]:
    """The next bytes of a file, which is closed at the end.

    Nobody who stops listening stops a read: else the file would be closed while a thread reads it,
    and its number might be another file's by then.
    """
    with file:
        while left:
            try:
                chunk = await to_thread.run_sync(file.read, min(left, CHUNK))
            except OSError as error:
                raise Outage(error.errno, f"{file.name} cannot be read") from error
            if not chunk:
                raise Outage(f"{file.name} has become shorter")
            left -= len(chunk)
            yield chunk


async def _chunks(found: "GetResult") -> AsyncIterator[bytes]:
    with outages():
        async for chunk in found.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)


def _entry(found: "ObjectMeta") -> Entry:
    return Entry(found["path"], found["size"], found["last_modified"], found["e_tag"])


def _part(size: int) -> int:
    return max(PART, -(-size // MOST_PARTS))


def _md5(source: Source) -> str:
    """As S3 names what ``put`` uploads: of an upload in parts, the hash of the parts' hashes."""
    parts, room = [hashlib.md5(usedforsecurity=False)], _part(source.size)
    for read in source.read():
        chunk = memoryview(read)
        while chunk:
            if not room:
                parts.append(hashlib.md5(usedforsecurity=False))
                room = _part(source.size)
            taken, chunk = chunk[:room], chunk[room:]
            parts[-1].update(taken)
            room -= len(taken)
    if source.size <= PART:
        return parts[0].hexdigest()
    whole = hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(parts)}"
