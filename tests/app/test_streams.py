"""What takes long ends soon after its key does."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from app.access.authenticator import Authenticator
from app.access.keys import make_key as new_key
from app.access.principal import ANYBODY, OPERATOR, Principal, Role
from app.access.repository import add_key, revoking
from app.db import Database
from app.settings import Settings
from tests.app.conftest import make_settings
from tests.app.keys import acting, make_key, operator
from tests.app.listening import said
from tests.app.service import Service, ok, running

FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite_url: str) -> Settings:
    return make_settings(tmp_path, migrated_sqlite_url, auth="key")


class TestStreams:
    @pytest.mark.parametrize(
        "kind", [FORM, pytest.param("application/x-ndjson", marks=pytest.mark.torture)]
    )
    def test_an_upload_ends_within_five_seconds_of_its_keys_revocation(
        self, service: Service, kind: str
    ) -> None:
        made = make_key(service)
        with running(service.settings) as url:
            httpx2.get(f"{url}/healthz", timeout=60).raise_for_status()  # it has started
            port = int(url.rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(
                    b"POST /datasets?filename=a.jsonl HTTP/1.1\r\nHost: localhost\r\n"
                    + f"Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n".encode()
                    + f"Authorization: Bearer {made['key']}\r\n\r\n".encode()
                )
                if kind == FORM:
                    client.sendall(f"{len(PART):x}\r\n".encode() + PART + b"\r\n")
                client.settimeout(0.05)
                assert self.answer_to_parts(client, seconds=1.2) == b""
                path = f"/keys/{made['id']}"
                ok(service.http.delete(path, headers=operator(service)), 200)
                started = time.monotonic()
                answer = self.answer_to_parts(client, seconds=10)
                assert answer.startswith(b"HTTP/1.1 401")
                assert time.monotonic() - started < 8
        with acting(service, service.settings.key_file.read_text().strip()):
            assert service.get("/datasets")["items"] == []

    @staticmethod
    def answer_to_parts(client: socket.socket, seconds: float) -> bytes:
        """What is answered while the upload goes on; nothing if it has not been by then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(OSError):  # it may have hung up after its answer
                client.sendall(b"3\r\n{}\n\r\n")
            with suppress(TimeoutError):
                return client.recv(4096)
        return b""


class TestStillAllowed:
    """What a stream asks at each turn."""

    def test_it_says_no_within_two_seconds_and_asks_the_database_no_more_often(
        self, migrated_sqlite_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = 1000.0
        stopped = SimpleNamespace(monotonic=lambda: clock, time=time.time)
        monkeypatch.setattr("app.access.authenticator.time", stopped)

        async def run() -> None:
            nonlocal clock
            async with opened(migrated_sqlite_url) as (database, authenticator):
                new = new_key()
                adding = add_key(
                    new, name="x", role=Role.VIEWER, lifetime=None, by="y", project="search"
                )
                async with database.unscoped(writes=True) as session:
                    await session.execute(adding)
                principal = await authenticator.principal(new.key)
                await asyncio.gather(*authenticator._notes)  # of its use: these ask too
                with said("SELECT api_keys") as asked:
                    for _ in range(100):
                        assert await authenticator.is_still(principal)
                    async with database.unscoped(writes=True) as session:
                        await session.execute(revoking(new.id))
                    clock += 1.99
                    assert await authenticator.is_still(principal)
                    assert len(asked) == 1
                    clock += 0.02
                    assert not await authenticator.is_still(principal)
                    assert len(asked) == 2

        asyncio.run(run())

    def test_an_expired_one_is_none_without_asking(self, migrated_sqlite_url: str) -> None:
        async def run() -> list[bool]:
            async with opened(migrated_sqlite_url) as (_, authenticator):
                later, past = time.time() + 60, time.time() - 0.01
                asked = [
                    Principal("p", Role.VIEWER, "oidc:u", expires_at=later),
                    Principal("p", Role.VIEWER, "oidc:u", expires_at=past),
                    Principal("p", Role.VIEWER, "x", key_id="abc", expires_at=past),
                    OPERATOR,
                    ANYBODY,
                ]
                return [await authenticator.is_still(principal) for principal in asked]

        assert asyncio.run(run()) == [True, False, False, True, True]


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[tuple[Database, Authenticator]]:
    database = Database(url)
    authenticator = Authenticator(database, "the operator's")
    try:
        yield database, authenticator
    finally:
        await authenticator.close()
        await database.engine.dispose()
