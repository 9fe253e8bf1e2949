"""A dataset behind an ``https:`` URL, fetched from a public address and nowhere else.

A connection that breaks is made again a few times; where the server has given the file a strong
ETag, the rest of the same bytes is asked for, else all of them.
"""

import hashlib
import logging
import random
import re
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import httpx2

from app.datasets.names import MAX_FILENAME_BYTES, disposition_filename
from app.datasets.names import SUFFIXES as MEDIA_SUFFIXES
from app.net.client import PublicClient, chunks_of
from app.net.errors import AnswerRefused, ConnectionFailed, NetError
from app.net.rules import Rules
from worker.remote import PART, Arrived, Order, too_large, took_too_long
from worker.training.data.sources import COMPRESSIONS, SUFFIXES
from worker.training.errors import DatasetUnavailable

log = logging.getLogger(__name__)

TRIES = 4  # in a row that have brought nothing
FIRST_WAIT = 0.5
STRONG_ETAG = re.compile(r'"[^"]*"')
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")
ENCODINGS = {"": "", "identity": "", "gzip": ".gz", "x-gzip": ".gz", "zstd": ".zst"}


def bring_url(order: Order) -> Arrived:
    """Raises ``DatasetUnavailable``, with what is known of why."""
    part, ends = _Part(order), time.monotonic() + order.seconds
    tries = 0
    while True:
        before = part.size
        try:
            return _try(order, part, ends - time.monotonic())
        except NetError as error:
            tries = 1 if part.size > before else tries + 1
            if time.monotonic() > ends:
                raise took_too_long(order) from error
            if tries >= TRIES or not error.is_transient:
                raise _explained(order, error) from error
            log.warning("fetching broke off after %d bytes: %s", part.size, error.detail)
        time.sleep(FIRST_WAIT * 2 ** (tries - 1) * random.uniform(0.5, 1))  # noqa: S311


def _try(order: Order, part: "_Part", seconds: float) -> Arrived:
    rules = Rules.from_plain(order.parts["rules"])
    with (
        PublicClient(rules, seconds=seconds) as client,
        client.get(order.parts["url"], part.resuming()) as answer,
    ):
        filename = filename_of(order.parts["url"], answer)
        part.take(answer)
    return Arrived(filename, part.finish())


class _Part:
    """What has come so far."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._path = Path(order.target + PART)
        self._forget()

    def _forget(self) -> None:
        self.size, self._digest, self._etag = 0, hashlib.sha256(), ""

    def resuming(self) -> dict[str, str]:
        """Headers that ask for the rest of the same bytes."""
        if not self.size or not self._etag:
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": self._etag}

    def take(self, answer: httpx2.Response) -> None:
        self._place(answer)
        with suppress(ValueError):  # of no number h11 has complained
            if self.size + int(answer.headers.get("content-length", "0")) > self._order.max_bytes:
                raise too_large(self._order)
        with self._path.open("ab" if self.size else "wb") as file:
            for chunk in chunks_of(answer):
                if self.size + len(chunk) > self._order.max_bytes:
                    raise too_large(self._order)
                file.write(chunk)
                self._digest.update(chunk)
                self.size += len(chunk)

    def _place(self, answer: httpx2.Response) -> None:
        """Be where the answer's body begins."""
        if answer.status_code == 206 and self.size:
            found = CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
            is_same = answer.headers.get("etag", self._etag) == self._etag
            if found and int(found[1]) == self.size and is_same:
                return
        if answer.status_code == 200:
            self._forget()
            etag = answer.headers.get("etag", "")
            self._etag = etag if STRONG_ETAG.fullmatch(etag) else ""
            return
        if answer.status_code in {206, 416} and self.size:  # not what was asked for: anew
            self._forget()
            raise ConnectionFailed(
                f"{answer.url.host} has sent another part than asked for.", "Try another server."
            )
        raise refused(answer)

    def finish(self) -> str:
        self._path.rename(self._order.target)
        return self._digest.hexdigest()


def refused(answer: httpx2.Response) -> AnswerRefused:
    status, host = answer.status_code, answer.url.host
    told = f"{host} answers with {status}"
    if status in {404, 410}:
        return AnswerRefused(f"{told}: there is nothing.", "Check the URL.")
    if status in {401, 403, 407}:
        return AnswerRefused(
            f"{told}: it wants to know who asks.",
            "Give a URL that needs no login, such as one that is signed and not yet expired, or "
            "upload the rows with POST /datasets.",
        )
    is_transient = status >= 500 or status in {408, 425, 429}
    return AnswerRefused(f"{told}.", "Try the URL from elsewhere.", is_transient=is_transient)


def filename_of(url: str, answer: httpx2.Response) -> str:
    """A name whose suffixes tell the format: of the URL, the answer, or where it came from.

    It is only ever shown, and read for its suffixes.
    """
    encoding = answer.headers.get("content-encoding", "").strip().lower()
    if encoding not in ENCODINGS:
        raise AnswerRefused(
            f"{answer.url.host} sends it encoded as {encoding!r}, which was not asked for.",
            "Expected it as it is, or as gzip or zstd.",
        )
    disposition = disposition_filename(answer.headers.get("content-disposition", ""))
    names = [_last(httpx2.URL(url).path), _last(disposition), _last(answer.url.path)]
    name = next((name for name in names if _tells(name)), "")
    if not name:
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        name = next(filter(None, names), "dataset") + MEDIA_SUFFIXES.get(kind, "")
    compressed = ENCODINGS[encoding]
    if compressed and not name.lower().endswith(compressed):
        name += compressed
    return name.encode()[-MAX_FILENAME_BYTES:].decode(errors="ignore")


def _last(path: str) -> str:
    name = re.split(r"[/\\]", unquote(path))[-1]
    cleaned = "".join(sign for sign in name if sign.isprintable()).strip()
    return "" if cleaned in {".", ".."} else cleaned


def _tells(name: str) -> bool:
    return PurePosixPath(name.lower()).suffix in SUFFIXES.keys() | COMPRESSIONS.keys()


def _explained(order: Order, error: NetError) -> DatasetUnavailable:
    return DatasetUnavailable(f"{order.uri} cannot be fetched. {error.detail}", error.hint)
