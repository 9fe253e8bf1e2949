"""Azure and Google for the tests that run on demand: Azurite, and fake-gcs-server.

Azurite comes from npm into a folder of the user's cache, once; fake-gcs-server is used where it is
installed.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from subprocess import Popen
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives import hashes, hmac

from app.ids import new_id
from tests.faults.procs import spawn
from tests.faults.servers import Server

CONTAINER = "flatlora"
AZURITE = "azurite@3.35.0"  # later ones ask for a Node that many machines have not
ACCOUNT = "devstoreaccount1"
# Azurite's own, the same everywhere.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
NOBODYS_KEY = base64.b64encode(bytes(64)).decode()
# As fake-gcs-server takes it: it asks for no token, so none is fetched.
NO_TOKEN = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}


class _HttpServer(Server):
    """In memory: started again it is empty."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=10)  # noqa: S310
        except HTTPError as error:
            error.close()
        except OSError:
            return False
        return True

    def _remove(self) -> None:
        """It has written nothing."""


class AzureServer(_HttpServer):
    """Azurite's blob service, with one container."""

    name = "azure"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a client finds it."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": self.address(self.port),
        }

    def address(self, port: int) -> str:
        """``port`` is that of a proxy in front of it."""
        return f"http://127.0.0.1:{port}/{ACCOUNT}"

    def url(self, prefix: str = "") -> str:
        """For ``FLATLORA_STORE_URL``."""
        return f"az://{CONTAINER}/{prefix}".rstrip("/")

    def start(self) -> None:
        super().start()
        date, path = formatdate(usegmt=True), f"/{ACCOUNT}/{CONTAINER}"
        headers = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n"
        signed = "PUT" + "\n" * 12 + f"{headers}/{ACCOUNT}{path}\nrestype:container"
        request = urllib.request.Request(  # noqa: S310
            f"{self.endpoint}{path}?restype=container",
            method="PUT",
            headers={
                "x-ms-date": date,
                "x-ms-version": "2021-08-06",
                "Authorization": f"SharedKey {ACCOUNT}:{_signature(signed)}",
            },
        )
        _send(request)

    def _spawn(self) -> "Popen[bytes]":
        main = _azurite() / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
        options = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port)]
        options += ["--inMemoryPersistence", "--disableTelemetry", "--silent"]
        return spawn(["node", str(main), *options], log=self.log, folder=self.log.parent)


class GoogleServer(_HttpServer):
    """fake-gcs-server, with one bucket.

    Of the XML API, which is what obstore speaks, it has reading, listing and deleting. It takes no
    uploads so, and asks for no credentials; ``put`` uploads as Google's own clients do.
    """

    name = "google"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a client finds it."""
        return {
            "GOOGLE_BASE_URL": self.endpoint,
            "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(NO_TOKEN | {"gcs_base_url": self.endpoint}),
        }

    def start(self) -> None:
        super().start()
        self._post("/storage/v1/b?project=test", json.dumps({"name": CONTAINER}).encode())

    def put(self, key: str, body: bytes) -> None:
        query = f"uploadType=media&name={quote(key, safe='')}"
        self._post(f"/upload/storage/v1/b/{CONTAINER}/o?{query}", body)

    def _post(self, path: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.endpoint + path, body, headers)  # noqa: S310
        _send(request)

    def _spawn(self) -> "Popen[bytes]":
        options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        options += ["-backend", "memory", "-external-url", self.endpoint]
        options += ["-public-host", "127.0.0.1"]  # on any port, so also behind a proxy
        return spawn(["fake-gcs-server", *options], log=self.log)


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    """One for all tests that leave it running."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("found no npm and node, with which Azurite is installed and run")
    with AzureServer(tmp_path_factory.mktemp("azure")) as server:
        yield server


@pytest.fixture
def azure_url(azure_server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of the test's own in the container; the variables by which it is reached are set."""
    for name, value in azure_server.environment.items():
        monkeypatch.setenv(name, value)
    return azure_server.url(new_id("test"))


@pytest.fixture(scope="session")
def google_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleServer]:
    """One for all tests that leave it running."""
    if not shutil.which("fake-gcs-server"):
        pytest.skip("found no fake-gcs-server on the PATH")
    with GoogleServer(tmp_path_factory.mktemp("google")) as server:
        yield server


@pytest.fixture
def google(google_server: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> GoogleServer:
    """The variables by which it is reached are set."""
    for name, value in google_server.environment.items():
        monkeypatch.setenv(name, value)
    return google_server


def _send(request: urllib.request.Request) -> None:
    try:
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
    except HTTPError as error:
        with error:
            if error.code != HTTPStatus.CONFLICT:  # it is there
                raise AssertionError(error.read()) from error


def _signature(text: str) -> str:
    """By the account's key."""
    signer = hmac.HMAC(base64.b64decode(KEY), hashes.SHA256())
    signer.update(text.encode())
    return base64.b64encode(signer.finalize()).decode()


@lru_cache
def _azurite() -> Path:
    """The folder that npm has installed it into: whole, or not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatlora-tests"
    folder = cache / AZURITE
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache))
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(partial), AZURITE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(partial)
            pytest.fail(f"npm could not install {AZURITE}: {done.stderr[-2000:]}")
        try:
            partial.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(partial)
            if not folder.is_dir():
                raise
    return folder
