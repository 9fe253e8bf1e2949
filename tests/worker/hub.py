"""A small hub: it plays the API by which files of datasets are fetched."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from tests.app.net.world import Site, give, serving

COMMITS = "a" * 40, "b" * 40


@dataclass
class Hub:
    """One repository, ``org/name``. ``main`` is a commit; ``files`` are by commit and path."""

    site: Site
    main: str = COMMITS[0]
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    fails: int = 0
    """So many requests are answered with 503."""
    is_gated: bool = False

    @property
    def endpoint(self) -> str:
        return self.site.url(host="127.0.0.1").rstrip("/")

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self.fails:
            self.fails -= 1
            return give(b"", 503)(handler)
        repo, _, rest = handler.path.removeprefix("/datasets/").partition("/resolve/")
        revision, _, path = rest.partition("/")
        if repo != "org/name":
            return _error(handler, 404, "RepoNotFound")
        if self.is_gated and handler.headers.get("Authorization") != "Bearer hf_token":
            return _error(handler, 403, "GatedRepo")
        commit = self.main if revision == "main" else unquote(revision)
        if commit not in COMMITS:
            return _error(handler, 404, "RevisionNotFound")
        body = self.files.get((commit, unquote(path)))
        if body is None:
            return _error(handler, 404, "EntryNotFound", X_Repo_Commit=commit)
        return give(body, ETag=f'"{commit[:3]}{len(body)}"', X_Repo_Commit=commit)(handler)


def _error(handler: BaseHTTPRequestHandler, status: int, code: str, **headers: str) -> None:
    give(b"", status, X_Error_Code=code, **headers)(handler)


@contextmanager
def small_hub() -> Iterator[Hub]:
    with serving(host="127.0.0.1") as site:
        hub = Hub(site)
        site.otherwise = hub.answer
        yield hub
