"""Uploads: a small file in one request, a large one in parts that are found again by its hash."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flatlora_client.answers import Dataset, UploadState
from flatlora_client.api import Api, new_key, path_of
from flatlora_client.errors import APIError, Conflict, NotFound, UnexpectedAnswer
from flatlora_client.operations.fetching import sha256_of
from flatlora_client.reading import read
from flatlora_client.steps import Flow, Request, do

SMALL_BYTES = 8 << 20
PART_BYTES = 8 << 20
MOST_RESTARTS = 5
"""One after the other, without a byte more."""

Progress = Callable[[int, int], object]
"""Is told how many bytes have arrived, and of how many."""


def upload(
    api: Api,
    /,
    path: str | os.PathLike[str],
    *,
    filename: str | None = None,
    progress: Progress | None = None,
) -> Flow[Dataset]:
    """Upload a file of rows; ``.uri`` of the answer is what a job names it by.

    The service keeps what has arrived of a large file. Called again with the same file, after it
    was interrupted, the upload goes on from there; bytes that are there already are not sent.
    """
    source = Path(path)
    name = filename or source.name
    size = (yield from do(source.stat)).st_size
    if size > SMALL_BYTES:
        found = yield from _in_parts(api, source, name, size, progress)
        if found:
            return found
    found = yield from _at_once(api, source, name, size)
    if progress:
        progress(size, size)
    return found


def upload_state(api: Api, /, sha256: str) -> Flow[UploadState]:
    """How far an upload in parts has come, by the sha256 of the whole file."""
    return (yield from api.get(UploadState, path_of("datasets", "uploads", sha256)))


def forget_upload(api: Api, /, sha256: str) -> Flow[None]:
    """Give up an upload that is not complete: what has arrived of it is removed."""
    yield from api.delete(path_of("datasets", "uploads", sha256))


def _at_once(api: Api, source: Path, name: str, size: int) -> Flow[Dataset]:
    """The same bytes under the same name are one dataset: it may be sent again."""
    content = source if size > SMALL_BYTES else (yield from do(source.read_bytes))
    request = Request(
        "POST",
        "/datasets",
        params={"filename": name},
        content=content,
        headers={"Content-Type": "application/octet-stream", "Idempotency-Key": new_key()},
    )
    return read(Dataset, (yield from api.json(request)))


def _in_parts(
    api: Api, source: Path, name: str, size: int, progress: Progress | None
) -> Flow[Dataset | None]:
    """None where the service takes uploads in one request only."""
    sha256 = yield from do(partial(sha256_of, source))
    begin = Request("PUT", path_of("datasets", "uploads", sha256), {"filename": name, "size": size})
    try:
        state = read(UploadState, (yield from api.json(begin)))
    except APIError as error:
        if error.status in {404, 405}:
            return None
        raise
    restarts, farthest = 0, state.offset
    while state.dataset is None:
        if progress:
            progress(state.offset, size)
        try:
            state = yield from _send_part(api, source, state)
        except (Conflict, NotFound) as error:
            # Another has sent parts too, an answer was lost, or the service has forgotten: it says.
            is_known = isinstance(error, NotFound) or error.code == "offset_mismatch"
            restarts += 1
            if not is_known or restarts > MOST_RESTARTS:
                raise
            state = read(UploadState, (yield from api.json(begin)))
        if state.offset > farthest:
            restarts, farthest = 0, state.offset
    if progress:
        progress(size, size)
    return state.dataset


def _send_part(api: Api, source: Path, state: UploadState) -> Flow[UploadState]:
    part = yield from do(partial(_part, source, state.offset))
    if not part:
        raise UnexpectedAnswer(
            f"all {state.offset} bytes of {source.name} have arrived, but the service names no "
            "dataset. Has the file become shorter meanwhile?"
        )
    request = Request(
        "PATCH",
        path_of("datasets", "uploads", state.sha256),
        content=part,
        headers={
            "Content-Type": "application/octet-stream",
            "Upload-Offset": str(state.offset),
        },
    )
    found = read(UploadState, (yield from api.json(request)))
    if found.dataset is None and found.offset <= state.offset:
        raise UnexpectedAnswer(
            f"{len(part)} bytes were sent, and the offset is still {found.offset}"
        )
    return found


def _part(source: Path, offset: int) -> bytes:
    with source.open("rb") as file:
        file.seek(offset)
        return file.read(PART_BYTES)
