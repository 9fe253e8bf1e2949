"""A real S3 server for the tests: moto's, in a process of its own, on an endpoint over HTTP.

What moto leaves out is put in front of it: presigned URLs are checked, with botocore's signatures,
and ``/_age`` makes an object look older than it is.

    python -m tests.s3 PORT
"""

import sys
import urllib.request
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlencode

import pytest

from app.ids import new_id
from tests.faults.procs import spawn
from tests.faults.servers import Server

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

ROOT = Path(__file__).resolve().parents[1]
BUCKET, REGION = "flatlora", "eu-central-1"
KEY_ID, SECRET = "AKIAOFTHETESTS", "secret-of-the-tests"
AGE = "/_age/"


class S3Server(Server):
    """Holds one bucket, in memory: started again it is empty."""

    name = "s3"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a client finds it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def url(self, prefix: str = "") -> str:
        """For ``FLATLORA_STORE_URL``."""
        return f"s3://{BUCKET}/{prefix}".rstrip("/")

    def start(self) -> None:
        super().start()
        self._send("PUT", f"/{BUCKET}")

    def age(self, key: str, by: timedelta) -> None:
        """``key`` is that in the bucket, with its prefix."""
        self._send("POST", f"{AGE}{key}?{urlencode({'seconds': by.total_seconds()})}")

    def uploads(self) -> str:
        """Uploads in parts that were neither completed nor given up, as XML."""
        return self._send("GET", f"/{BUCKET}?uploads").decode()

    def _send(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(self.endpoint + path, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            found: bytes = answer.read()
        return found

    def _spawn(self) -> "Popen[bytes]":
        command = [sys.executable, "-m", "tests.s3", str(self.port)]
        return spawn(command, log=self.log, folder=ROOT)

    def _answers(self) -> bool:
        try:
            self._send("GET", "/")
        except OSError:
            return False
        return True

    def _remove(self) -> None:
        """It has written nothing."""


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One for all tests that leave it running."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of the test's own in the bucket; the variables by which it is reached are set."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.url(new_id("test"))


def _main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, run_simple

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay, as those of S3 do

    served = _with_tests(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", int(sys.argv[1]), served, threaded=True, request_handler=Handler)


def _with_tests(moto: "WSGIApplication") -> "WSGIApplication":
    def served(environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        path, query = environ["PATH_INFO"], dict(parse_qsl(environ["QUERY_STRING"]))
        if path.startswith(AGE):
            _age(path.removeprefix(AGE), timedelta(seconds=float(query["seconds"])))
            start("204 No Content", [])
            return []
        if "X-Amz-Signature" in query and (problem := _problem(environ, query)):
            body = f"<Error><Code>AccessDenied</Code><Message>{problem}</Message></Error>".encode()
            start("403 Forbidden", [("Content-Length", str(len(body)))])
            return [body]
        return moto(environ, start)

    return served


def _age(key: str, by: timedelta) -> None:
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    found = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys[key]
    found.last_modified -= by


def _problem(environ: "WSGIEnvironment", query: dict[str, str]) -> str | None:
    """What S3 refuses in a presigned URL."""
    signed_at = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    if datetime.now(UTC) > signed_at + timedelta(seconds=int(query["X-Amz-Expires"])):
        return "Request has expired"
    if _signature(environ, query) != query["X-Amz-Signature"]:
        return "The request signature we calculated does not match the signature you provided."
    return None


def _signature(environ: "WSGIEnvironment", query: dict[str, str]) -> str:
    from botocore.auth import S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    signed = {name: value for name, value in query.items() if name != "X-Amz-Signature"}
    address = f"http://{environ['HTTP_HOST']}{quote(environ['PATH_INFO'])}"
    url = f"{address}?{urlencode(signed, quote_via=quote)}"
    request = AWSRequest(method=environ["REQUEST_METHOD"], url=url)
    request.context["timestamp"] = query["X-Amz-Date"]
    auth = S3SigV4QueryAuth(Credentials(KEY_ID, SECRET), "s3", REGION)
    found: str = auth.signature(
        auth.string_to_sign(request, auth.canonical_request(request)), request
    )
    return found


if __name__ == "__main__":
    _main()
