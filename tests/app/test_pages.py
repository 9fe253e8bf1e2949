"""The pages at /docs need nothing but this service, and let nothing else in."""

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import urlsplit

import httpx2
import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.app.service import Service, ok


class Page(HTMLParser):
    """What a browser would load of it, and the scripts that stand in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self._is_script = False
        self.feed(html)
        self.addresses += re.findall(r"url: '([^']+)'", self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [address for name in ("src", "href") if (address := given.get(name))]
        self._is_script = tag == "script" and "src" not in given

    def handle_data(self, data: str) -> None:
        if self._is_script:
            self.scripts.append(data)
            self._is_script = False


@pytest.fixture(params=["", "/tuning"], ids=["at the root", "behind a prefix"])
def prefix(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def http(settings: Settings, prefix: str) -> Iterator[TestClient]:
    app = create_app(settings)
    with TestClient(app, base_url="http://localhost", root_path=prefix) as http:
        yield http


@pytest.fixture
def answer(http: TestClient, prefix: str) -> httpx2.Response:
    return http.get(f"{prefix}/docs")


def policy(answer: httpx2.Response) -> dict[str, list[str]]:
    parts = [part.split() for part in answer.headers["content-security-policy"].split(";")]
    return {name: sources for name, *sources in parts}


def test_all_that_the_page_loads_is_answered_by_the_service(
    http: TestClient, prefix: str, answer: httpx2.Response
) -> None:
    addresses = Page(answer.text).addresses
    assert {urlsplit(address).path.removeprefix(prefix) for address in addresses} == {
        "/openapi.json",
        "/docs/assets/favicon.png",
        "/docs/assets/swagger-ui.css",
        "/docs/assets/swagger-ui-bundle.js",
    }
    for address in addresses:
        assert address.startswith(f"{prefix}/")
        assert http.get(address).status_code == 200, address


def test_the_page_names_no_other_host(answer: httpx2.Response) -> None:
    assert "//" not in answer.text
    assert '"validatorUrl": null' in answer.text  # else Swagger's own server is asked


def test_no_script_runs_but_the_bundle_and_the_pages_own(answer: httpx2.Response) -> None:
    (script,) = Page(answer.text).scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy(answer)["script-src"] == ["'self'", f"'sha256-{digest}'"]


def test_the_page_loads_from_nowhere_else_and_sends_nothing_elsewhere(
    answer: httpx2.Response,
) -> None:
    sources = {name: set(found) for name, found in policy(answer).items()}
    assert sources.pop("script-src") >= {"'self'"}
    assert sources.pop("default-src") == {"'none'"}
    assert sources["connect-src"] == {"'self'"}
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert sources[name] == {"'none'"}
    assert set().union(*sources.values()) <= {"'self'", "'none'", "data:"}


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/docs", "text/html"),
        ("/docs/assets/swagger-ui.css", "text/css"),
        ("/docs/assets/swagger-ui-bundle.js", "text/javascript"),
        ("/docs/assets/favicon.png", "image/png"),
    ],
)
def test_a_browser_takes_each_for_what_it_is(service: Service, path: str, media_type: str) -> None:
    for method in ("GET", "HEAD"):
        answer = service.http.request(method, path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(media_type)
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_a_browser_has_it_need_not_load_again(service: Service) -> None:
    path = "/docs/assets/swagger-ui-bundle.js"
    first = service.http.get(path)
    again = service.http.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name", ["redoc.standalone.js", "nothing.js", ".", "%2e%2e", "..%2fcore.py", "core.py%00.css"]
)
def test_nothing_but_the_assets_is_found_there(service: Service, name: str) -> None:
    assert ok(service.http.get(f"/docs/assets/{name}"), 404)["code"] == "not_found"


def test_the_assets_are_read_alone(service: Service) -> None:
    assert service.http.post("/docs/assets/swagger-ui.css").headers["allow"] == "GET, HEAD"
