"""``/v1/files``: uploaded datasets, and the results of finished jobs."""

import hashlib
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.datastructures import FormData, UploadFile

from app.adapters.content import Blob, Content
from app.adapters.download import ASKED, REDIRECT, answer, download
from app.datasets.endpoints import BINARY, FAULTS, UploadQuery, received
from app.datasets.schemas import Dataset
from app.datasets.service import DatasetService
from app.datasets.uploads import OF_RECEIVING, Upload
from app.errors import (
    DatasetInUse,
    DatasetNotFound,
    InvalidRequest,
    JobNotFound,
    RangeNotSatisfiable,
    StoreUnavailable,
    Unauthenticated,
    UnsupportedMediaType,
)
from app.jobs.endpoints import Page
from app.jobs.service import JobService
from app.openai_api.errors import FileNotFound, ResultsOfJob, bad_cursor, refusals, unsupported
from app.openai_api.ids import dataset_id, file_id, job_of_results, results_id
from app.openai_api.paging import After
from app.openai_api.presenting import has_adapter, unix
from app.openai_api.repository import OpenAIRepository
from app.openai_api.results import results_csv
from app.openai_api.schemas import File, FileDeleted, FilePage
from app.openai_api.shape import PREFIX
from app.sessions import ReadSession, WriteSession, note_change
from app.tables import DatasetRow, JobRow

router = APIRouter(prefix=f"{PREFIX}/files", tags=["openai"])

RESULTS_PER_PAGE = 20  # each is made to know its size
MAX_FILENAME = 1024
RESULTS = "results.csv"
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": BINARY, "purpose": {"const": "fine-tune"}},
}
BODY = {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}


class ListQuery(Page):
    after: After = None
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: Literal["fine-tune", "fine-tune-results"] = Field(
        "fine-tune", description="Results are listed where they are asked for."
    )


async def uploaded(request: Request) -> Upload:
    """The file of the form, stored, before a transaction is begun."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedMediaType(
            "A file comes as multipart/form-data, in a part named file.",
            "With curl: -F purpose=fine-tune -F file=@rows.jsonl",
        )
    form = await request.form(max_files=1, max_fields=8)
    try:
        name = _checked(form)
        return await received(request, UploadQuery(filename=name))
    finally:
        await form.close()


def _checked(form: FormData) -> str:
    """The file's name, where nothing is asked for that is not done."""
    if (purpose := form.get("purpose")) != "fine-tune":
        raise unsupported("purpose", f"Files are for 'fine-tune' here; found {purpose!r}.")
    for field in form:
        if field not in {"file", "purpose"}:
            raise unsupported(field, "A file has no such setting here; it is kept until deleted.")
    file = form.get("file")
    name = file.filename or "" if isinstance(file, UploadFile) else ""
    named = name if "." in name else f"{name or 'upload'}.jsonl"  # as OpenAI takes them
    return named[-MAX_FILENAME:]


@router.post(
    "",
    responses=refusals(
        Unauthenticated,
        *OF_RECEIVING,
        faults=(*FAULTS, "filename_missing", "digest_malformed", "unsupported_value"),
    ),
    openapi_extra={"requestBody": BODY},
    summary="Upload a training file",
)
async def create_file(
    upload: Annotated[Upload, Depends(uploaded)], session: WriteSession, request: Request
) -> File:
    """The same bytes under the same name are the same file, so a retry makes no second one."""
    dataset, is_new = await DatasetService(session).keep(upload, request.state.settings)
    note_change(request, dataset.id if is_new else None)
    return _present(dataset)


@router.get(
    "",
    responses=refusals(Unauthenticated, InvalidRequest, faults=("cursor_malformed",)),
    summary="List files",
)
async def list_files(session: ReadSession, query: Annotated[ListQuery, Query()]) -> FilePage:
    """By the time of upload; results by the time their job was submitted."""
    if query.purpose == "fine-tune":
        files, has_more = await _page_of_datasets(session, query)
    else:
        files, has_more = await _page_of_results(session, query)
    return FilePage(
        data=files,
        first_id=files[0].id if files else None,
        last_id=files[-1].id if files else None,
        has_more=has_more,
    )


