"""A small service that keeps to the contract, on a real port, and fails when it is told to."""

import asyncio
import hashlib
import io
import json
import socket
import tarfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

Json = dict[str, Any]
Handler = Callable[[Request], Awaitable[Response]]

OVER = {"succeeded", "failed", "cancelled"}


@dataclass
class Fault:
    """What becomes of the next requests to a route."""

    route: str
    status: int = 0
    """0: the connection is cut."""
    after: bool = False
    """Only once the request has done its work."""
    bytes: int = 0
    """How many of the answer pass before a cut."""
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


@dataclass
class Seen:
    """A request that arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]


def problem(status: int, code: str, **more: Any) -> JSONResponse:
    body = {"title": code, "status": status, "detail": f"It is {code}.", "code": code, **more}
    return JSONResponse(body, status, media_type="application/problem+json")


@dataclass
class Peer:
    """What the service has, and what it does with requests; tests change it while it runs."""

    url: str = ""
    jobs: dict[str, Json] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    logs: list[Json] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    datasets: dict[str, Json] = field(default_factory=dict)
    keys: list[Json] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    """Ids of jobs by their idempotency key."""
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    waits: bool = True
    streams: bool = True
    takes_parts: bool = True
    hangs_up_after: int = 0
    """Events of one stream, after which it is cut."""
    elsewhere: str = ""
    """Where files of adapters are redirected to."""
    more: dict[str, Handler] = field(default_factory=dict)
    changes: list[tuple[str, int, Callable[[], object]]] = field(default_factory=list)

    def fail(self, route: str, **how: Any) -> None:
        self.faults.append(Fault(route, **how))

    def when(self, route: str, change: Callable[[], object], *, of: int) -> None:
        """Make a change as the request arrives that is this one of its kind, counted from 1."""
        self.changes.append((route, of, change))

    def answer(self, route: str, body: Any, status: int = 200) -> None:
        """What a route answers that has no state here."""

        async def handler(request: Request) -> Response:
            return Response(status_code=204) if body is None else JSONResponse(body, status)

        self.more[route] = handler

    def asked(self, route: str) -> list[Seen]:
        """The requests to ``METHOD /path``, in which * stands for one part."""
        return [seen for seen in self.seen if _matches(route, seen.method, seen.path)]

    def add_job(self, **values: Any) -> Json:
        job_id = f"job_{len(self.jobs):032x}"
        job = {"id": job_id, "status": "queued", "step": 0, "spec": {}, "adapter": None, **values}
        self.jobs[job_id] = job
        return job

    def add_event(self, kind: str) -> None:
        seq = len(self.events) + 1
        self.events.append({"seq": seq, "type": kind, "message": f"number {seq}", "data": {}})

    def publish(self, files: dict[str, bytes]) -> Json:
        """A job that has succeeded with these files."""
        self.files = files
        listed = [
            {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        ]
        size = sum(map(len, files.values()))
        return self.add_job(status="succeeded", adapter={"files": listed, "size": size})

    # The routes.

    async def create_job(self, request: Request) -> Response:
        key = request.headers["idempotency-key"]
        if key not in self.made:
            self.made[key] = self.add_job(spec=await request.json())["id"]
        return JSONResponse(self.jobs[self.made[key]], 202)

    async def list_jobs(self, request: Request) -> Response:
        start = int(request.query_params.get("after", 0))
        limit = int(request.query_params.get("limit", 2))
        found = list(self.jobs.values())[start : start + limit]
        more = start + limit < len(self.jobs)
        return JSONResponse({"items": found, "next": str(start + limit) if more else None})

    async def get_job(self, request: Request) -> Response:
        job_id, known = request.path_params["id"], request.headers.get("if-none-match")
        deadline = float(request.query_params.get("wait", 0)) if self.waits else 0
        while True:
            if job_id not in self.jobs:
                return problem(404, "job_not_found")
            body = json.dumps(self.jobs[job_id])
            etag = f'"{hashlib.sha256(body.encode()).hexdigest()}"'
            if etag != known:
                return Response(body, headers={"ETag": etag}, media_type="application/json")
            if deadline <= 0:
                return Response(status_code=304, headers={"ETag": etag})
            await asyncio.sleep(0.01)
            deadline -= 0.01

    async def act(self, request: Request) -> Response:
        job = self.jobs[request.path_params["id"]]
        match request.path_params["action"]:
            case "cancel":
                job["status"] = "cancelled"
            case "pause":
                job["status"] = "paused"
            case "resume":
                job["status"] = "queued"
            case "retry":
                job = self.add_job(retried_from=job["id"])
        return JSONResponse(job, 202)

    async def delete_job(self, request: Request) -> Response:
        if self.jobs.pop(request.path_params["id"], None) is None:
            return problem(404, "job_not_found")
        return Response(status_code=204)

    async def list_events(self, request: Request) -> Response:
        after = int(request.headers.get("last-event-id") or request.query_params["after"])
        if self.streams and "text/event-stream" in request.headers["accept"]:
            job = self.jobs[request.path_params["id"]]
            if job["status"] in OVER and after >= len(self.events):
                return Response(status_code=204)
            return StreamingResponse(
                self._stream(after, self.jobs[request.path_params["id"]]),
                media_type="text/event-stream",
            )
        return self._numbered(self.events, after)

    async def _stream(self, after: int, job: Json) -> AsyncIterator[str]:
        sent = 0
        yield "retry: 10\n\n: alive\n\n"
        while True:
            for event in self.events[after:]:
                data = json.dumps(event)
                yield f"id: {event['seq']}\nevent: {event['type']}\ndata: {data}\n\n"
                yield 'event: progress\ndata: {"step": 1}\n\n'
                after, sent = event["seq"], sent + 1
                if event["type"].removeprefix("job.") in OVER:
                    return
                if sent == self.hangs_up_after:
                    raise ConnectionAbortedError
            if job["status"] in OVER:
                return
            await asyncio.sleep(0.01)

    async def list_logs(self, request: Request) -> Response:
        return self._numbered(self.logs, int(request.query_params.get("after", 0)))

    def _numbered(self, items: list[Json], after: int) -> Response:
        found = items[after : after + 2]
        return JSONResponse({"items": found, "next": after + len(found)})

    async def get_file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if self.elsewhere and "if-range" not in request.headers:
            return Response(status_code=307, headers={"Location": f"{self.elsewhere}/store/{name}"})
        return self._file(request, name)

    async def get_stored(self, request: Request) -> Response:
        return self._file(request, request.path_params["name"])

    def _file(self, request: Request, name: str) -> Response:
        return self._bytes(request, self.files[name])

    def _bytes(self, request: Request, content: bytes) -> Response:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers, status, start = {"ETag": etag}, 200, 0
        asked = request.headers.get("range")
        if asked and request.headers.get("if-range", etag) == etag:
            first, last = asked.removeprefix("bytes=").split("-")
            start, status = int(first), 206
            if start >= len(content):
                return problem(416, "range_not_satisfiable")
            end = int(last) + 1 if last else len(content)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            return Response(content[start:end], status, headers)
        return Response(content, status, headers)

    async def get_tar(self, request: Request) -> Response:
        if not self.jobs[request.path_params["id"]]["adapter"]:
            return problem(409, "adapter_not_ready", hint="Wait.")
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for name, content in self.files.items():
                member = tarfile.TarInfo(f"adapter/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return self._bytes(request, packed.getvalue())

    async def create_dataset(self, request: Request) -> Response:
        content = await request.body()
        return JSONResponse(self._keep(content, request.query_params["filename"]), 201)

    def _keep(self, content: bytes, name: str) -> Json:
        sha256 = hashlib.sha256(content).hexdigest()
        kept = {"id": f"ds_{sha256[:32]}", "uri": f"dataset:ds_{sha256[:32]}", "filename": name}
        self.datasets[sha256] = kept | {"size": len(content), "sha256": sha256}
        return self.datasets[sha256]

    async def upload(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        if not self.takes_parts:
            return problem(404, "not_found")
        if request.method == "PUT":
            self.upload_name = request.query_params["filename"]
            self.upload_size = int(request.query_params["size"])
            have = self.uploads.setdefault(sha256, b"")
        else:
            have, part = self.uploads[sha256], await request.body()
            if int(request.headers["upload-offset"]) != len(have):
                return problem(409, "offset_mismatch", offset=len(have))
            have = self.uploads[sha256] = have + part
            if len(have) == self.upload_size:
                if hashlib.sha256(have).hexdigest() != sha256:
                    return problem(422, "hash_mismatch")
                self._keep(have, self.upload_name)
        done = self.datasets.get(sha256)
        state = {"sha256": sha256, "size": self.upload_size, "offset": len(have), "dataset": done}
        return JSONResponse(state, 201 if done and request.method == "PUT" else 200)

    async def create_key(self, request: Request) -> Response:
        self.keys.append({**await request.json(), "id": f"key{len(self.keys)}", "key": "flk_new"})
        return JSONResponse(self.keys[-1], 201)

    async def other(self, request: Request) -> Response:
        if handler := self.more.get(f"{request.method} {request.url.path}"):
            return await handler(request)
        return problem(404, "not_found")

    def app(self) -> Starlette:
        every = ["GET", "POST", "PUT", "PATCH", "DELETE"]
        return Starlette(
            routes=[
                Route("/jobs", self.create_job, methods=["POST"]),
                Route("/jobs", self.list_jobs),
                Route("/jobs/{id}", self.get_job),
                Route("/jobs/{id}", self.delete_job, methods=["DELETE"]),
                Route("/jobs/{id}/events", self.list_events),
                Route("/jobs/{id}/logs", self.list_logs),
                Route("/jobs/{id}/adapter", self.get_tar),
                Route("/jobs/{id}/adapter/{name:path}", self.get_file),
                Route("/jobs/{id}/{action}", self.act, methods=["POST"]),
                Route("/store/{name}", self.get_stored),
                Route("/datasets", self.create_dataset, methods=["POST"]),
                Route("/datasets/uploads/{sha256}", self.upload, methods=["PUT", "PATCH"]),
                Route("/keys", self.create_key, methods=["POST"]),
                Route("/{rest:path}", self.other, methods=every),
            ]
        )


def _matches(route: str, method: str, path: str) -> bool:
    wanted, found = route.split("/"), f"{method} {path}".split("/")
    return len(wanted) == len(found) and all(
        mine in {"*", theirs} for mine, theirs in zip(wanted, found, strict=True)
    )


@dataclass
class Faulty:
    """The service, with its faults before it."""

    peer: Peer

    def __post_init__(self) -> None:
        self.app = self.peer.app()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        query = dict(
            pair.split("=", 1) for pair in scope["query_string"].decode().split("&") if pair
        )
        self.peer.seen.append(Seen(scope["method"], scope["path"], query, headers))
        for route, count, change in self.peer.changes:
            is_it = _matches(route, scope["method"], scope["path"])
            if is_it and len(self.peer.asked(route)) == count:
                change()
        fault = self._due(scope)
        if fault is None:
            await self.app(scope, receive, send)
            return
        if fault.after or fault.bytes:
            kept: list[Message] = []
            await self.app(scope, receive, self._keeping(kept))
            body = b"".join(message.get("body", b"") for message in kept)
            if fault.bytes:
                await send(kept[0])
                part = {"type": "http.response.body", "body": body[: fault.bytes]}
                await send({**part, "more_body": True})
                return  # uvicorn cuts what is not complete
        if not fault.status:
            length = [(b"content-length", b"9")]
            await send({"type": "http.response.start", "status": 200, "headers": length})
            return
        answer = problem(fault.status, "on_purpose")
        answer.headers.update(fault.headers)
        await answer(scope, receive, send)

    def _due(self, scope: Scope) -> Fault | None:
        for fault in self.peer.faults:
            if fault.times and _matches(fault.route, scope["method"], scope["path"]):
                fault.times -= 1
                return fault
        return None

    @staticmethod
    def _keeping(kept: list[Message]) -> Send:
        async def send(message: Message) -> None:
            kept.append(message)

        return send


@contextmanager
def serving(peer: Peer) -> Iterator[Peer]:
    """The peer, on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            Faulty(peer), log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield peer
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
