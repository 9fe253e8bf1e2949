"""One file to its place: taken up again where it broke off, and there only when it is whole."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import httpx2

from flatlora_client.api import Api, next_item
from flatlora_client.errors import APIError, HashMismatch, UnexpectedAnswer
from flatlora_client.steps import CHUNK, Close, Flow, Request, Sleep, Stream, do

Progress = Callable[[int, int], object]
"""Is told how many bytes are there, and of how many."""


@dataclass(frozen=True)
class Content:
    """What is to be fetched, and what shows that it is what was published."""

    path: str
    name: str
    size: int
    etag: str
    fault: Callable[[Path], HashMismatch | None]


class Tally:
    """How much of all has come."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self._progress = progress

    def add(self, size: int) -> None:
        """So many bytes more are there; fewer, if it is negative."""
        self.done += size
        if self._progress:
            self._progress(self.done, self.total)


class Fetch:
    """One file on its way to its place."""

    def __init__(self, api: Api, content: Content, target: Path, tally: Tally) -> None:
        self._api = api
        self._content = content
        self._target = target
        self.part = target.with_name(target.name + ".part")
        self._tally = tally

    def is_there(self) -> Flow[bool]:
        """Whether it has been fetched before."""
        found = yield from do(self._is_whole)
        if found:
            self._tally.add(self._content.size)
        return found

    def _is_whole(self) -> bool:
        try:
            size = self._target.stat().st_size
        except FileNotFoundError:
            return False
        return size == self._content.size and self._content.fault(self._target) is None

    def fetch(self) -> Flow[None]:
        """Have it come.

        Raises:
            HashMismatch: other bytes came; they are removed.
        """
        was_resumed = yield from self._fetch_part()
        fault = yield from do(partial(self._content.fault, self.part))
        if fault and was_resumed:
            # What was left from before may have been of another adapter: once more, from the start.
            yield from self._start_anew()
            yield from self._fetch_part()
            fault = yield from do(partial(self._content.fault, self.part))
        if fault:
            yield from do(self.part.unlink)
            raise fault
        yield from do(partial(self.part.replace, self._target))

    def _fetch_part(self) -> Flow[bool]:
        """Returns whether some of it was there before."""
        failures, size = 0, (yield from do(self._size))
        if size > self._content.size:
            yield from self._start_anew()
            size = 0
        self._tally.add(size)
        was_resumed = size > 0
        while size < self._content.size or size == 0:
            before = size
            try:
                size = yield from self._fetch_from(size)
                if size == self._content.size:
                    break
                trouble = f"{self._content.name} ended after {size} of {self._content.size} bytes"
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
                if size > self._content.size:
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
            headers |= {"Range": f"bytes={start}-", "If-Range": self._content.etag}
        return Request("GET", self._content.path, headers=headers, follows_redirects=True)

    def _refuse(self, stream: Stream, size: int) -> Flow[None]:
        yield Close(stream)
        yield from do(self.part.unlink)
        raise UnexpectedAnswer(
            f"{self._content.name}: found {size} bytes or more, expected {self._content.size}"
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


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return digest_of(file)


def digest_of(file: BinaryIO) -> str:
    """The sha256 of what is left of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
