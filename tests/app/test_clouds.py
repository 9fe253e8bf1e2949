"""Stores at Azure and Google: what test_storage.py does not ask of every store."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx2
import pytest

from app.doctor.store import STORE
from app.objects import Objects
from app.settings import Settings
from app.storage import Damaged, Freed, Outage, open_store
from tests.app.conftest import make_settings, serve
from tests.app.service import FILES, Service
from tests.app.stored import Stored
from tests.emulators import NOBODYS_KEY, AzureServer, GoogleServer
from tests.faults.proxy import Proxy
from tests.waiting import until

pytestmark = pytest.mark.torture

WEIGHTS = "adapter_model.safetensors"
ROWS = b'{"prompt": "a", "completion": "b"}\n' * 1000
DIGEST = hashlib.sha256(ROWS).hexdigest()
BLOB = f"blobs/{DIGEST[:2]}/{DIGEST}"
MANIFEST = "jobs/job_1/manifest.json"


def refuses(request: Callable[[], httpx2.Response]) -> bool:
    return request().status_code == 403


class TestAzure:
    def redirected(
        self, tmp_path: Path, database: str, url: str, **values: object
    ) -> Iterator[Service]:
        given = {"store_url": url, "downloads": "redirect", **values}
        yield from serve(make_settings(tmp_path, database, **given))

    def locate(self, service: Service, name: str = WEIGHTS) -> str:
        path = f"/jobs/{service.finished()['id']}/adapter/{name}"
        location: str = service.http.get(path, follow_redirects=False).headers["location"]
        return location

    def test_clients_get_a_file_by_a_url_that_is_good_for_it_alone(
        self, tmp_path: Path, migrated_sqlite_url: str, azure_url: str
    ) -> None:
        for service in self.redirected(tmp_path, migrated_sqlite_url, azure_url):
            location, other = self.locate(service), self.locate(service, "README.md")
            answer = httpx2.get(location)
            assert (answer.status_code, answer.content) == (200, FILES[WEIGHTS])
            assert answer.headers["content-type"] == "application/octet-stream"
            part = httpx2.get(location, headers={"Range": "bytes=10-19"})
            assert (part.status_code, part.content) == (206, FILES[WEIGHTS][10:20])
            signature = location.partition("?")[2]
            assert httpx2.get(f"{other.partition('?')[0]}?{signature}").status_code == 403
            kind = {"x-ms-blob-type": "BlockBlob"}
            assert httpx2.put(location, content=b"", headers=kind).status_code == 403
            assert httpx2.delete(location).status_code == 403
            assert httpx2.get(location).content == FILES[WEIGHTS]

    def test_the_url_is_good_for_the_time_that_is_set(
        self, tmp_path: Path, migrated_sqlite_url: str, azure_url: str
    ) -> None:
        short = {"presign_seconds": 2}
        for service in self.redirected(tmp_path, migrated_sqlite_url, azure_url, **short):
            read = partial(httpx2.get, self.locate(service))
            assert read().status_code == 200
            until(partial(refuses, read), seconds=10)

    def test_clients_are_sent_to_where_they_reach_the_store(
        self, tmp_path: Path, migrated_sqlite_url: str, azure_server: AzureServer, azure_url: str
    ) -> None:
        with Proxy("127.0.0.1", azure_server.port, name="azure") as proxy:
            public = azure_server.address(proxy.port)
            values = {"store_public_endpoint": public}
            for service in self.redirected(tmp_path, migrated_sqlite_url, azure_url, **values):
                location = self.locate(service)
                assert location.startswith(f"{public}/flatlora/")
                assert httpx2.get(location).content == FILES[WEIGHTS]

    def test_a_container_that_is_not_there_is_an_outage_and_not_an_empty_store(
        self, azure_url: str, tmp_path: Path
    ) -> None:
        store = open_store(Settings(store_url="az://no-such-container"))
        (tmp_path / "file").write_bytes(ROWS)
        for what in (
            lambda: store.fetch(DIGEST, tmp_path / "copy"),
            lambda: store.put_file(tmp_path / "file"),
            lambda: store.put_manifest("job_1", {}),
            lambda: store.forget_job("job_1"),
            lambda: Objects(store.raw).delete(["a", "b"]),
        ):
            with pytest.raises(Outage, match=r"ContainerNotFound|container does not exist"):
                what()

    def test_a_key_that_is_refused_is_an_outage(
        self, azure_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", NOBODYS_KEY)
        store = open_store(Settings(store_url=azure_url))
        with pytest.raises(Outage, match="AuthorizationFailure"):
            store.fetch(DIGEST, tmp_path / "copy")
        with pytest.raises(Outage):
            asyncio.run(store.probe())

    def test_the_doctor_finds_it_in_order(self, azure_url: str) -> None:
        settings = Settings(store_url=azure_url, downloads="redirect")
        found = {finding.name: finding.level for finding in STORE.run(settings)}
        assert found == dict.fromkeys(("store", "store creation", "store URLs"), "ok")

    def test_deleting_passes_over_what_is_gone(self, azure_stored: Stored) -> None:
        objects = Objects(azure_stored.store.raw)
        keys = [f"a/{number}" for number in range(300)]  # Azure takes 256 at a time
        for key in keys[::2]:
            objects.write(key, b"x")
        objects.delete(keys)
        assert azure_stored.listed() == set()


class TestGoogle:
    """What of a store the server can do: it takes no uploads of this kind."""

    @pytest.fixture
    def google_stored(self, google: GoogleServer) -> Stored:
        url = "gs://flatlora/runs"
        stored = Stored(open_store(Settings(store_url=url)), url, None, None)
        for key in list(stored.listed()):
            stored.damage(key, None)
        google.put(f"runs/{BLOB}", ROWS)
        google.put(f"runs/{MANIFEST}", b'{"a": 1}')
        google.put("runs2/elsewhere", b"")
        return stored

    def test_what_lies_there_is_read_whole_and_in_ranges(
        self, google_stored: Stored, tmp_path: Path
    ) -> None:
        async def read(start: int, end: int) -> bytes:
            opened = await google_stored.store.open(DIGEST, start, end)
            return b"".join([chunk async for chunk in opened])

        google_stored.store.fetch(DIGEST, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == ROWS
        assert asyncio.run(read(10, 20)) == ROWS[10:20]
        assert asyncio.run(google_stored.store.holds(DIGEST, len(ROWS)))
        assert google_stored.store.manifest("job_1") == {"a": 1}
        assert google_stored.store.manifest("job_2") is None

    def test_what_is_gone_is_told_to_be_so(self, google_stored: Stored, tmp_path: Path) -> None:
        with pytest.raises(Damaged, match="is gone"):
            google_stored.store.fetch("0" * 64, tmp_path / "copy")
        with pytest.raises(Damaged, match="is gone"):
            asyncio.run(google_stored.store.open("0" * 64, 0, 1))

    def test_it_is_listed_and_deleted_and_nothing_beside_it(self, google_stored: Stored) -> None:
        (page,) = google_stored.store.blobs()
        assert [(entry.key, entry.size) for entry in page] == [(BLOB, len(ROWS))]
        assert google_stored.store.forget_job("job_1") == Freed(1, len(b'{"a": 1}'))
        assert google_stored.store.forget_job("job_1") == Freed()
        assert google_stored.listed() == {BLOB}
        Objects(google_stored.store.raw).delete(["no", BLOB, "neither"])
        assert google_stored.listed() == set()
        above = open_store(Settings(store_url="gs://flatlora"))
        assert Objects(above.raw).find("runs2/elsewhere") is not None
