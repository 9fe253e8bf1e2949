"""Downloads of a finished adapter: one archive, or single files with ranges."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse

from app.adapters.archive import archive_etag, archive_size, stream_archive
from app.adapters.ranges import requested_range
from app.db import ReadSession
from app.errors import (
    AdapterNotReady,
    FileNotInAdapter,
    JobNotFound,
    RangeNotSatisfiable,
    problems,
)
from app.jobs.schemas import Adapter, AdapterFile
from app.jobs.service import JobService

router = APIRouter(prefix="/jobs", tags=["adapters"])

Responses = dict[int | str, dict[str, Any]]

UNCHANGED: Responses = {304: {"description": "Not changed."}}
TAR: Responses = {200: {"content": {"application/x-tar": {}}}}
FILE: Responses = {
    200: {"content": {"application/octet-stream": {}}},
    206: {"description": "The range that was asked for."},
}


async def finished_adapter(job_id: str, request: Request, session: ReadSession) -> Adapter:
    """The adapter, with the database given back before the first byte leaves."""
    job = await JobService(session, request.state.settings).get(job_id)
    if job.adapter is None:
        raise AdapterNotReady(
            f"The job is {job.status.value} and has no adapter.",
            "Only a job that has succeeded, and was no dry run, has one.",
        )
    return job.adapter


FinishedAdapter = Annotated[Adapter, Depends(finished_adapter)]


@router.api_route(
    "/{job_id}/adapter",
    methods=["GET", "HEAD"],
    response_class=Response,
    responses=TAR | UNCHANGED | problems(JobNotFound, AdapterNotReady),
    summary="Download an adapter as one tar",
    operation_id="get_adapter",
)
async def get_adapter(job_id: str, adapter: FinishedAdapter, request: Request) -> Response:
    """The same adapter is always the same bytes."""
    etag = archive_etag(adapter)
    headers = file_headers(f"{job_id}.tar", etag)
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(archive_size(adapter))
    if request.method == "HEAD":
        return Response(headers=headers, media_type="application/x-tar")
    content = stream_archive(adapter, request.state.store)
    return StreamingResponse(content, headers=headers, media_type="application/x-tar")


@router.api_route(
    "/{job_id}/adapter/{file}",
    methods=["GET", "HEAD"],
    response_class=Response,
    responses=FILE
    | UNCHANGED
    | problems(JobNotFound, AdapterNotReady, FileNotInAdapter, RangeNotSatisfiable),
    summary="Download one file of an adapter",
    operation_id="get_adapter_file",
)
async def get_adapter_file(file: str, adapter: FinishedAdapter, request: Request) -> Response:
    """Answers `Range`, `If-Range` and `If-None-Match`; the ETag is the file's sha256."""
    found = find_file(adapter, file)
    etag = f'"{found.sha256}"'
    headers = file_headers(found.name, etag)
    headers["Accept-Ranges"] = "bytes"
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    if_range = request.headers.get("if-range")
    wanted = None
    if if_range is None or if_range == etag:
        wanted = requested_range(request.headers.get("range"), found.size)
    start, end = wanted or (0, found.size)
    headers["Content-Length"] = str(end - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{found.size}"
    status = 206 if wanted else 200
    if request.method == "HEAD" or start == end:
        return Response(status_code=status, headers=headers, media_type=media_type(found.name))
    content: AsyncIterator[bytes] = request.state.store.stream_async(found.sha256, start, end)
    return StreamingResponse(content, status, headers=headers, media_type=media_type(found.name))


def find_file(adapter: Adapter, name: str) -> AdapterFile:
    for file in adapter.files:
        if file.name == name:
            return file
    names = ", ".join(file.name for file in adapter.files)
    raise FileNotInAdapter(f"The adapter has no file {name!r}.", f"It has {names}.")


def file_headers(filename: str, etag: str) -> dict[str, str]:
    return {
        "ETag": etag,
        "Content-Disposition": f'attachment; filename="{filename}"',
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "private, no-cache",
    }


def media_type(filename: str) -> str:
    return {"json": "application/json", "md": "text/markdown", "jinja": "text/plain"}.get(
        filename.rpartition(".")[2], "application/octet-stream"
    )


def _matches(if_none_match: str | None, etag: str) -> bool:
    """RFC 9110 §13.1.2: weak comparison, a list, or any."""
    if if_none_match is None:
        return False
    listed = [part.strip().removeprefix("W/") for part in if_none_match.split(",")]
    return "*" in listed or etag in listed