async def _page_of_datasets(session: AsyncSession, query: ListQuery) -> tuple[list[File], bool]:
    after = dataset_id(query.after) if query.after else None
    if query.after and not after:
        raise bad_cursor(query.after, "a file")
    rows = await OpenAIRepository(session).datasets(
        limit=query.limit + 1, after=after, is_ascending=query.order == "asc"
    )
    return [_present(row) for row in rows[: query.limit]], len(rows) > query.limit


async def _page_of_results(session: AsyncSession, query: ListQuery) -> tuple[list[File], bool]:
    after = job_of_results(query.after) if query.after else None
    if query.after and not after:
        raise bad_cursor(query.after, "a file of results")
    limit = min(query.limit, RESULTS_PER_PAGE)
    rows = await OpenAIRepository(session).with_adapter(
        limit=limit + 1, after=after, is_ascending=query.order == "asc"
    )
    files = [_present_results(row, await _results(session, row)) for row in rows[:limit]]
    return files, len(rows) > limit


@router.get("/{file_id}", responses=refusals(Unauthenticated, FileNotFound), summary="Show a file")
async def get_file(file_id: str, session: ReadSession, request: Request) -> File:
    if job_id := job_of_results(file_id):
        row = await _finished(session, request, job_id, file_id)
        return _present_results(row, await _results(session, row))
    return _present(await _dataset(session, file_id))


@router.delete(
    "/{file_id}",
    responses=refusals(Unauthenticated, FileNotFound, ResultsOfJob, DatasetInUse),
    summary="Delete a file",
)
async def delete_file(file_id: str, session: WriteSession, request: Request) -> FileDeleted:
    """Not while a job that is not over reads it."""
    if job_id := job_of_results(file_id):
        await _finished(session, request, job_id, file_id)
        raise ResultsOfJob("A job's results are kept as long as the job.", "Delete the job.")
    dataset = await _dataset(session, file_id)
    await DatasetService(session).delete(dataset.id)
    note_change(request, dataset.id)
    return FileDeleted(id=file_id)


@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses=download("text/csv")
    | REDIRECT
    | refusals(Unauthenticated, FileNotFound, RangeNotSatisfiable, StoreUnavailable),
    openapi_extra=ASKED,
    summary="Download a file",
)
async def get_file_content(file_id: str, session: ReadSession, request: Request) -> Response:
    """Answers `Range` and `If-None-Match`. Results are CSV: the metrics of each step."""
    if job_id := job_of_results(file_id):
        made = await _results(session, await _finished(session, request, job_id, file_id))
        etag = f'"{hashlib.sha256(made).hexdigest()}"'
        return answer(request, Content([made], etag, RESULTS, "text/csv"))
    file = await _dataset(session, file_id)
    blob = Blob(file.sha256, file.size)
    etag = f'"{file.sha256}"'
    return answer(request, Content([blob], etag, file.filename, "application/octet-stream"))


async def _dataset(session: AsyncSession, file: str) -> Dataset:
    try:
        return await DatasetService(session).get(dataset_id(file) or "")
    except DatasetNotFound:
        raise FileNotFound(file) from None


async def _finished(session: AsyncSession, request: Request, job_id: str, file: str) -> JobRow:
    try:
        row = await JobService(session, request.state.settings).row(job_id)
    except JobNotFound:
        raise FileNotFound(file) from None
    if not has_adapter(row):
        raise FileNotFound(file)
    return row


async def _results(session: AsyncSession, row: JobRow) -> bytes:
    return results_csv(await OpenAIRepository(session).metrics(row.id))


def _present(dataset: Dataset | DatasetRow) -> File:
    return File(
        id=file_id(dataset.id),
        bytes=dataset.size,
        created_at=unix(dataset.created_at),
        filename=dataset.filename,
        purpose="fine-tune",
    )


def _present_results(row: JobRow, content: bytes) -> File:
    return File(
        id=results_id(row.id),
        bytes=len(content),
        created_at=unix(row.finished_at or row.updated_at),
        filename=RESULTS,
        purpose="fine-tune-results",
    )
