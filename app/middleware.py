"""Around every request: an id, a line in the log, and what is refused before it is looked at."""

import re
import time
import uuid
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import CrossSite, HostNotAllowed, ServiceError, too_large
from app.metrics import Metrics
from app.problems import respond
from app.tracing import trace_id

log = structlog.get_logger()

REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
PORT = re.compile(r":\d*$")
READING = {"GET", "HEAD", "OPTIONS"}
UPLOADS = {"/datasets", "/v1/files"}
UPLOAD_PART = re.compile(r"/datasets/uploads/[^/]+")
PROBES = {"/healthz", "/readyz", "/metrics"}
UNMATCHED = "unmatched"  # of paths that no route knows: who scans for them makes no new series
INTERNAL = ServiceError(
    "The service met an error of its own.", "Its log has the details under this request_id."
)


class RequestLog:
    """Takes the client's ``X-Request-ID`` or makes one, answers with it, and logs under it.

    An error that nobody foresaw ends here: it is logged in full and told in general, because it
    may hold anything.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

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
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers.update(scope["state"].get("headers", {}))
                self._count(scope, status, time.perf_counter() - started)
            await send(message)

        ids = {"request_id": request_id} | ({"trace_id": trace} if (trace := trace_id()) else {})
        with structlog.contextvars.bound_contextvars(**ids):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                log.info("the client has gone", path=scope["path"])
            except Exception:
                log.exception("unhandled error", path=scope["path"])
                if status:  # half of an answer has left: only a cut connection tells the client
                    raise
                await respond(scope, INTERNAL)(scope, receive, send_with_id)
            finally:
                _log_request(scope, status, time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        """By the route's template: a path has ids in it."""
        route = getattr(scope.get("route"), "path", UNMATCHED)
        self._metrics.request_answered(scope["method"], route, status, seconds)


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    write = log.debug if scope["path"] in PROBES else log.info
    write(
        "request",
        method=scope["method"],
        path=scope["path"],
        status=status,
        milliseconds=round(1000 * seconds, 1),
    )


class BodyLimit:
    """Refuses a body that is too large: at once if it says its size, else when it has grown.

    Not FastAPI's ``max_body_size``: that one sends plain text in place of a problem.
    """

    def __init__(self, app: ASGIApp, bytes: int, upload_bytes: int, part_bytes: int) -> None:
        self._app = app
        self._bytes = bytes
        self._upload_bytes = upload_bytes
        self._part_bytes = part_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            await respond(scope, too_large(limit))(scope, receive, send)
            return
        seen = 0

        async def counting() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                # FastAPI lets no other kind of error out of the reading of a body.
                raise HTTPException(413, too_large(limit).detail)
            return message

        await self._app(scope, counting, send)

    def _limit(self, scope: Scope) -> int:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in UPLOADS:
            return self._upload_bytes
        if scope["method"] == "PATCH" and UPLOAD_PART.fullmatch(path):
            return self._part_bytes
        return self._bytes


class SameSite:
    """Keeps other web pages out of a service that the user's browser can reach.

    A page can make a name of its own resolve to 127.0.0.1 (DNS rebinding): its requests still
    carry that name in ``Host``. A page can send a form anywhere: browsers say so in
    ``Sec-Fetch-Site``.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal:
            await respond(scope, refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ServiceError | None:
        headers = Headers(scope=scope)
        host = PORT.sub("", headers.get("host", "").lower())
        if self._hosts and host not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            return HostNotAllowed(
                f"This service does not answer to the host {host!r}.",
                f"It answers to {known}; FLATLORA_ALLOWED_HOSTS sets that.",
            )
        is_writing = scope["method"] not in READING
        if is_writing and headers.get("sec-fetch-site") in {"cross-site", "same-site"}:
            return CrossSite("A web page of another site sent this request.")
        return None
