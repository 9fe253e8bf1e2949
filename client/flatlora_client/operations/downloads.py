"""An adapter, as a folder of files or as one tar: checked against what the service published."""

import os
import re
import tarfile
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, cast

from flatlora_client.answers import AdapterFile, AdapterFiles
from flatlora_client.api import Api, path_of
from flatlora_client.errors import HashMismatch, UnexpectedAnswer
from flatlora_client.operations.fetching import (
    Content,
    Fetch,
    Progress,
    Tally,
    digest_of,
    sha256_of,
)
from flatlora_client.operations.jobs import JobRef, get, id_of
from flatlora_client.steps import Close, Flow, Request, do


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
    job_id = id_of(job)
    found = yield from _finished(api, job_id)
    target, files = Path(folder), found.files
    for file in files:
        _check_name(file.name)
    yield from do(partial(target.mkdir, parents=True, exist_ok=True))
    tally = Tally(sum(file.size for file in files), progress)
    missing = []
    for file in files:
        item = Fetch(api, _content(job_id, file), target / file.name, tally)
        if not (yield from item.is_there()):
            missing.append(item)
    # Until all are there, some .part is: the folder shows that it is not finished.
    for item in missing:
        yield from do(item.part.touch)
    for item in missing:
        yield from item.fetch()
    return target


def download_tar(
    api: Api,
    /,
    job: JobRef,
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Flow[Path]:
    """Fetch a job's adapter as one tar, which holds the folder ``adapter``; the path is returned.

    It is ``NAME.part`` until every file in it has the sha256 that the service has published.
    Called again after it was interrupted, it goes on where it was.

    Raises:
        Conflict: the job has no adapter, or not yet.
        HashMismatch: other bytes came; they are removed.
    """
    job_id = id_of(job)
    found, target = (yield from _finished(api, job_id)), Path(path)
    content = yield from _tar_content(api, job_id, found.files, target.name)
    yield from do(partial(target.parent.mkdir, parents=True, exist_ok=True))
    item = Fetch(api, content, target, Tally(content.size, progress))
    if not (yield from item.is_there()):
        yield from item.fetch()
    return target


def _finished(api: Api, job_id: str) -> Flow[AdapterFiles]:
    job = yield from get(api, job_id)
    if job.adapter is None:
        # The service knows best why there is none: it refuses this.
        path, headers = path_of("jobs", job_id, "adapter"), {"Range": "bytes=0-0"}
        yield from api.send(Request("GET", path, headers=headers))
        job = yield from get(api, job_id)  # it was published just now
    if job.adapter is None:
        raise UnexpectedAnswer(f"{job_id} has an adapter, but the service lists no files of it")
    return job.adapter


def _check_name(name: str) -> None:
    """A file's name is a name, and leads nowhere else."""
    if name in {"", ".", ".."} or re.search(r"[/\\\0]", name) or name.endswith(".part"):
        raise UnexpectedAnswer(f"found a file called {name!r}, expected a plain name")


def _content(job_id: str, file: AdapterFile) -> Content:
    path = path_of("jobs", job_id, "adapter", file.name)
    return Content(path, file.name, file.size, f'"{file.sha256}"', partial(_fault, file))


def _fault(file: AdapterFile, path: Path) -> HashMismatch | None:
    found = sha256_of(path)
    wrong = HashMismatch(file.name, expected=file.sha256, found=found)
    return None if found == file.sha256 else wrong


def _tar_content(api: Api, job_id: str, files: tuple[AdapterFile, ...], name: str) -> Flow[Content]:
    """A tar's size and ETag are told with its first byte; a refusal says why."""
    path, headers = path_of("jobs", job_id, "adapter"), {"Accept-Encoding": "identity"}
    stream = yield from api.open(Request("GET", path, headers={**headers, "Range": "bytes=0-0"}))
    yield Close(stream)
    told = stream.response.headers
    size = told.get("content-range", "").rpartition("/")[2] or told.get("content-length", "")
    etag = told.get("etag")
    if not size.isdigit() or not etag:
        raise UnexpectedAnswer(f"the tar of {job_id} comes without its size or its ETag")
    return Content(path, name, int(size), etag, partial(_tar_fault, files))


def _tar_fault(files: tuple[AdapterFile, ...], path: Path) -> HashMismatch | None:
    """The first file that is not in the tar as it was published."""
    found: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                content: IO[bytes] | None = tar.extractfile(member)
                if content:
                    digest = digest_of(cast("BinaryIO", content))
                    found[member.name.rpartition("/")[2]] = digest
    except tarfile.TarError:
        pass  # what could be read before is compared: something is missing
    for file in files:
        if found.get(file.name) != file.sha256:
            said = found.get(file.name, "no such file")
            return HashMismatch(file.name, expected=file.sha256, found=said)
    return None


def is_whole(path: Path, file: AdapterFile) -> bool:
    """Whether this is the file that was published."""
    try:
        if path.stat().st_size != file.size:
            return False
    except FileNotFoundError:
        return False
    return sha256_of(path) == file.sha256
