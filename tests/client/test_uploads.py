"""Uploads: small ones at once, large ones in parts that need not be sent twice."""

import hashlib
import random
from pathlib import Path

import pytest

from flatlora_client import Conflict, ConnectionFailed, InvalidRequest, UnexpectedAnswer
from tests.app.service import Service
from tests.client.both import Connect
from tests.client.peer import Peer

PART = 8 << 20
LARGE = random.Random(5).randbytes(2 * PART + 1000)
SHA256 = hashlib.sha256(LARGE).hexdigest()
PARTS = "PATCH /datasets/uploads/*"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "odd [x] 100%.jsonl"
    path.write_bytes(LARGE)
    return path


def offsets(peer: Peer) -> list[int]:
    return [int(seen.headers["upload-offset"]) for seen in peer.asked(PARTS)]


def test_a_small_file_is_one_request(peer: Peer, connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    seen: list[tuple[int, int]] = []
    peer.fail("POST /datasets", status=503)
    dataset = connect(peer.url).datasets.upload(path, progress=lambda *counts: seen.append(counts))
    assert (dataset.filename, dataset.size) == ("rows.jsonl", 3)
    assert len(peer.asked("POST /datasets")) == 2
    assert seen == [(3, 3)]


def test_the_real_service_keeps_what_was_sent(
    real: Service, connect: Connect, large: Path, tmp_path: Path
) -> None:
    small = tmp_path / "rows.jsonl"
    small.write_text("{}\n")
    client = connect(str(real.http.base_url))
    for path, sha256 in [(small, hashlib.sha256(b"{}\n").hexdigest()), (large, SHA256)]:
        dataset = client.datasets.upload(path)
        assert (dataset.sha256, dataset.filename) == (sha256, path.name)
        assert client.datasets.get(dataset.id).raw == dataset.raw
        assert dataset.id in [each.id for each in client.datasets.list()]


def test_a_large_file_comes_in_parts(peer: Peer, connect: Connect, large: Path) -> None:
    seen: list[tuple[int, int]] = []
    dataset = connect(peer.url).datasets.upload(large, progress=lambda *counts: seen.append(counts))
    assert (dataset.sha256, dataset.filename) == (SHA256, large.name)
    assert offsets(peer) == [0, PART, 2 * PART]
    assert [done for done, _ in seen] == [0, PART, 2 * PART, len(LARGE)]
    assert peer.asked("POST /datasets") == []


@pytest.mark.parametrize("after", [False, True])
def test_a_part_that_was_lost_is_sent_again_and_no_other(
    peer: Peer, connect: Connect, large: Path, after: bool
) -> None:
    """Where only its answer was lost, the service says that it has it."""
    peer.fail(PARTS, after=after)
    assert connect(peer.url).datasets.upload(large).sha256 == SHA256
    assert offsets(peer) == [0, 0, PART, 2 * PART]
    assert len(peer.asked("PUT /datasets/uploads/*")) == (2 if after else 1)


def test_however_often_it_breaks_off_it_comes_to_its_end(
    peer: Peer, connect: Connect, large: Path
) -> None:
    """Here the service has kept what came of a part that broke off: each time a megabyte."""

    def lose() -> None:
        have = peer.uploads[SHA256]
        peer.uploads[SHA256] = LARGE[: min(len(have) + (1 << 20), len(LARGE) - 1)]

    for count in range(1, 11):
        peer.when(PARTS, lose, of=count)
    assert connect(peer.url).datasets.upload(large).sha256 == SHA256
    assert len(peer.asked(PARTS)) == 11


def test_an_upload_goes_on_in_another_program(peer: Peer, connect: Connect, large: Path) -> None:
    peer.uploads[SHA256] = LARGE[:PART]
    connect(peer.url).datasets.upload(large)
    assert offsets(peer) == [PART, 2 * PART]


def test_what_is_there_is_not_sent(peer: Peer, connect: Connect, large: Path) -> None:
    client = connect(peer.url)
    first = client.datasets.upload(large)
    peer.seen.clear()
    assert client.datasets.upload(large).id == first.id
    assert [seen.method for seen in peer.seen] == ["PUT"]


def test_a_service_that_takes_no_parts_gets_it_at_once(
    peer: Peer, connect: Connect, large: Path
) -> None:
    peer.takes_parts = False
    assert connect(peer.url).datasets.upload(large).sha256 == SHA256
    [sent] = peer.asked("POST /datasets")
    assert sent.headers["content-length"] == str(len(LARGE))


def test_a_service_that_never_agrees_is_not_asked_for_ever(
    peer: Peer, connect: Connect, large: Path
) -> None:
    peer.fail(PARTS, status=409, times=1000)
    with pytest.raises(Conflict):
        connect(peer.url).datasets.upload(large)
    peer.faults.clear()
    peer.uploads[SHA256] = LARGE
    with pytest.raises(UnexpectedAnswer, match="names no dataset"):
        connect(peer.url).datasets.upload(large)


def test_other_bytes_under_this_hash_are_refused(peer: Peer, connect: Connect, large: Path) -> None:
    peer.uploads[SHA256] = LARGE[:PART][::-1]
    with pytest.raises(InvalidRequest) as caught:
        connect(peer.url).datasets.upload(large)
    assert caught.value.code == "hash_mismatch"


def test_a_file_that_is_not_there_is_pythons_error(connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect("http://127.0.0.1:1").datasets.upload(tmp_path / "none.jsonl")


def test_a_service_that_is_away_is_told(connect: Connect, large: Path) -> None:
    with pytest.raises(ConnectionFailed):
        connect("http://127.0.0.1:1", max_retries=1).datasets.upload(large)
