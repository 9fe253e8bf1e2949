"""Uploads that may break off and go on."""

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from app.datasets.digests import CONTENT, WHOLE, announced, compare
from app.datasets.resumable import ResumableUploads
from app.datasets.schemas import HASH, UploadState
from app.datasets.uploads import OF_RECEIVING, media_type, refuse_encoding
from app.errors import (
    HashMismatch,
    InvalidRequest,
    OffsetMismatch,
    QuotaExceeded,
    StoreUnavailable,
    TooLarge,
    Unauthenticated,
    UploadMismatch,
    UploadNotFound,
)
from app.headers import sent, told
from app.problems import Responses, problems

router = APIRouter(prefix="/datasets/uploads/{sha256}", tags=["datasets"])

BIGGEST = 2**63 - 1  # of the integers that both databases keep
OCTETS = "application/octet-stream"
BODY = {
    "required": True,
    "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}},
}
HERE: Responses = {
    200: {"headers": told("Upload-Offset")},
    201: {
        "model": UploadState,
        "description": "The dataset is here.",
        "headers": told("Upload-Offset", "Location"),
    },
}

Hash = Annotated[str, Path(pattern=HASH, description="SHA-256 of the whole file.")]
Offset = Annotated[
    int,
    Header(alias="Upload-Offset", ge=0, le=BIGGEST, description="Where the part begins."),
]


class BeginQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    filename: str = Field(
        max_length=1024, description="Its suffix tells the format: `rows.jsonl.gz`."
    )
    size: int = Field(ge=1, le=BIGGEST, description="Bytes of the whole file.")


@router.put(
    "",
    responses=HERE
    | problems(
        Unauthenticated,
        TooLarge,
        InvalidRequest,
        UploadMismatch,
        HashMismatch,
        QuotaExceeded,
        StoreUnavailable,
        faults=("filename_missing",),
    ),
    summary="Begin an upload, or find how far it has come",
)
async def begin_upload(
    sha256: Hash, query: Annotated[BeginQuery, Query()], request: Request, response: Response
) -> UploadState:
    """Repeatable. 201, and `dataset`, where this project has these bytes: nothing to send."""
    state = await ResumableUploads(request).begin(sha256, query.filename, query.size)
    return _told(state, request, response)


@router.get(
    "",
    responses=problems(Unauthenticated, UploadNotFound, InvalidRequest)
    | {200: {"headers": told("Upload-Offset", "Cache-Control")}},
    summary="How far an upload has come",
)
async def get_upload(sha256: Hash, request: Request, response: Response) -> UploadState:
    state = await ResumableUploads(request).show(sha256)
    response.headers["Cache-Control"] = "no-store"
    response.headers["Upload-Offset"] = str(state.offset)
    return state


@router.patch(
    "",
    responses=HERE
    | problems(
        Unauthenticated,
        UploadNotFound,
        OffsetMismatch,
        *OF_RECEIVING,
        faults=("digest_malformed",),
    ),
    openapi_extra={
        "requestBody": BODY,
        "parameters": sent("Repr-Digest", "Content-Digest"),
        "responses": {"409": {"headers": told(maybe=("Upload-Offset",))}},
    },
    summary="Send the next part of an upload",
)
async def append_to_upload(
    sha256: Hash, offset: Offset, request: Request, response: Response
) -> UploadState:
    """With the last one the hash is checked: 201, and `dataset` is filled.

    What has arrived of a part counts also where the connection breaks. A `Content-Digest` of the
    part is checked before it counts.
    """
    refuse_encoding(request.headers)
    media_type(request.headers.get("content-type", OCTETS))
    compare(sha256, announced(request.headers, WHOLE))
    expected = announced(request.headers, CONTENT)
    chunks = request.stream() if expected else _until_it_breaks(request)
    state = await ResumableUploads(request).append(sha256, offset, chunks, expected)
    return _told(state, request, response)


@router.delete(
    "",
    status_code=204,
    responses=problems(Unauthenticated, UploadNotFound, InvalidRequest, StoreUnavailable),
    summary="Forget an upload",
)
async def forget_upload(sha256: Hash, request: Request) -> None:
    """The dataset that has become of one stays."""
    await ResumableUploads(request).forget(sha256)


async def _until_it_breaks(request: Request) -> AsyncIterator[bytes]:
    with suppress(ClientDisconnect):
        async for chunk in request.stream():
            yield chunk


def _told(state: UploadState, request: Request, response: Response) -> UploadState:
    response.headers["Upload-Offset"] = str(state.offset)
    if state.dataset:
        response.status_code = 201
        root = request.scope.get("root_path", "")
        response.headers["Location"] = f"{root}/datasets/{state.dataset.id}"
    return state
