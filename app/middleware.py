"""Around every request: an id, a line in the log, and a check of the Host header."""

import json
import re
import time
import uuid
from http import HTTPStatus
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import MEDIA_TYPE

log = structlog.get_logger()

REQUEST_ID = re.compile(r"[\w.-]{1,64}")
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class RequestLog:
    """Takes the client's ``X-Request-ID`` or makes one, answers with it, and logs under it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                log.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    milliseconds=round(1000 * (time.perf_counter() - started), 1),
                )


class HostCheck:
    """A service on the loopback answers only to its names.

    A web page can make a name of its own resolve to 127.0.0.1 (DNS rebinding); its requests then
    come from the user's browser, but still carry that name.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._is_checked = host in LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_checked:
            given = Headers(scope=scope).get("host", "")
            name = given.rpartition(":")[0] if re.search(r":\d+$", given) else given
            if name.strip("[]").lower() not in LOOPBACK:
                await _refuse(scope, send, given)
                return
        await self._app(scope, receive, send)


async def _refuse(scope: Scope, send: Send, given: str) -> None:
    status = HTTPStatus.MISDIRECTED_REQUEST
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status,
        "detail": f"This service does not answer to the host {given!r}.",
        "code": "host_not_allowed",
        "hint": "Use localhost or 127.0.0.1; set FLATLORA_HOST to listen on another address.",
        "errors": [],
        "instance": scope["path"],
        "request_id": scope.get("state", {}).get("request_id", ""),
    }
    headers = [(b"content-type", MEDIA_TYPE.encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(problem).encode()})
