"""Answering for a download: whole, in part, or not at all because the client has it already."""

from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from app.adapters.content import Content
from app.adapters.ranges import requested_range
from app.errors import Responses
from app.etags import names

DOWNLOAD: Responses = {
    200: {
        "description": "The bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    },
    206: {"description": "The range that was asked for."},
    304: {"description": "The client has it: If-None-Match names its ETag."},
}


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
    chunks = content.stream(request.state.store, start, end)
    status = 206 if wanted else 200
    return StreamingResponse(chunks, status, headers=headers, media_type=content.media_type)


def _headers(content: Content) -> dict[str, str]:
    return {
        "ETag": content.etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(content.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
        "Cache-Control": "private, no-cache",
    }
