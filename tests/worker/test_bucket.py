"""A dataset in a listed bucket arrives whole, or it is told why not."""

import hashlib
from pathlib import Path
from typing import Any

import obstore
import pytest

from app.objects import RETRIES, connect
from tests.s3 import S3Server
from tests.worker.ordering import ROWS, order_of
from worker.bucket import bring_object
from worker.remote import Order
from worker.training.errors import DatasetUnavailable

BUCKETS = "s3://flatlora,s3://no-such-bucket"


def order(uri: str, folder: Path, **settings: Any) -> Order:
    return order_of(uri, folder, dataset_buckets=BUCKETS, **settings)


def why(uri: str, folder: Path, **settings: Any) -> str:
    with pytest.raises(DatasetUnavailable) as caught:
        bring_object(order(uri, folder, **settings))
    assert caught.value.hint
    assert not (folder / "train").exists()
    return caught.value.message


@pytest.mark.parametrize("key", ["rows.jsonl", "a b/ü%20+#&=.jsonl", "deep/er/rows.parquet"])
def test_it_arrives_with_its_hash_and_its_name(s3_url: str, tmp_path: Path, key: str) -> None:
    obstore.put(connect("s3://flatlora"), f"datasets/{key}", ROWS)
    arrived = bring_object(order(f"s3://flatlora/datasets/{key}", tmp_path))
    assert arrived.sha256 == hashlib.sha256(ROWS).hexdigest()
    assert arrived.filename == key.rpartition("/")[2]
    assert (tmp_path / "train").read_bytes() == ROWS


def test_an_object_that_is_not_there(s3_url: str, tmp_path: Path) -> None:
    assert "no object s3://flatlora/no.jsonl" in why("s3://flatlora/no.jsonl", tmp_path)


def test_a_bucket_that_is_not_there(s3_url: str, tmp_path: Path) -> None:
    assert "no bucket s3://no-such-bucket" in why("s3://no-such-bucket/a.jsonl", tmp_path)


def test_an_object_that_is_too_large_is_not_even_begun(s3_url: str, tmp_path: Path) -> None:
    obstore.put(connect("s3://flatlora"), "large.jsonl", ROWS)
    told = why("s3://flatlora/large.jsonl", tmp_path, max_dataset_bytes=100)
    assert "more than 100 bytes" in told


def test_a_store_that_cannot_be_reached_is_told_without_its_address(
    s3_url: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(RETRIES, "max_retries", 0)
    told = why("s3://flatlora/a.jsonl", tmp_path)
    assert "cannot fetch s3://flatlora/a.jsonl" in told
    assert "127.0.0.1" not in told
