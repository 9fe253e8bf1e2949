"""Requests as httpx2 sends them, for both kinds of client."""

import platform
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from flatlora_client.api import given
from flatlora_client.steps import CHUNK, Request
from flatlora_client.version import __version__

USER_AGENT = f"flatlora-client/{__version__} Python/{platform.python_version()}"


@dataclass(frozen=True)
class Wire:
    """Where requests go, with which key, and how long an answer may take."""

    url: str
    key: str | None
    timeout: float
    connect_timeout: float = 10

    def arguments(self, request: Request) -> dict[str, Any]:
        """Those of ``build_request``; a file is left to the caller."""
        answer = self.timeout if request.answer_seconds is None else request.answer_seconds
        headers = {"User-Agent": USER_AGENT, **request.headers}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        found = {
            "method": request.method,
            "url": self.url + request.path,
            "params": given(request.params),
            "headers": headers,
            "timeout": httpx2.Timeout(
                self.timeout, connect=min(self.connect_timeout, self.timeout), read=answer
            ),
        }
        if request.json is not None:
            found["json"] = request.json
        if isinstance(request.content, Path):
            # The length is told, so that a server can refuse it before it comes.
            headers["Content-Length"] = str(request.content.stat().st_size)
        elif request.content is not None:
            found["content"] = request.content
        return found


def chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, for an upload."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


async def chunks_async(path: Path) -> AsyncIterator[bytes]:
    """As ``chunks``; reading a megabyte does not hold the loop up for long."""
    for chunk in chunks(path):
        yield chunk
