"""Downloads: whole or not at all, from where they broke off, and with the key for nobody else."""

from pathlib import Path

import pytest

from flatlora_client import Conflict, ConnectionFailed, HashMismatch, NotFound, UnexpectedAnswer
from tests.app.service import FILES, Service
from tests.client.both import Connect
from tests.client.peer import Peer, serving

WEIGHTS = bytes(range(256)) * 8000
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS, "empty.txt": b""}
ROUTE = "GET /jobs/*/adapter/adapter_model.safetensors"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_real_services_files_arrive(real: Service, connect: Connect, tmp_path: Path) -> None:
    job_id = real.finished()["id"]
    seen: list[tuple[int, int]] = []
    client = connect(str(real.http.base_url))
    folder = client.jobs.download(
        job_id, tmp_path / "new" / "adapter", progress=lambda *counts: seen.append(counts)
    )
    assert content(folder) == FILES
    total = sum(map(len, FILES.values()))
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize("status", ["queued", "failed"])
def test_the_real_service_says_why_there_is_none(
    real: Service, connect: Connect, tmp_path: Path, status: str
) -> None:
    job_id = real.submit()["id"]
    real.set(job_id, status=status, reason="internal", message="")
    with pytest.raises(Conflict, match=f"The job is {status} and has no adapter") as caught:
        connect(str(real.http.base_url)).jobs.download(job_id, tmp_path / "a")
    assert (caught.value.code, caught.value.job_status) == ("adapter_not_ready", status)
    assert not (tmp_path / "a").exists()


def test_one_that_breaks_off_goes_on_where_it_was(
    peer: Peer, connect: Connect, tmp_path: Path
) -> None:
    job = peer.publish(ADAPTER)
    peer.fail(ROUTE, bytes=1_000_000, after=True)
    peer.fail(ROUTE, bytes=500_000, after=True)
    connect(peer.url).jobs.download(job["id"], tmp_path)
    assert content(tmp_path) == ADAPTER
    first, second, third = peer.asked(ROUTE)
    assert "range" not in first.headers
    assert second.headers["range"] == "bytes=1000000-"
    assert second.headers["if-range"] == f'"{job["adapter"]["files"][1]["sha256"]}"'
    assert third.headers["range"] == "bytes=1500000-"


def test_so_does_one_whose_program_was_ended(peer: Peer, connect: Connect, tmp_path: Path) -> None:
    job = peer.publish(ADAPTER)
    peer.fail(ROUTE, bytes=1_000_000, after=True)
    with pytest.raises(ConnectionFailed):
        connect(peer.url, max_retries=0).jobs.download(job["id"], tmp_path)
    part = tmp_path / "adapter_model.safetensors.part"
    assert part.read_bytes() == WEIGHTS[:1_000_000]
    assert not (tmp_path / "adapter_model.safetensors").exists()
    connect(peer.url).jobs.download(job["id"], tmp_path)
    assert content(tmp_path) == ADAPTER
    assert [seen.headers.get("range") for seen in peer.asked(ROUTE)] == [None, "bytes=1000000-"]


@pytest.mark.parametrize("left", [b"something else", WEIGHTS + b"!", b"\0" * len(WEIGHTS)])
def test_what_another_adapter_has_left_does_not_stay(
    peer: Peer, connect: Connect, tmp_path: Path, left: bytes
) -> None:
    job = peer.publish(ADAPTER)
    (tmp_path / "adapter_model.safetensors.part").write_bytes(left)
    (tmp_path / "adapter_config.json").write_bytes(b"[]")
    connect(peer.url).jobs.download(job["id"], tmp_path)
    assert content(tmp_path) == ADAPTER


def test_what_is_there_is_not_fetched_again(peer: Peer, connect: Connect, tmp_path: Path) -> None:
    job, client = peer.publish(ADAPTER), connect(peer.url)
    client.jobs.download(job["id"], tmp_path)
    peer.seen.clear()
    client.jobs.download(job["id"], tmp_path)
    assert [seen.path for seen in peer.seen] == [f"/jobs/{job['id']}"]


def test_other_bytes_than_were_published_are_refused(
    peer: Peer, connect: Connect, tmp_path: Path
) -> None:
    job = peer.publish(ADAPTER)
    peer.files = ADAPTER | {"adapter_model.safetensors": WEIGHTS[::-1]}
    with pytest.raises(HashMismatch, match=r"adapter_model\.safetensors: found sha256") as caught:
        connect(peer.url).jobs.download(job["id"], tmp_path)
    assert caught.value.expected == job["adapter"]["files"][1]["sha256"]
    assert sorted(content(tmp_path)) == ["adapter_config.json", "empty.txt.part"]
    assert len(peer.asked(ROUTE)) == 1


def test_so_are_more_of_them(peer: Peer, connect: Connect, tmp_path: Path) -> None:
    job = peer.publish(ADAPTER)
    peer.files = ADAPTER | {"adapter_model.safetensors": WEIGHTS + b"!"}
    with pytest.raises(UnexpectedAnswer, match="expected 2048000"):
        connect(peer.url).jobs.download(job["id"], tmp_path)
    assert sorted(content(tmp_path)) == ["adapter_config.json", "empty.txt.part"]


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", "a\\b", "..", "", "x\0y", "/etc/evil", "w.part"]
)
def test_a_name_that_leads_elsewhere_is_refused(
    peer: Peer, connect: Connect, tmp_path: Path, name: str
) -> None:
    job = peer.publish({"fine": b"1", name: b"2"})
    with pytest.raises(UnexpectedAnswer, match="expected a plain name"):
        connect(peer.url).jobs.download(job["id"], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_another_host_is_asked_without_the_key(
    peer: Peer, connect: Connect, tmp_path: Path
) -> None:
    """As a store's signed URL would be; the rest of what broke off comes from the service."""
    job = peer.publish(ADAPTER)
    with serving(Peer(files=ADAPTER)) as store:
        peer.elsewhere = store.url
        store.fail("GET /store/adapter_model.safetensors", bytes=1_000_000, after=True)
        connect(peer.url, api_key="flk_secret").jobs.download(job["id"], tmp_path)
        seen = [*store.seen]
    assert content(tmp_path) == ADAPTER
    assert {asked.path.rpartition("/")[2] for asked in seen} == set(ADAPTER)
    for asked in seen:
        assert "flk_secret" not in str(asked)
        assert "authorization" not in asked.headers
    assert {asked.headers["authorization"] for asked in peer.seen} == {"Bearer flk_secret"}
    assert peer.asked(ROUTE)[-1].headers["range"] == "bytes=1000000-"


def test_a_job_that_does_not_exist_leaves_no_folder(
    peer: Peer, connect: Connect, tmp_path: Path
) -> None:
    with pytest.raises(NotFound):
        connect(peer.url).jobs.download("job_0", tmp_path / "a")
    assert not (tmp_path / "a").exists()
