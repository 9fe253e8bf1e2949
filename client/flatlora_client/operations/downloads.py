"""The files of an adapter, into a folder: taken up again where they broke off, and checked."""

import hashlib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import httpx2

from flatlora_client.answers import AdapterFile, JobData
from flatlora_client.api import Api, next_item, path_of
from flatlora_client.errors import APIError, HashMismatch, UnexpectedAnswer
from flatlora_client.operations.jobs import JobRef, get, id_of
from flatlora_client.steps import CHUNK, Close, Flow, Request, Sleep, Stream, do

Progress = Callable[[int, int], object]
"""Is told how many bytes are there, and of how many."""


def download(
    api: Api,
    /,
    job: JobRef,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Flow[Path]:
    """Fetch a job's adapter into a folder that PEFT can load; the folder is returned.

    A file is ``NAME.part`` until its sha256 is that which the service has published. Called again
    after it was interrupted, it goes on where it was; files that are there already are kept.

    Raises:
        Conflict: the job has no adapter, or not yet.
        HashMismatch: other bytes came; they are removed.
    """
    found = yield from _finished(api, id_of(job))
    target, files = Path(folder), found.adapter.files if found.adapter else ()
    for file in files:
        _check_name(file.name)
    yield from do(partial(target.mkdir, parents=True, exist_ok=True))
    tally = _Tally(sum(file.size for file in files), progress)
    missing = []
    for file in files:
        item = _File(api, found.id, file, target / file.name, tally)
        if not (yield from item.is_there()):
            missing.append(item)
    # Until all are there, some .part is: the folder shows that it is not finished.
    for item in missing:
        yield from do(item.part.touch)
    for item in missing:
        yield from item.fetch()
    return target


def _finished(api: Api, job_id: str) -> Flow[JobData]:
    job = yield from get(api, job_id)
    if job.adapter is None:
        # The service knows best why there is none: it refuses this.
        path, headers = path_of("jobs", job_id, "adapter"), {"Range": "bytes=0-0"}
        yield from api.send(Request("GET", path, headers=headers))
        job = yield from get(api, job_id)  # it was published just now
    return job


def _check_name(name: str) -> None:
    """A file's name is a name, and leads nowhere else."""
    if name in {"", ".", ".."} or re.search(r"[/\\\0]", name) or name.endswith(".part"):
        raise UnexpectedAnswer(f"found a file called {name!r}, expected a plain name")


class _Tally:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self._progress = progress

    def add(self, size: int) -> None:
        self.done += size
        if self._progress:
            self._progress(self.done, self.total)


class _File:
    """One file on its way to its place."""

    def __init__(
        self, api: Api, job_id: str, file: AdapterFile, target: Path, tally: _Tally
    ) -> None:
        self._api = api
        self._path = path_of("jobs", job_id, "adapter", file.name)
        self._file = file
        self._target = target
        self.part = target.with_name(target.name + ".part")
        self._tally = tally

    def is_there(self) -> Flow[bool]:
        """Whether it has been fetched before."""
        found = yield from do(partial(is_whole, self._target, self._file))
        if found:
            self._tally.add(self._file.size)
        return found

    def fetch(self) -> Flow[None]:
        file = self._file
        was_resumed = yield from self._fetch_part()
        found = yield from do(partial(sha256_of, self.part))
        if found != file.sha256 and was_resumed:
            # What was left from before may have been of another adapter: once more, from the start.
            yield from self._start_anew()
            yield from self._fetch_part()
            found = yield from do(partial(sha256_of, self.part))
        if found != file.sha256:
            yield from do(self.part.unlink)
            raise HashMismatch(file.name, expected=file.sha256, found=found)
        yield from do(partial(self.part.replace, self._target))

    def _fetch_part(self) -> Flow[bool]:
        """Returns whether some of it was there before."""
        failures, size = 0, (yield from do(self._size))
        if size > self._file.size:
            yield from self._start_anew()
            size = 0
        self._tally.add(size)
        was_resumed = size > 0
        while size < self._file.size or size == 0:
            before = size
            try:
                size = yield from self._fetch_from(size)
                if size == self._file.size:
                    break
                trouble = f"{self._file.name} ended after {size} of {self._file.size} bytes"
            except httpx2.TransportError as error:
                trouble = str(error) or type(error).__name__
                size = yield from do(self._size)
            failures = 1 if size > before else failures + 1
            if failures > self._api.retries.most:
                raise self._api.unreached(trouble)
            yield Sleep(self._api.retries.pause(failures, None))
        return was_resumed

    def _fetch_from(self, start: int) -> Flow[int]:
        """Have the rest appended. Returns how long the part is now."""
        try:
            stream = yield from self._api.open(self._request(start))
        except APIError as error:
            if error.status != 416 or start == 0:
                raise
            yield from self._start_anew()
            return 0
        if start and not _continues(stream.response, start):
            yield from self._start_anew()
            start = 0
        with self.part.open("ab") as out:
            start = yield from self._append(stream, start, out)
            yield from do(partial(_settle, out))
        yield Close(stream)
        return start

    def _append(self, stream: Stream, size: int, out: BinaryIO) -> Flow[int]:
        """Written a megabyte at a time; what had come when the connection broke is kept too."""
        held = bytearray()
        try:
            while chunk := (yield from next_item(stream)):
                size += len(chunk)
                if size > self._file.size:
                    yield from self._refuse(stream, size)
                held += chunk
                self._tally.add(len(chunk))
                if len(held) >= CHUNK:
                    yield from do(partial(out.write, bytes(held)))
                    held.clear()
        finally:
            out.write(held)
        return size

    def _request(self, start: int) -> Request:
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": f'"{self._file.sha256}"'}
        return Request("GET", self._path, headers=headers, follows_redirects=True)

    def _refuse(self, stream: Stream, size: int) -> Flow[None]:
        yield Close(stream)
        yield from do(self.part.unlink)
        raise UnexpectedAnswer(
            f"{self._file.name}: found {size} bytes or more, expected {self._file.size}"
        )

    def _start_anew(self) -> Flow[None]:
        size = yield from do(self._size)
        yield from do(partial(self.part.unlink, missing_ok=True))
        self._tally.add(-size)

    def _size(self) -> int:
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0


def _continues(response: httpx2.Response, start: int) -> bool:
    said = response.headers.get("content-range", "")
    return response.status_code == 206 and said.startswith(f"bytes {start}-")


def _settle(out: BinaryIO) -> None:
    """Before a file gets its name it is on the disk."""
    out.flush()
    os.fsync(out.fileno())


def is_whole(path: Path, file: AdapterFile) -> bool:
    """Whether this is the file that was published."""
    try:
        if path.stat().st_size != file.size:
            return False
    except FileNotFoundError:
        return False
    return sha256_of(path) == file.sha256


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
