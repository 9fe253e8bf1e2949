"""As test_bucket.py, on Azurite and fake-gcs-server: datasets of Azure and Google."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest

from app.objects import RETRIES, connect
from tests.emulators import NOBODYS_KEY, AzureServer, GoogleServer
from tests.faults.proxy import Proxy
from tests.waiting import until
from tests.worker.ordering import ROWS, order_of
from worker.bucket import bring_object
from worker.remote import Arrived
from worker.training.errors import DatasetUnavailable

pytestmark = pytest.mark.torture

BUCKETS = "az://flatlora,az://no-such-container,gs://flatlora,gs://no-such-bucket"
KEYS = ["rows.jsonl", "a b/ü%20+#&=.jsonl", "deep/er/rows.parquet"]
LARGE = bytes(range(256)) * (32 << 12)  # 32 MiB

Put = Callable[[str, bytes], object]


def bring(uri: str, folder: Path, **settings: Any) -> Arrived:
    return bring_object(order_of(uri, folder, dataset_buckets=BUCKETS, **settings))


def why(uri: str, folder: Path, **settings: Any) -> str:
    with pytest.raises(DatasetUnavailable) as caught:
        bring(uri, folder, **settings)
    assert caught.value.hint
    assert not (folder / "train").exists()
    return caught.value.message


@pytest.fixture
def azure_put(azure_url: str) -> Put:
    return lambda key, body: obstore.put(connect("az://flatlora"), key, body)


@pytest.fixture
def google_put(google: GoogleServer) -> Put:
    return google.put


@pytest.fixture(params=[("az", "azure_put"), ("gs", "google_put")], ids=lambda pair: pair[0])
def cloud(request: pytest.FixtureRequest) -> tuple[str, Put]:
    """Its URL's beginning, and how an object gets there."""
    scheme, put = request.param
    return f"{scheme}://flatlora", request.getfixturevalue(put)


@pytest.mark.parametrize("key", KEYS)
def test_it_arrives_with_its_hash_and_its_name(
    cloud: tuple[str, Put], tmp_path: Path, key: str
) -> None:
    bucket, put = cloud
    put(f"datasets/{key}", ROWS)
    arrived = bring(f"{bucket}/datasets/{key}", tmp_path)
    assert arrived.sha256 == hashlib.sha256(ROWS).hexdigest()
    assert arrived.filename == key.rpartition("/")[2]
    assert (tmp_path / "train").read_bytes() == ROWS


def test_an_object_that_is_not_there(cloud: tuple[str, Put], tmp_path: Path) -> None:
    bucket, _ = cloud
    assert f"no object {bucket}/no.jsonl" in why(f"{bucket}/no.jsonl", tmp_path)


def test_a_container_that_is_not_there(azure_url: str, tmp_path: Path) -> None:
    told = why("az://no-such-container/a.jsonl", tmp_path)
    assert "no bucket az://no-such-container" in told


def test_a_bucket_that_is_not_there(google: GoogleServer, tmp_path: Path) -> None:
    """Google says NoSuchBucket; this server does not say what is missing."""
    assert "There is no" in why("gs://no-such-bucket/a.jsonl", tmp_path)


def test_an_object_that_is_too_large_is_not_even_begun(
    cloud: tuple[str, Put], tmp_path: Path
) -> None:
    bucket, put = cloud
    put("large.jsonl", ROWS)
    told = why(f"{bucket}/large.jsonl", tmp_path, max_dataset_bytes=100)
    assert "more than 100 bytes" in told
    assert (tmp_path / "train.part").stat().st_size == 0


def test_a_key_that_azure_refuses(
    azure_put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    azure_put("rows.jsonl", ROWS)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", NOBODYS_KEY)
    told = why("az://flatlora/rows.jsonl", tmp_path)
    assert told == "The worker may not read az://flatlora/rows.jsonl."


def test_without_a_key_azure_refuses_too(
    azure_put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    azure_put("rows.jsonl", ROWS)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    assert "may not read" in why("az://flatlora/rows.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("uri", "variable", "server"),
    [
        ("az://flatlora/a.jsonl", "AZURE_STORAGE_ACCOUNT_KEY", "azure_url"),
        ("gs://flatlora/a.jsonl", "GOOGLE_SERVICE_ACCOUNT_KEY", "google"),
    ],
)
def test_a_key_that_is_none_is_told_and_not_shown(
    uri: str, variable: str, server: str, request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    request.getfixturevalue(server)
    monkeypatch.setenv(variable, "{ca-na-ry")
    told = why(uri, tmp_path)
    assert f"cannot fetch {uri}" in told
    assert "ca-na-ry" not in told


def test_a_stream_that_breaks_goes_on_where_it_broke(
    azure_put: Put, azure_server: AzureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    azure_put("large.jsonl", LARGE)
    with Proxy("127.0.0.1", azure_server.port, name="azure") as proxy:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azure_server.address(proxy.port))
        check_broken("az://flatlora/large.jsonl", tmp_path, proxy)


def test_one_from_google_too(
    google: GoogleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    google.put("large.jsonl", LARGE)
    with Proxy("127.0.0.1", google.port, name="google") as proxy:
        monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        check_broken("gs://flatlora/large.jsonl", tmp_path, proxy)


def check_broken(uri: str, folder: Path, proxy: Proxy) -> None:
    arrived: list[Arrived] = []
    proxy.slow(16 << 20)
    thread = threading.Thread(target=lambda: arrived.append(bring(uri, folder)))
    thread.start()
    partial = folder / "train.part"
    until(lambda: partial.exists() and partial.stat().st_size, seconds=20)
    proxy.cut()
    proxy.pass_through()
    thread.join(60)
    assert [found.sha256 for found in arrived] == [hashlib.sha256(LARGE).hexdigest()]
    assert (folder / "train").read_bytes() == LARGE


def test_a_store_that_cannot_be_reached_is_told_without_its_address(
    cloud: tuple[str, Put], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, _ = cloud
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9/account")
    monkeypatch.setenv("GOOGLE_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY", raising=False)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    monkeypatch.setitem(RETRIES, "max_retries", 0)
    told = why(f"{bucket}/a.jsonl", tmp_path)
    assert f"cannot fetch {bucket}/a.jsonl" in told
    assert "127.0.0.1" not in told
