"""Downloads of a finished adapter: one archive, or single files."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from app.adapters.archive import archive
from app.adapters.content import Blob, Content
from app.adapters.download import ASKED, REDIRECT, answer, download
from app.errors import (
    AdapterNotReady,
    FileNotInAdapter,
    JobNotFound,
    RangeNotSatisfiable,
    StoreUnavailable,
    Unauthenticated,
)
from app.jobs.answers import Adapter, AdapterFile
from app.jobs.service import JobService
from app.jobs.states import Status
from app.problems import problems
from app.sessions import ReadSession

router = APIRouter(prefix="/jobs", tags=["adapters"])

MEDIA_TYPES = {"json": "application/json", "md": "text/markdown", "jinja": "text/plain"}


async def finished_adapter(job_id: str, request: Request, session: ReadSession) -> Adapter:
    """The adapter, with the database given back before the first byte leaves."""
    job = await JobService(session, request.state.settings).get(job_id)
    if job.adapter:
        return job.adapter
    hint = "Wait until the job is succeeded."
    if job.status is Status.SUCCEEDED:
        hint = "It was a dry run: submit it again without dry_run."
    elif job.status.is_terminal:
        hint = "It will never have one: submit it again."
    detail = f"The job is {job.status} and has no adapter."
    raise AdapterNotReady(detail, hint, status=job.status)


FinishedAdapter = Annotated[Adapter, Depends(finished_adapter)]


@router.head("/{job_id}/adapter", include_in_schema=False)
@router.get(
    "/{job_id}/adapter",
    response_class=Response,
    responses=download("application/x-tar")
    | problems(
        Unauthenticated, JobNotFound, AdapterNotReady, RangeNotSatisfiable, StoreUnavailable
    ),
    openapi_extra=ASKED,
    summary="Download an adapter as one tar",
)
async def get_adapter(job_id: str, adapter: FinishedAdapter, request: Request) -> Response:
    """The same adapter is always the same bytes. Answers as a single file does."""
    return answer(request, archive(adapter, f"{job_id}.tar"))


@router.head("/{job_id}/adapter/{file}", include_in_schema=False)  # noqa: FAST003 - finished_adapter takes it
@router.get(
    "/{job_id}/adapter/{file}",
    response_class=Response,
    responses=download(*MEDIA_TYPES.values())
    | REDIRECT
    | problems(
        Unauthenticated,
        JobNotFound,
        FileNotInAdapter,
        AdapterNotReady,
        RangeNotSatisfiable,
        StoreUnavailable,
    ),
    openapi_extra=ASKED,
    summary="Download one file of an adapter",
)
async def get_adapter_file(file: str, adapter: FinishedAdapter, request: Request) -> Response:
    """Answers `Range`, `If-Range` and `If-None-Match`; the ETag is the file's sha256.

    Where the service is set up so, the bytes come from the store itself, by a redirect.
    """
    found = _find(adapter, file)
    media_type = MEDIA_TYPES.get(found.name.rpartition(".")[2], "application/octet-stream")
    blob = Blob(found.sha256, found.size)
    return answer(request, Content([blob], f'"{found.sha256}"', found.name, media_type))


def _find(adapter: Adapter, name: str) -> AdapterFile:
    for file in adapter.files:
        if file.name == name:
            return file
    names = ", ".join(file.name for file in adapter.files)
    raise FileNotInAdapter(f"The adapter has no file {name!r}.", f"It has {names}.")
