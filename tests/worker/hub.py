"""A small hub: it plays the API by which files of datasets and of models are fetched."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants, file_download

from tests.app.net.world import Site, give, serving

COMMITS = "a" * 40, "b" * 40


@dataclass
class Hub:
    """One repository, ``org/name``, which is a dataset and a model.

    ``main`` is a commit; ``files`` are by commit and path.
    """

    site: Site
    main: str = COMMITS[0]
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    fails: int = 0
    """So many requests are answered with 503."""
    is_gated: bool = False
    stuck: str = ""
    """A path whose bytes do not come before ``released``."""
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        return self.site.url(host="127.0.0.1").rstrip("/")

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self.fails:
            self.fails -= 1
            return give(b"", 503)(handler)
        if handler.path.startswith("/api/models/"):
            return self.describe(handler)
        repo, _, rest = handler.path.removeprefix("/datasets").partition("/resolve/")
        revision, _, path = rest.partition("/")
        if repo != "/org/name":
            return _error(handler, 404, "RepoNotFound")
        if self.is_gated and handler.headers.get("Authorization") != "Bearer hf_token":
            return _error(handler, 403, "GatedRepo")
        commit = self._commit(revision)
        if commit is None:
            return _error(handler, 404, "RevisionNotFound")
        if self.stuck == unquote(path):
            self.released.wait()
        body = self.files.get((commit, unquote(path)))
        if body is None:
            return _error(handler, 404, "EntryNotFound", X_Repo_Commit=commit)
        return give(body, ETag=f'"{commit[:3]}{len(body)}"', X_Repo_Commit=commit)(handler)

    def fetched(self) -> set[str]:
        """The paths of which anybody has asked for a file."""
        asked = (path.partition("/resolve/")[2] for path, _ in self.site.asked)
        return {unquote(path.partition("/")[2]) for path in asked if path}

    def _commit(self, revision: str) -> str | None:
        commit = self.main if revision in {"", "main"} else unquote(revision)
        return commit if commit in COMMITS else None

    def describe(self, handler: BaseHTTPRequestHandler) -> None:
        """What a model is, or which files it has."""
        path = handler.path.partition("?")[0].removeprefix("/api/models/")
        repo, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        if repo != "org/name":
            return _error(handler, 404, "RepoNotFound")
        commit = self._commit(rest[1] if rest else "")
        if commit is None:
            return _error(handler, 404, "RevisionNotFound")
        files = {path: len(body) for (at, path), body in self.files.items() if at == commit}
        if rest and rest[0] == "tree":
            told: Any = [
                {"type": "file", "path": path, "size": size, "oid": f"{commit[:3]}{size}"}
                for path, size in files.items()
            ]
        else:
            siblings = [{"rfilename": path, "size": size} for path, size in files.items()]
            told = {"id": repo, "sha": commit, "siblings": siblings}
        return give(json.dumps(told).encode(), content_type="application/json")(handler)


def _error(handler: BaseHTTPRequestHandler, status: int, code: str, **headers: str) -> None:
    give(b"", status, X_Error_Code=code, **headers)(handler)


@contextmanager
def small_hub() -> Iterator[Hub]:
    with serving(host="127.0.0.1") as site:
        hub = Hub(site)
        site.otherwise = hub.answer
        try:
            yield hub
        finally:
            hub.released.set()


def point_library_at(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has read the environment long ago: what it made of it is replaced."""
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
