"""Answering for a download: whole, in part, elsewhere, or not at all as the client has it."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.access.streams import CHECK_SECONDS, still_allowed
from app.adapters.content import Blob, Content
from app.adapters.ranges import requested_range
from app.etags import names
from app.headers import sent, told
from app.problems import Responses

BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
WHOLE = told("ETag", "Accept-Ranges", "Cache-Control", "Content-Disposition")


def download(*media_types: str) -> Responses:
    """What a route answers that sends these types too, of no schema: a range is a part."""
    content = BYTES | {media_type: {} for media_type in media_types}
    return {
        200: {"description": "The bytes.", "content": content, "headers": WHOLE},
        206: {
            "description": "The range that was asked for.",
            "content": content,
            "headers": WHOLE | told("Content-Range"),
        },
        304: {
            "description": "The client has it: If-None-Match names its ETag.",
            "headers": told("ETag", "Cache-Control"),
        },
    }


ASKED = {"parameters": sent("Range", "If-Range", "If-None-Match")}
REDIRECT: Responses = {
    307: {
        "description": "The bytes are at the store itself (FLATLORA_DOWNLOADS=redirect).",
        "headers": {
            "Location": {
                "description": "Needs no key, and is valid for FLATLORA_PRESIGN_SECONDS.",
                "schema": {"type": "string", "format": "uri"},
                "required": True,
            },
            **told("Cache-Control"),
        },
    }
}


class FromStore(Response):
    """An answer for which the store is asked when it is sent.

    By then the database has its connection back, and a store that does not answer can still be
    told as a problem.
    """

    def __init__(self, make: Callable[[], Awaitable[Response]]) -> None:
        super().__init__()
        self._make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._make()
        await answer(scope, receive, send)


def answer(request: Request, content: Content) -> Response:
    headers = _headers(content)
    if names(request.headers.get("if-none-match"), content.etag):
        return Response(status_code=304, headers=headers)
    size = content.size
    wanted = None
    # If-Range: a client that has a part of something else gets the whole.
    if request.method == "GET" and request.headers.get("if-range", content.etag) == content.etag:
        wanted = requested_range(request.headers.get("range"), size)
    start, end = wanted or (0, size)
    headers["Content-Length"] = str(end - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    if request.method == "HEAD":
        return Response(headers=headers, media_type=content.media_type)
    if blob := _redirected(request, content):
        return FromStore(partial(_redirect, request, blob))
    status = 206 if wanted else 200

    async def stream() -> Response:
        chunks = _while_allowed(request, await content.open(request.state.store, start, end))
        return StreamingResponse(chunks, status, headers=headers, media_type=content.media_type)

    return FromStore(stream)


async def _while_allowed(request: Request, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """To the end, or until the key is revoked: then only a cut connection can tell."""
    checked = time.monotonic()
    async for chunk in chunks:
        if time.monotonic() - checked > CHECK_SECONDS:
            if not await still_allowed(request):
                raise ClientDisconnect
            checked = time.monotonic()
        yield chunk


def _redirected(request: Request, content: Content) -> Blob | None:
    """The file that the client is to take from the store.

    Not with If-Range, which names an ETag of ours: the store knows the file by another.
    """
    if request.state.settings.downloads != "redirect" or "if-range" in request.headers:
        return None
    match content.parts:
        case [Blob() as blob]:
            return blob
        case _:
            return None


async def _redirect(request: Request, blob: Blob) -> Response:
    """A client repeats its Range there."""
    seconds = request.state.settings.presign_seconds
    url = await request.state.store.presigned(blob.sha256, seconds)
    # The URL is as good as a key until it ends: no cache may keep it.
    return Response(
        status_code=307, headers={"Location": url, "Cache-Control": "private, no-store"}
    )


def _headers(content: Content) -> dict[str, str]:
    return {
        "ETag": content.etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(content.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
        "Cache-Control": "private, no-cache",
    }
