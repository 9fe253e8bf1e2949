"""The routes of datasets."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile

from app.datasets.digests import CONTENT, WHOLE, announced, malformed
from app.datasets.names import SUFFIXES, disposition_filename
from app.datasets.repository import DatasetFilter
from app.datasets.schemas import HASH, Dataset, DatasetPage
from app.datasets.service import DatasetService
from app.datasets.uploads import (
    OF_RECEIVING,
    Upload,
    check_size,
    media_type,
    receive,
    refuse_encoding,
    safe_filename,
)
from app.errors import (
    DatasetInUse,
    DatasetNotFound,
    InvalidRequest,
    Unauthenticated,
)
from app.faults import Fault
from app.headers import sent, told
from app.problems import Responses, problems
from app.quotas.service import Quotas, check_room
from app.sessions import ReadSession, WriteSession, note_change, transaction

router = APIRouter(prefix="/datasets", tags=["datasets"])

CHUNK = 1 << 20
BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "required": ["file"], "properties": {"file": BINARY}}
BODY = {
    "required": True,
    "content": {
        **{name: {"schema": BINARY} for name in SUFFIXES},
        "application/json": {"schema": {}},  # rows of any shape: the worker reads them
        "multipart/form-data": {"schema": FORM},
    },
}
FAULTS = ("dataset_empty", "file_missing")
KEPT: Responses = {
    200: {
        "model": Dataset,
        "description": "These bytes were here under this name already.",
        "headers": told("Location"),
    },
    201: {"headers": told("Location")},
}


class ListQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sha256: str | None = Field(None, pattern=HASH)
    filename: str | None = Field(None, max_length=1024, pattern=r"^[^\x00]*$")
    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(
        None, pattern="^ds_[0-9a-f]{32}$", description="`next` of the page before."
    )


class UploadQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    filename: str | None = Field(
        None, max_length=1024, description="Its suffix tells the format: `rows.jsonl.gz`."
    )
    sha256: str | None = Field(
        None,
        pattern=HASH,
        description="The file's: it is refused if it arrives as another. "
        "Without a form also as `Repr-Digest: sha-256=:…:`.",
    )


async def received(request: Request, query: Annotated[UploadQuery, Query()]) -> Upload:
    """The upload, stored, before a transaction is begun."""
    state, headers = request.state, request.headers
    admit = partial(_admit, request)
    refuse_encoding(headers)
    digests = announced(headers, WHOLE, CONTENT)  # one and the same without an encoding
    expected = digests | ({query.sha256} if query.sha256 else set())
    content_type = headers.get("content-type", "")
    if content_type.lower().startswith("multipart/form-data"):
        if digests:
            raise malformed(WHOLE, "it is of the form, and only the file in it is kept")
        async with request.form(max_files=1, max_fields=8) as form:
            file = _file_part(form)
            check_size(file.size or 0, state.settings)
            await check_room(request, file.size or 0)
            name = safe_filename(query.filename or file.filename or "", file.content_type or "")
            return await receive(_chunks(file), name, expected, state.settings, state.store, admit)
    given = query.filename or disposition_filename(headers.get("content-disposition", ""))
    name = safe_filename(given, media_type(content_type))
    if (declared := headers.get("content-length", "")).isdecimal():
        await check_room(request, int(declared))  # BodyLimit has refused what is no size
    return await receive(request.stream(), name, expected, state.settings, state.store, admit)


async def _admit(request: Request, size: int, sha256: str) -> None:
    if request.state.limits.max_stored_bytes is not None:
        async with transaction(request, writes=True) as session:
            await Quotas(session, request.state.settings).admit_bytes(size, sha256)


def _file_part(form: FormData) -> UploadFile:
    file = form.get("file")
    if isinstance(file, UploadFile):
        return file
    raise InvalidRequest(
        "The form has no file in a part named file.",
        "With curl: -F file=@rows.jsonl",
        faults=[Fault(pointer="/file", detail="This part is required.", code="file_missing")],
    )


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(CHUNK):
        yield chunk


@router.post(
    "",
    status_code=201,
    responses=problems(
        Unauthenticated,
        *OF_RECEIVING,
        faults=(*FAULTS, "filename_missing", "digest_malformed"),
    )
    | KEPT,
    openapi_extra={
        "requestBody": BODY,
        "parameters": sent("Repr-Digest", "Content-Digest", "Content-Disposition"),
    },
    summary="Upload a dataset",
)
async def create_dataset(
    upload: Annotated[Upload, Depends(received)],
    session: WriteSession,
    request: Request,
    response: Response,
) -> Dataset:
    """The file's bytes, or a form with a part `file`. The same bytes are kept once."""
    dataset, is_new = await DatasetService(session).keep(upload, request.state.settings)
    note_change(request, dataset.id if is_new else None)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"{request.scope.get('root_path', '')}/datasets/{dataset.id}"
    return dataset


@router.get(
    "", summary="List datasets, newest first", responses=problems(Unauthenticated, InvalidRequest)
)
async def list_datasets(session: ReadSession, query: Annotated[ListQuery, Query()]) -> DatasetPage:
    wanted = DatasetFilter(query.sha256, query.filename)
    return await DatasetService(session).list(wanted, limit=query.limit, after=query.after)


@router.get(
    "/{dataset_id}",
    summary="Show a dataset",
    responses=problems(Unauthenticated, DatasetNotFound),
)
async def get_dataset(dataset_id: str, session: ReadSession) -> Dataset:
    return await DatasetService(session).get(dataset_id)


@router.delete(
    "/{dataset_id}",
    status_code=204,
    summary="Remove a dataset",
    responses=problems(Unauthenticated, DatasetNotFound, DatasetInUse),
)
async def delete_dataset(dataset_id: str, session: WriteSession) -> None:
    """Not while a job that is not over names it. Its bytes go when nothing else needs them."""
    await DatasetService(session).delete(dataset_id)
