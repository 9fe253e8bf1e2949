"""Headers of requests and answers, as the OpenAPI document describes them."""

from typing import Any

Json = dict[str, Any]

NUMBER = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}

TOLD: dict[str, Json] = {
    "Accept-Ranges": {"description": "Parts may be asked for with Range.", "schema": TEXT},
    "Cache-Control": {"description": "Who may keep the answer.", "schema": TEXT},
    "Content-Disposition": {"description": "The file's name.", "schema": TEXT},
    "Content-Range": {"description": "Which bytes of how many: `bytes 0-9/100`.", "schema": TEXT},
    "ETag": {"description": "Names what is answered: If-None-Match takes it.", "schema": TEXT},
    "Idempotent-Replayed": {
        "description": "This is the job of an earlier request.",
        "schema": {"const": "true"},
    },
    "Location": {
        "description": "Path of what is answered.",
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "RateLimit": {
        "description": "What is left of a key's and a project's requests, and in how many seconds "
        'they are all there again: `"key";r=59;t=60`.',
        "schema": TEXT,
    },
    "RateLimit-Policy": {
        "description": 'How many requests in how many seconds: `"key";q=60;w=60`.',
        "schema": TEXT,
    },
    "Retry-After": {"description": "Seconds to wait before asking again.", "schema": NUMBER},
    "Upload-Offset": {"description": "Bytes that have arrived.", "schema": NUMBER},
    "Vary": {"description": "The request header that the answer depends on.", "schema": TEXT},
    "WWW-Authenticate": {"description": "The way to show a key: `Bearer`.", "schema": TEXT},
    "X-Request-ID": {"description": "As sent, or made here; the log has it.", "schema": TEXT},
    "x-should-retry": {
        "description": "Tells OpenAI's clients not to send it again.",
        "schema": {"const": "false"},
    },
}

SENT = {
    "Content-Digest": "SHA-256 of this body (RFC 9530), `sha-256=:<base64>:`: else it is refused.",
    "Content-Disposition": "`attachment; filename=…`, where the query names no file.",
    "Flatlora-Project": "Chooses among the projects that a token opens. A key opens one: another "
    "name than that is refused.",
    "If-None-Match": "The ETag of what the client has: 304 while it is the same.",
    "If-Range": "The ETag of what the client has a part of: of anything else it gets the whole.",
    "Range": "One range of bytes: `bytes=100-`. Several, and what cannot be read, are ignored.",
    "Repr-Digest": "SHA-256 of the whole file (RFC 9530), `sha-256=:<base64>:`: else it is "
    "refused.",
    "X-Request-ID": "A name for this request, up to 64 letters, digits, `_`, `.` and `-`.",
}


def told(*always: str, maybe: tuple[str, ...] = ()) -> Json:
    """``headers`` of an answer: those that it always has, and those that depend."""
    required = {name: {**TOLD[name], "required": True} for name in always}
    return required | {name: TOLD[name] for name in maybe}


def sent(*names: str) -> list[Json]:
    """Headers of a request that the program reads by itself, as ``parameters``."""
    return [
        {"name": name, "in": "header", "required": False, "description": SENT[name], "schema": TEXT}
        for name in names
    ]
