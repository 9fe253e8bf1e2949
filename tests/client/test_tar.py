"""An adapter as one tar: whole, from where it broke off, and with the bytes that were published."""

import tarfile
from pathlib import Path

import pytest

from flatlora_client import Conflict, HashMismatch, UnexpectedAnswer
from tests.app.service import FILES, Service
from tests.client.both import Connect
from tests.client.peer import Peer
from tests.client.test_downloads import ADAPTER

ROUTE = "GET /jobs/*/adapter"


def packed(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {
            member.name: content.read() for member in tar if (content := tar.extractfile(member))
        }


def in_folder(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"adapter/{name}": content for name, content in files.items()}


def test_the_real_services_tar_arrives_and_goes_on_where_it_was(
    real: Service, connect: Connect, tmp_path: Path
) -> None:
    job, client = real.finished()["id"], connect(str(real.http.base_url))
    seen: list[tuple[int, int]] = []
    path = client.jobs.get(job).download_tar(
        tmp_path / "new" / "a.tar", progress=lambda *counts: seen.append(counts)
    )
    assert packed(path) == in_folder(FILES)
    whole = path.read_bytes()
    assert seen[-1] == (len(whole), len(whole))
    path.unlink()
    path.with_name("a.tar.part").write_bytes(whole[:5000])
    seen.clear()
    client.adapters.download_tar(job, path, progress=lambda *counts: seen.append(counts))
    assert (path.read_bytes() == whole, seen[0][0]) == (True, 5000)
    path.with_name("a.tar.part").write_bytes(b"of another adapter")
    path.unlink()
    client.adapters.download_tar(job, path)
    assert path.read_bytes() == whole


def test_the_real_service_says_why_there_is_none(
    real: Service, connect: Connect, tmp_path: Path
) -> None:
    job_id = real.submit()["id"]
    with pytest.raises(Conflict, match="has no adapter"):
        connect(str(real.http.base_url)).jobs.download_tar(job_id, tmp_path / "a.tar")
    assert list(tmp_path.iterdir()) == []


def test_one_that_breaks_off_goes_on(peer: Peer, connect: Connect, tmp_path: Path) -> None:
    job_id = peer.publish(ADAPTER)["id"]
    peer.when(ROUTE, lambda: peer.fail(ROUTE, bytes=1_000_000, after=True), of=2)
    path = connect(peer.url).jobs.download_tar(job_id, tmp_path / "a.tar")
    assert packed(path) == in_folder(ADAPTER)
    asked = [seen.headers.get("range") for seen in peer.asked(ROUTE)]
    assert asked == ["bytes=0-0", None, "bytes=1000000-"]


def test_one_that_is_there_is_kept(peer: Peer, connect: Connect, tmp_path: Path) -> None:
    job_id, client = peer.publish(ADAPTER)["id"], connect(peer.url)
    client.jobs.download_tar(job_id, tmp_path / "a.tar")
    peer.seen.clear()
    client.jobs.download_tar(job_id, tmp_path / "a.tar")
    assert [seen.headers["range"] for seen in peer.asked(ROUTE)] == ["bytes=0-0"]


@pytest.mark.parametrize(
    "files", [{**ADAPTER, "adapter_config.json": b"[]"}, {"empty.txt": b""}], ids=["other", "less"]
)
def test_other_bytes_are_refused_and_removed(
    peer: Peer, connect: Connect, tmp_path: Path, files: dict[str, bytes]
) -> None:
    job_id = peer.publish(ADAPTER)["id"]
    peer.files = files
    with pytest.raises(HashMismatch):
        connect(peer.url).jobs.download_tar(job_id, tmp_path / "a.tar")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_whose_files_are_not_told_is_no_answer(
    peer: Peer, connect: Connect, tmp_path: Path
) -> None:
    job_id = peer.publish(ADAPTER)["id"]

    def publish() -> None:
        peer.jobs[job_id]["adapter"] = adapter

    adapter, peer.jobs[job_id]["adapter"] = peer.jobs[job_id]["adapter"], None
    peer.when(ROUTE, publish, of=1)
    peer.when("GET /jobs/*", lambda: peer.jobs[job_id].update(adapter=None), of=2)
    with pytest.raises(UnexpectedAnswer, match="lists no files"):
        connect(peer.url).jobs.download_tar(job_id, tmp_path / "a.tar")
