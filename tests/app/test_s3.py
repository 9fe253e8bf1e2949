"""The service on S3: how the store is named, what clients are sent to, and what an outage does."""

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, urlsplit

import httpx2
import obstore
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import ValidationError

from app import objects
from app.settings import Settings
from app.storage import ArtifactStore, Damaged, Outage, open_store
from tests.app.conftest import make_settings, serve
from tests.app.service import FILES, Service, ok, running
from tests.app.stored import Stored
from tests.faults.proxy import Proxy
from tests.s3 import S3Server
from tests.system.service import until

WEIGHTS = "adapter_model.safetensors"
LARGE = bytes(64 << 20)


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """One to kill."""
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def refuses(request: Callable[[], httpx2.Response]) -> bool:
    return request().status_code == 403


def gives(request: Callable[[], httpx2.Response], content: bytes) -> bool:
    return request().content == content


class TestUrl:
    @pytest.mark.parametrize("url", [
        "s3:bucket", "s3://", "s3:///prefix", "s3://bucket?region=x", "s3://key:secret@bucket",
        "http://host/bucket", "memory:///", "file:store", "file://host/store", "/srv/store", "x",
        "s3://bucket/a#b",
    ])  # fmt: skip
    def test_one_that_names_no_store_is_refused(self, url: str) -> None:
        with pytest.raises(ValidationError, match="expected s3://bucket/prefix"):
            Settings(store_url=url)

    @pytest.mark.parametrize("endpoint", ["host:9000", "ftp://host", "https://", "https://h/?a=b"])
    def test_a_public_endpoint_is_an_address(self, endpoint: str) -> None:
        with pytest.raises(ValidationError, match="expected a URL such as"):
            Settings(store_public_endpoint=endpoint)

    @pytest.mark.parametrize("url", ["", "file:///srv/store"])
    def test_no_client_is_sent_to_a_folder(self, url: str) -> None:
        with pytest.raises(ValidationError, match="a store that signs URLs"):
            Settings(store_url=url, downloads="redirect")

    @pytest.mark.parametrize(
        ("url", "folder"), [("", "data/artifacts"), ("file://{}/a%20b", "a b")]
    )
    def test_a_folder(self, tmp_path: Path, url: str, folder: str) -> None:
        settings = Settings(data_dir=tmp_path / "data", store_url=url.format(tmp_path))
        (tmp_path / "file").write_bytes(b"{}")
        digest = open_store(settings).put_file(tmp_path / "file")
        assert (tmp_path / folder / "blobs" / digest[:2] / digest).read_bytes() == b"{}"

    @pytest.mark.parametrize("prefix", ["my runs", "my%20runs", "ü", "a&b"])
    def test_no_client_is_sent_where_azure_refuses_what_is_signed(self, prefix: str) -> None:
        with pytest.raises(ValidationError, match="Azure refuses URLs"):
            Settings(store_url=f"az://rows/{prefix}", downloads="redirect")
        Settings(store_url=f"az://rows/{prefix}")

    def test_the_prefix_is_kept_to(self, s3_stored: Stored, s3_url: str) -> None:
        s3_stored.store.put_manifest("job_1", {})
        above = open_store(Settings(store_url=s3_url.rpartition("/")[0]))
        prefix = s3_url.rpartition("/")[2]
        found = obstore.list(above.raw, prefix).collect()
        assert [entry["path"] for entry in found] == [f"{prefix}/jobs/job_1/manifest.json"]


