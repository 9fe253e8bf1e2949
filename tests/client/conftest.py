import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.app.conftest import make_settings
from tests.app.service import Service, running
from tests.client.both import Connect, connecting
from tests.client.peer import Peer, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Peer]:
    with serving(Peer()) as peer:
        yield peer


@pytest.fixture
def peer(served: Peer) -> Peer:
    """As new, on the port of the one before."""
    vars(served).update(vars(Peer(url=served.url)))
    return served


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients. Each test that asks for it runs once with each kind."""
    with connecting(request.param) as connect:
        yield connect


@pytest.fixture(scope="session")
def real(migrated_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The API itself, in a process of its own; tests share it, and do it no harm."""
    folder = tmp_path_factory.mktemp("real")
    database = shutil.copy(migrated_file, folder / "flatlora.db")
    settings = make_settings(folder, f"sqlite:///{database}")
    with running(settings) as url, httpx2.Client(base_url=url, timeout=30) as http:
        service = Service(http, settings)
        yield service
        service.engine.dispose()
