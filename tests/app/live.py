"""The app behind real sockets, in a thread of this process: what streams and who waits is seen."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn
from sqlalchemy import update
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Receive, Scope, Send

from app.changes import Changes
from app.db import now
from app.jobs.events import event
from app.main import create_app
from app.settings import Settings
from app.tables import JobRow
from tests.app.service import Service
from tests.system.service import until

Json = dict[str, Any]


@dataclass
class Live(Service):
    state: Json = field(default_factory=dict)
    """What the app's requests share."""

    @property
    def waiting(self) -> int:
        changes: Changes = self.state["changes"]
        return changes.watchers

    def happen(self, job_id: str, type_: str, **values: Any) -> None:
        """As a worker writes it: an event and the row's columns, in one transaction."""
        with Session(self.engine) as session, session.begin():
            row = update(JobRow).where(JobRow.id == job_id)
            session.execute(row.values(updated_at=now(), **values))
            session.execute(event(job_id, type_, f"It is {type_}."))

    @contextmanager
    def stream(self, job_id: str, query: str = "", **headers: str) -> Iterator[Iterator[Json]]:
        """The messages of an event stream as they come, ``{id, event, data}``, or a comment."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        wanted = {"Accept": "text/event-stream"} | sent
        with self.http.stream("GET", f"/jobs/{job_id}/events{query}", headers=wanted) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-cache"
            yield messages(response.iter_lines())


def messages(lines: Iterator[str]) -> Iterator[Json]:
    found: Json = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line:
            found[name or "comment"] = json.loads(value) if name == "data" else value
        elif found:
            yield found
            found = {}


class Looking:
    """Around the app, to see what its requests share."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.state: Json = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.state, self.loop = scope["state"], asyncio.get_running_loop()
        await self._app(scope, receive, send)


@contextmanager
def live(settings: Settings) -> Iterator[Live]:
    app = Looking(create_app(settings))
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started, seconds=30, every=0.01)
        (port,) = [s.getsockname()[1] for one in server.servers for s in one.sockets]
        limits = httpx2.Limits(max_connections=None)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, limits=limits) as http:
            assert http.get("/healthz").is_success
            service = Live(http, settings, state=app.state)
            yield service
            service.engine.dispose()
    finally:
        if app.loop:  # as the signal does it that a server of its own process gets
            app.loop.call_soon_threadsafe(app.state["changes"].close)
        server.should_exit = True
        thread.join(30)