class TestProviders:
    """Without a server: what is signed shows where a client would go."""

    def sign(self, url: str, endpoint: str) -> SplitResult:
        settings = Settings(store_url=url, store_public_endpoint=endpoint, downloads="redirect")
        return urlsplit(asyncio.run(open_store(settings).presigned("ab" * 32, 60)))

    def test_what_their_variables_lack_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
        with pytest.raises(ValueError, match=r"no store can be made of az://rows.*ccount"):
            open_store(Settings(store_url="az://rows"))

    @pytest.mark.parametrize("endpoint", ["", "https://files.example.org"])
    def test_azure(self, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acme")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(bytes(32)).decode())
        url = self.sign("az://rows/runs", endpoint)
        assert url.netloc == (urlsplit(endpoint).netloc or "acme.blob.core.windows.net")
        assert url.path == f"/rows/runs/blobs/ab/{'ab' * 32}"
        assert "sig" in parse_qs(url.query)

    @pytest.mark.parametrize("endpoint", ["", "https://files.example.org"])
    def test_google(self, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        key = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        account = {"client_email": "a@b", "private_key": key.decode(), "private_key_id": "1"}
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
        url = self.sign("gs://rows/runs", endpoint)
        assert url.netloc == (urlsplit(endpoint).netloc or "storage.googleapis.com")
        assert url.path == f"/rows/runs/blobs/ab/{'ab' * 32}"
        assert parse_qs(url.query)["X-Goog-Expires"] == ["60"]

    @pytest.mark.parametrize("endpoint", ["", "https://files.example.org"])
    def test_amazon(self, s3_url: str, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "of-a-role")
        url = self.sign(s3_url, endpoint)
        expected = urlsplit(endpoint).netloc or "s3.eu-central-1.amazonaws.com"
        assert url.netloc == expected
        assert parse_qs(url.query)["X-Amz-Security-Token"] == ["of-a-role"]

    def test_an_endpoint_that_would_hide_the_public_one_is_refused(
        self, s3_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        with pytest.raises(ValueError, match="name the store's endpoint with AWS_ENDPOINT_URL"):
            self.sign(s3_url, "https://files.example.org")


class TestRedirect:
    @pytest.fixture
    def settings(self, tmp_path: Path, migrated_sqlite_url: str, s3_url: str) -> Settings:
        return make_settings(tmp_path, migrated_sqlite_url, store_url=s3_url, downloads="redirect")

    def locate(self, service: Service, name: str = WEIGHTS) -> str:
        path = f"/jobs/{service.finished()['id']}/adapter/{name}"
        response = service.http.get(path, follow_redirects=False)
        assert response.status_code == 307
        assert response.content == b""
        assert response.headers["cache-control"] == "private, no-store"
        location: str = response.headers["location"]
        return location

    @pytest.mark.parametrize("name", FILES)
    def test_a_file_comes_from_the_store_itself(self, service: Service, name: str) -> None:
        location = self.locate(service, name)
        answer = httpx2.get(location)
        assert answer.status_code == 200
        assert answer.content == FILES[name]
        assert answer.headers["content-type"] == "application/octet-stream"

    def test_a_part_of_one_too(self, service: Service) -> None:
        answer = httpx2.get(self.locate(service), headers={"Range": "bytes=10-19"})
        assert answer.status_code == 206
        assert answer.content == FILES[WEIGHTS][10:20]

    def test_the_address_is_good_for_the_time_that_is_set(
        self, tmp_path: Path, migrated_sqlite_url: str, s3_url: str
    ) -> None:
        values = {"store_url": s3_url, "downloads": "redirect", "presign_seconds": 4}
        for service in serve(make_settings(tmp_path, migrated_sqlite_url, **values)):
            read = partial(httpx2.get, self.locate(service))
            assert read().status_code == 200
            until(partial(refuses, read), seconds=20)
            assert "expired" in read().text

    def test_it_is_good_for_that_file_alone_and_cannot_be_prolonged(self, service: Service) -> None:
        location, other = self.locate(service), self.locate(service, "README.md")
        assert httpx2.get(location).status_code == 200
        name, other_name = (urlsplit(url).path.rpartition("/")[2] for url in (location, other))
        for altered in (
            location.replace("X-Amz-Expires=900", "X-Amz-Expires=90000"),
            location.replace(f"{name[:2]}/{name}", f"{other_name[:2]}/{other_name}"),
            location[:-4] + "0000",
        ):
            assert altered != location
            assert httpx2.get(altered).status_code == 403
        assert httpx2.put(location, content=b"").status_code == 403
        assert httpx2.delete(location).status_code == 403

    def test_what_the_api_knows_it_answers_itself(self, service: Service) -> None:
        path = f"/jobs/{service.finished()['id']}/adapter/{WEIGHTS}"
        etag = f'"{hashlib.sha256(FILES[WEIGHTS]).hexdigest()}"'
        head = service.http.head(path)
        assert (head.status_code, head.headers["etag"]) == (200, etag)
        assert int(head.headers["content-length"]) == len(FILES[WEIGHTS])
        known = service.http.get(path, headers={"If-None-Match": etag})
        assert (known.status_code, known.headers["etag"]) == (304, etag)
        # The store knows the file by another ETag.
        part = service.http.get(path, headers={"If-Range": etag, "Range": "bytes=0-9"})
        assert (part.status_code, part.content) == (206, FILES[WEIGHTS][:10])
        past = ok(service.http.get(path, headers={"Range": "bytes=99999-"}), 416)
        assert past["code"] == "range_not_satisfiable"

    def test_the_archive_is_streamed(self, service: Service) -> None:
        path = f"/jobs/{service.finished()['id']}/adapter"
        whole = service.http.get(path, follow_redirects=False)
        assert whole.status_code == 200
        assert int(whole.headers["content-length"]) == len(whole.content)
        assert all(body in whole.content for body in FILES.values())

    def test_clients_are_sent_to_where_they_reach_the_store(
        self, tmp_path: Path, migrated_sqlite_url: str, s3_server: S3Server, s3_url: str
    ) -> None:
        with Proxy("127.0.0.1", s3_server.port, name="s3") as proxy:
            public = f"http://127.0.0.1:{proxy.port}"
            settings = make_settings(
                tmp_path, migrated_sqlite_url, store_url=s3_url, downloads="redirect",
                store_public_endpoint=public,
            )  # fmt: skip
            for service in serve(settings):
                location = self.locate(service)
                assert location.startswith(f"{public}/flatlora/")
                assert httpx2.get(location).content == FILES[WEIGHTS]

    def test_not_unless_that_is_asked_for(
        self, tmp_path: Path, migrated_sqlite_url: str, s3_url: str
    ) -> None:
        for service in serve(make_settings(tmp_path, migrated_sqlite_url, store_url=s3_url)):
            path = f"/jobs/{service.finished()['id']}/adapter/{WEIGHTS}"
            answer = service.http.get(path, follow_redirects=False)
            assert (answer.status_code, answer.content) == (200, FILES[WEIGHTS])


class TestOutage:
    @pytest.fixture
    def settings(self, tmp_path: Path, migrated_sqlite_url: str, own_server: S3Server) -> Settings:
        return make_settings(tmp_path, migrated_sqlite_url, store_url=own_server.url("runs"))

    def test_what_needs_the_store_is_told_to_come_again(
        self, service: Service, own_server: S3Server
    ) -> None:
        job_id = service.finished()["id"]
        own_server.kill()
        for path in (f"/jobs/{job_id}/adapter", f"/jobs/{job_id}/adapter/{WEIGHTS}"):
            answer = service.http.get(path)
            assert ok(answer, 503)["code"] == "store_unavailable"
            assert answer.headers["retry-after"]
        headers = {"Content-Type": "application/octet-stream"}
        upload = service.http.post("/datasets?filename=a.jsonl", content=b"{}\n", headers=headers)
        assert ok(upload, 503)["code"] == "store_unavailable"
        assert service.get("/datasets")["items"] == []
        assert list(service.settings.uploads_dir.iterdir()) == []
        assert ok(service.http.get("/readyz"), 503)["code"] == "not_ready"
        # What does not need it goes on.
        assert service.http.head(f"/jobs/{job_id}/adapter").status_code == 200
        assert service.submit()["status"] == "queued"

    def test_a_store_that_says_nothing_is_waited_for_so_long(
        self, tmp_path: Path, migrated_sqlite_url: str, own_server: S3Server,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(objects, "ANSWER_SECONDS", 0.5)
        with Proxy("127.0.0.1", own_server.port, name="s3") as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            settings = make_settings(tmp_path, migrated_sqlite_url, store_url=own_server.url())
            for service in serve(settings):
                path = f"/jobs/{service.finished()['id']}/adapter/{WEIGHTS}"
                proxy.stall()
                assert ok(service.http.get(path), 503)["code"] == "store_unavailable"
                proxy.pass_through()
                read = partial(service.http.get, path)
                until(partial(gives, read, FILES[WEIGHTS]))

    def test_a_bucket_that_is_not_there_is_an_outage_and_not_an_empty_store(
        self, own_server: S3Server, tmp_path: Path
    ) -> None:
        store = open_store(Settings(store_url="s3://no-such-bucket"))
        (tmp_path / "file").write_bytes(b"{}")
        with pytest.raises(Outage, match="NoSuchBucket"):
            store.fetch("ab" * 32, tmp_path / "copy")
        with pytest.raises(Outage):
            store.put_file(tmp_path / "file")
        with pytest.raises(Outage):
            store.forget_job("job_1")

    @pytest.mark.parametrize("comes_back", [False, True])
    def test_a_fetch_that_breaks_off_leaves_nothing(
        self, own_server: S3Server, tmp_path: Path, comes_back: bool
    ) -> None:
        class Dying(ArtifactStore):
            """Its server dies when the first bytes have come, and may come back empty."""

            def _stream(self, key: str) -> Iterator[bytes]:
                for number, chunk in enumerate(super()._stream(key)):
                    if number == 1:
                        own_server.kill()
                        if comes_back:
                            own_server.start()
                    yield chunk

        store = Dying(open_store(Settings(store_url=own_server.url())).raw)
        (tmp_path / "large").write_bytes(LARGE)
        digest = store.put_file(tmp_path / "large")
        with pytest.raises((Outage, Damaged)):
            store.fetch(digest, tmp_path / "copy")
        checkpoint = {"fence": 1, "step": 1, "files": [{"name": "a", "sha256": digest}]}
        own_server.start()
        (tmp_path / "ckpt").mkdir()
        (tmp_path / "large").rename(tmp_path / "ckpt" / "a")
        store.put_checkpoint("job_1", 1, 1, tmp_path / "ckpt")
        with pytest.raises((Outage, Damaged)):
            store.fetch_checkpoint("job_1", checkpoint, tmp_path / "elsewhere" / "ckpt")
        assert {path.name for path in tmp_path.iterdir()} == {"s3", "ckpt", "elsewhere"}
        assert list((tmp_path / "elsewhere").iterdir()) == []

    def test_a_download_that_breaks_off_is_seen_to_be_broken(
        self, settings: Settings, own_server: S3Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FLATLORA_STORE_URL", settings.store_url)
        with running(settings) as url, httpx2.Client(base_url=url, timeout=60) as http:
            service = Service(http, settings)
            path = f"/jobs/{service.finished({WEIGHTS: LARGE})['id']}/adapter/{WEIGHTS}"
            with http.stream("GET", path) as response:
                chunks = response.iter_raw(1 << 20)
                next(chunks)
                own_server.kill()
                with pytest.raises(httpx2.RemoteProtocolError):
                    for _ in chunks:
                        pass
            assert http.get("/healthz").status_code == 200
            service.engine.dispose()

    def test_of_a_broken_upload_nothing_is_there(
        self, own_server: S3Server, tmp_path: Path
    ) -> None:
        with (
            Proxy("127.0.0.1", own_server.port, name="s3") as proxy,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            store = open_store(Settings(store_url=own_server.url()))
            (tmp_path / "large").write_bytes(LARGE)
            proxy.slow(8 << 20)
            failed = threading.Event()

            def put() -> None:
                with pytest.raises(Outage):
                    store.put_file(tmp_path / "large")
                failed.set()

            thread = threading.Thread(target=put)
            thread.start()
            until(lambda: "<Upload>" in own_server.uploads(), seconds=30)
            proxy.cut()
            assert failed.wait(60)
            thread.join()
            proxy.pass_through()
            assert list(store.blobs()) in ([], [[]])
            store.put_file(tmp_path / "large")
            assert sum(len(page) for page in store.blobs()) == 1
