"""The routes of datasets."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response, UploadFile
from starlette.datastructures import UploadFile as FormFile

from app.datasets.schemas import Dataset, DatasetPage
from app.datasets.service import DatasetService, Upload, receive
from app.db import ReadSession, WriteSession
from app.errors import DatasetNotFound, Fault, InvalidRequest, TooLarge, problems

router = APIRouter(prefix="/datasets", tags=["datasets"])

CHUNK = 1 << 20

UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


async def received(
    request: Request,
    filename: Annotated[
        str | None,
        Query(max_length=1024, description="Its suffix tells the format."),
    ] = None,
) -> Upload:
    """The upload, stored, before a transaction is begun."""
    state = request.state
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        async with request.form(max_files=1, max_fields=8) as form:
            file = form.get("file")
            if not isinstance(file, FormFile):
                raise InvalidRequest(
                    "The form has no part named file.",
                    "curl -F file=@rows.jsonl …/datasets",
                    faults=[Fault(pointer="/file", detail="missing", code="missing")],
                )
            name = filename or file.filename or ""
            return await receive(_chunks(file), name, state.settings, state.store)
    return await receive(request.stream(), filename or "", state.settings, state.store)


async def _chunks(file: FormFile | UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(CHUNK):
        yield chunk


@router.post(
    "",
    status_code=201,
    responses=problems(InvalidRequest, TooLarge)
    | {200: {"model": Dataset, "description": "These bytes were here already."}},
    openapi_extra=UPLOAD_BODY,
    summary="Upload a dataset",
)
async def create_dataset(
    upload: Annotated[Upload, Depends(received)], session: WriteSession, response: Response
) -> Dataset:
    """Raw bytes with `?filename=`, or a form with a part `file`. The same bytes are kept once."""
    dataset, is_new = await DatasetService(session).keep(upload)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return dataset


@router.get("", summary="List datasets, newest first", responses=problems())
async def list_datasets(
    session: ReadSession,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> DatasetPage:
    return await DatasetService(session).list(limit=limit, after=after)


@router.get("/{dataset_id}", summary="Show a dataset", responses=problems(DatasetNotFound))
async def get_dataset(dataset_id: str, session: ReadSession) -> Dataset:
    return await DatasetService(session).get(dataset_id)
