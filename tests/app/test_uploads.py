"""Uploads in parts: broken off, gone on with elsewhere, raced for, and refused."""

import base64
import hashlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app.main import create_app
from app.tables import UploadRow
from tests.app.conftest import make_settings
from tests.app.service import Json, Service, faults, ok
from tests.app.stored import Stored
from tests.faults.procs import reserve_port, spawn
from tests.system.service import until

PART = 1 << 18
CONTENT = b"".join(b'{"prompt": "%d", "completion": "x"}\n' % n for n in range(30_000))
HASH = hashlib.sha256(CONTENT).hexdigest()


class Uploader:
    """Two API machines on one database and one store."""

    def __init__(self, one: Service, other: Service, stored: Stored) -> None:
        self.one, self.other, self.stored = one, other, stored

    def put(self, content: bytes = CONTENT, at: Service | None = None, **query: Any) -> Any:
        asked = {"filename": "rows.jsonl", "size": len(content), **query}
        return (at or self.one).http.put(path(content), params=asked)

    def patch(
        self, offset: int, body: bytes | Iterator[bytes], content: bytes = CONTENT,
        at: Service | None = None, **headers: str,
    ) -> Any:  # fmt: skip
        given = {"Content-Type": "application/octet-stream", "Upload-Offset": str(offset)}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        return (at or self.one).http.patch(path(content), content=body, headers=given)

    def get(self, content: bytes = CONTENT) -> Json:
        return self.one.get(path(content))

    def send(self, content: bytes = CONTENT, part: int = PART) -> Any:
        """From where it is to the end, each part to the other machine; the last answer."""
        ok(self.put(content), 200)
        answer: Any = None
        for number, start in enumerate(range(0, len(content), part)):
            at = (self.one, self.other)[number % 2]
            answer = self.patch(start, content[start : start + part], content, at)
        return answer


def path(content: bytes) -> str:
    return f"/datasets/uploads/{hashlib.sha256(content).hexdigest()}"


def digest_of(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


@pytest.fixture(params=["sqlite-local", "postgres-s3"])
def uploader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Uploader]:
    """Each test runs on both databases and on both stores, in two runs."""
    database, store = request.param.split("-")
    url = request.getfixturevalue(f"migrated_{database}_url")
    stored: Stored = request.getfixturevalue(f"{store}_stored")
    values = {"store_url": stored.url, "max_dataset_bytes": 3 << 20, "max_part_bytes": 1 << 19}
    with ExitStack() as stack:
        services = []
        for name in ("one", "other"):
            folder = tmp_path / name
            folder.mkdir()
            settings = make_settings(folder, url, **values)
            http = stack.enter_context(
                TestClient(create_app(settings), base_url="http://localhost")
            )
            services.append(Service(http, settings))
            stack.callback(services[-1].engine.dispose)
        one, other = services
        yield Uploader(one, other, stored)


def row(uploader: Uploader) -> UploadRow:
    with Session(uploader.one.engine) as session:
        return session.scalars(select(UploadRow)).one()


class TestUpload:
    def test_it_begins_empty_and_says_how_to_go_on(self, uploader: Uploader) -> None:
        state = ok(uploader.put(), 200)
        assert datetime.fromisoformat(state.pop("expires_at")) > datetime.now(UTC)
        assert state == {
            "sha256": HASH, "filename": "rows.jsonl", "size": len(CONTENT), "offset": 0,
            "part_size": 1 << 19, "dataset": None,
        }  # fmt: skip

    def test_part_after_part_at_two_machines_makes_a_dataset(self, uploader: Uploader) -> None:
        answer = uploader.send()
        state = ok(answer, 201)
        dataset = state["dataset"]
        assert answer.headers["location"] == f"/datasets/{dataset['id']}"
        assert uploader.one.get(f"/datasets/{dataset['id']}") == dataset
        assert (dataset["sha256"], dataset["size"]) == (HASH, len(CONTENT))
        assert b"".join(uploader.one.store.stream(HASH)) == CONTENT
        assert uploader.stored.listed("uploads") == set()
        uploader.one.submit(dataset_uri=dataset["uri"])

    def test_one_that_broke_off_goes_on_where_it_was(self, uploader: Uploader) -> None:
        ok(uploader.put(), 200)
        ok(uploader.patch(0, CONTENT[:PART]), 200)
        assert uploader.get()["offset"] == PART
        again = uploader.put(at=uploader.other)
        assert ok(again, 200)["offset"] == PART
        assert again.headers["upload-offset"] == str(PART)
        rest = iter([CONTENT[PART : 2 * PART], CONTENT[2 * PART : PART + (1 << 19)]])
        offset = ok(uploader.patch(PART, rest, at=uploader.other), 200)["offset"]
        ok(uploader.patch(offset, CONTENT[offset:]), 201)
        assert b"".join(uploader.one.store.stream(HASH)) == CONTENT

    def test_a_part_at_another_place_is_told_the_right_one(self, uploader: Uploader) -> None:
        ok(uploader.put(), 200)
        for offset in (1, PART):
            answer = uploader.patch(offset, CONTENT[offset:][:PART])
            assert ok(answer, 409)["code"] == "offset_mismatch"
            assert answer.headers["upload-offset"] == "0"
        assert uploader.stored.listed("uploads") == set()

    def test_many_at_once_win_one_place_each_and_end_at_one_dataset(
        self, uploader: Uploader
    ) -> None:
        def upload(number: int) -> str:
            at = (uploader.one, uploader.other)[number % 2]
            state, size = uploader.put(at=at).json(), 50_000 + 20_011 * number
            while state["dataset"] is None:
                offset = state["offset"]
                answer = uploader.patch(offset, CONTENT[offset:][:size], at=at)
                if answer.status_code == 409:
                    state["offset"] = int(answer.headers["upload-offset"])
                else:
                    assert answer.status_code in {200, 201}, answer.text
                    state = answer.json()
                if state["offset"] == len(CONTENT):
                    state = uploader.put(at=at).json()
            return str(state["dataset"]["id"])

        for at in (uploader.one, uploader.other):
            # FastAPI makes a route's fields at its first request, and silences warnings meanwhile:
            # no two threads of one process may do that at once.
            ok(uploader.put(at=at), 200)
            ok(uploader.patch(1, b"", at=at), 409)
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(upload, range(8)))) == 1
        assert b"".join(uploader.one.store.stream(HASH)) == CONTENT
        assert uploader.stored.listed("uploads") == set()

    def test_the_last_part_again_is_answered_again(self, uploader: Uploader) -> None:
        first = ok(uploader.send(), 201)
        start = (len(CONTENT) - 1) // PART * PART
        assert ok(uploader.patch(start, CONTENT[start:]), 201) == first
        assert uploader.get() == first

    @pytest.mark.parametrize("by", ["put", "patch"])
    def test_what_a_server_has_left_that_died_before_the_dataset_is_finished(
        self, uploader: Uploader, by: str
    ) -> None:
        content = CONTENT[:PART]
        ok(uploader.put(content, size=PART + 1), 200)
        ok(uploader.patch(0, content, content), 200)
        with Session(uploader.one.engine) as session, session.begin():
            session.execute(update(UploadRow).values(size=PART))
        answer = uploader.put(content) if by == "put" else uploader.patch(PART, b"", content)
        assert ok(answer, 201)["dataset"]["size"] == PART
        assert uploader.stored.listed("uploads") == set()

    def test_forgotten_it_is_gone_with_its_parts(self, uploader: Uploader) -> None:
        ok(uploader.put(), 200)
        ok(uploader.patch(0, CONTENT[:PART]), 200)
        assert len(uploader.stored.listed("uploads")) == 1
        assert uploader.other.http.delete(path(CONTENT)).status_code == 204
        assert uploader.stored.listed("uploads") == set()
        for method in ("GET", "DELETE"):
            answer = uploader.one.http.request(method, path(CONTENT))
            assert ok(answer, 404)["code"] == "upload_not_found"
        assert ok(uploader.patch(PART, b"x"), 404)["code"] == "upload_not_found"
        assert ok(uploader.put(), 200)["offset"] == 0


class TestKnownBytes:
    def test_what_this_project_has_need_not_be_sent(self, uploader: Uploader) -> None:
        dataset = ok(uploader.send(), 201)["dataset"]
        assert ok(uploader.put(), 201)["dataset"] == dataset
        renamed = ok(uploader.put(filename="rows.txt"), 201)["dataset"]
        assert (renamed["filename"], renamed["sha256"]) == ("rows.txt", HASH)
        assert renamed["id"] != dataset["id"]

    def test_one_whose_bytes_came_by_another_way_is_over(self, uploader: Uploader) -> None:
        ok(uploader.put(), 200)
        ok(uploader.patch(0, CONTENT[:PART]), 200)
        query = {"filename": "rows.jsonl"}
        headers = {"Content-Type": "application/octet-stream"}
        posted = uploader.other.http.post(
            "/datasets", params=query, content=CONTENT, headers=headers
        )
        assert ok(uploader.put(), 201)["dataset"] == ok(posted, 201)
        assert uploader.stored.listed("uploads") == set()
        assert uploader.get()["offset"] == len(CONTENT)

    def test_a_hash_alone_opens_nothing(self, uploader: Uploader) -> None:
        """The store has these bytes, of somebody else."""
        scratch = uploader.one.rows / "scratch"
        scratch.write_bytes(CONTENT)
        uploader.one.store.put_file(scratch)
        assert ok(uploader.put(), 200)["dataset"] is None
        wrong = bytes(len(CONTENT))
        starts = range(0, len(CONTENT), PART)
        answers = [uploader.patch(start, wrong[start:][:PART]) for start in starts]
        assert ok(answers[-1], 422)["code"] == "hash_mismatch"
        assert uploader.one.get("/datasets")["items"] == []
        assert ok(uploader.send(), 201)["dataset"]["sha256"] == HASH

    @pytest.mark.parametrize("body", [None, b"torn"])
    def test_damaged_bytes_are_asked_for_again_and_repaired(
        self, uploader: Uploader, body: bytes | None
    ) -> None:
        dataset = ok(uploader.send(), 201)["dataset"]
        uploader.stored.damage(f"blobs/{HASH[:2]}/{HASH}", body)
        assert ok(uploader.send(), 201)["dataset"] == dataset
        assert b"".join(uploader.one.store.stream(HASH)) == CONTENT


class TestRefused:
    def test_other_bytes_are_forgotten(self, uploader: Uploader) -> None:
        content = CONTENT[:PART]
        ok(uploader.put(content), 200)
        problem = ok(uploader.patch(0, bytes(PART), content), 422)
        assert problem["code"] == "hash_mismatch"
        assert hashlib.sha256(bytes(PART)).hexdigest() in problem["detail"]
        assert uploader.stored.listed("uploads") | uploader.stored.listed("blobs") == set()
        assert ok(uploader.put(content), 200)["offset"] == 0

    def test_a_part_that_has_gone_from_the_store_is_no_success(self, uploader: Uploader) -> None:
        ok(uploader.put(), 200)
        ok(uploader.patch(0, CONTENT[:PART]), 200)
        [part] = uploader.stored.listed("uploads")
        uploader.stored.damage(part, None)
        starts = range(PART, len(CONTENT), PART)
        answers = [uploader.patch(start, CONTENT[start:][:PART]) for start in starts]
        assert "is damaged" in ok(answers[-1], 422)["detail"]
        assert ok(uploader.send(), 201)["dataset"]["sha256"] == HASH

    def test_a_size_that_is_not_allowed_is_refused_before_anything_is_sent(
        self, uploader: Uploader
    ) -> None:
        assert ok(uploader.put(size=(3 << 20) + 1), 413)["code"] == "too_large"
        assert uploader.one.http.get(path(CONTENT)).status_code == 404

    def test_another_size_for_the_same_hash(self, uploader: Uploader) -> None:
        ok(uploader.put(), 200)
        assert ok(uploader.put(size=5), 409)["code"] == "upload_mismatch"
        ok(uploader.send(), 201)
        assert ok(uploader.put(size=5), 422)["code"] == "hash_mismatch"

    @pytest.mark.parametrize("declared", [True, False])
    @pytest.mark.parametrize("excess", ["part", "whole"])
    def test_too_many_bytes_count_for_nothing(
        self, uploader: Uploader, declared: bool, excess: str
    ) -> None:
        content = CONTENT if excess == "part" else b"short"
        body = bytes((1 << 19) + 1) if excess == "part" else b"too long"
        ok(uploader.put(content), 200)
        answer = uploader.patch(0, body if declared else iter([body]), content)
        assert ok(answer, 413)["code"] == "too_large"
        assert uploader.get(content)["offset"] == 0
        assert uploader.stored.listed("uploads") == set()

    def test_a_part_is_compared_with_its_digest_before_it_counts(self, uploader: Uploader) -> None:
        ok(uploader.put(), 200)
        body = CONTENT[:PART]
        for answer, code in (
            (uploader.patch(0, body, Content_Digest=digest_of(b"other")), "hash_mismatch"),
            (uploader.patch(0, body, Repr_Digest=digest_of(b"other")), "hash_mismatch"),
            (uploader.patch(0, body, Content_Digest="sha-256=:nonsense:"), "digest_malformed"),
            (uploader.patch(0, body, Content_Digest="sha-256=abc"), "digest_malformed"),
        ):
            assert ok(answer, 422)["code"] == code
        assert uploader.get()["offset"] == 0
        good = f"sha-512=:unknown:, {digest_of(body)}"
        answer = uploader.patch(0, body, Content_Digest=good, Repr_Digest=digest_of(CONTENT))
        assert ok(answer, 200)["offset"] == PART

    def test_what_is_no_request_of_these(self, uploader: Uploader) -> None:
        one = uploader.one.http
        ok(uploader.put(), 200)
        assert ok(uploader.patch(0, b"x", Content_Encoding="gzip"), 415)
        assert ok(uploader.patch(0, b"x", Content_Type="multipart/form-data"), 415)
        assert "Upload-Offset" in faults(ok(one.patch(path(CONTENT), content=b"x"), 422))
        assert "upload-offset" in str(ok(uploader.patch(-1, b"x"), 422)["errors"]).lower()
        assert ok(uploader.put(filename="rows"), 422)["code"] == "filename_missing"
        assert "size" in faults(ok(uploader.put(size=0), 422))
        assert "size" in faults(ok(uploader.put(size=2**63), 422))
        for method in ("PUT", "GET", "PATCH", "DELETE"):
            assert one.request(method, "/datasets/uploads/XYZ").status_code == 422

    def test_more_parts_than_a_store_can_bear(
        self, uploader: Uploader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.datasets.resumable.MOST_PARTS", 2)
        ok(uploader.put(), 200)
        for offset in (0, 1):
            ok(uploader.patch(offset, CONTENT[offset:][:1]), 200)
        assert "larger parts" in ok(uploader.patch(2, CONTENT[2:3]), 413)["hint"]


@pytest.fixture
def start(
    tmp_path: Path, migrated_sqlite_url: str
) -> Iterator[Callable[[], tuple["Popen[bytes]", httpx2.Client]]]:
    """Starts real servers, on one database and one store."""
    with ExitStack() as stack:

        def start() -> tuple["Popen[bytes]", httpx2.Client]:
            port = stack.enter_context(reserve_port()).getsockname()[1]
            environment = {
                **os.environ,
                "FLATLORA_DATA_DIR": str(tmp_path / "data"),
                "FLATLORA_DATABASE_URL": migrated_sqlite_url,
                "FLATLORA_AUTH": "none",
                "FLATLORA_PORT": str(port),
            }
            command = [sys.executable, "-m", "app.serve"]
            log = tmp_path / "server.log"
            folder = Path(__file__).resolve().parents[2]
            server = spawn(command, log=log, environment=environment, folder=folder)
            stack.callback(server.wait)
            stack.callback(server.kill)
            http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
            stack.callback(http.close)
            until(lambda: answers(http))
            return server, http

        yield start


def answers(http: httpx2.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx2.TransportError:
        return False


def half_a_part(http: httpx2.Client, offset: int, size: int, body: bytes) -> socket.socket:
    """A connection on which some of a part has been sent, and the rest is awaited."""
    url = http.base_url
    connection = socket.create_connection((url.host, url.port or 80))
    head = f"PATCH {path(CONTENT)} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpload-Offset: {offset}\r\n"
    head += f"Content-Type: application/octet-stream\r\nContent-Length: {size}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


class TestServer:
    def test_after_a_kill_it_goes_on_and_a_broken_connection_loses_nothing(
        self, start: Callable[[], tuple["Popen[bytes]", httpx2.Client]], tmp_path: Path
    ) -> None:
        def offset(http: httpx2.Client) -> int:
            return int(ok(http.get(path(CONTENT)), 200)["offset"])

        server, http = start()
        ok(http.put(path(CONTENT), params={"filename": "a.jsonl", "size": len(CONTENT)}), 200)
        first = {"Upload-Offset": "0", "Content-Type": "application/octet-stream"}
        ok(http.patch(path(CONTENT), content=CONTENT[:1000], headers=first), 200)
        half = CONTENT[1000 : 1000 + PART // 2]
        with half_a_part(http, 1000, PART, half):
            until(lambda: arrived(tmp_path) > 0)
            server.send_signal(signal.SIGKILL)
            server.wait()
        _, http = start()
        assert offset(http) == 1000
        for path_ in (tmp_path / "data/uploads").iterdir():
            path_.unlink()
        with half_a_part(http, 1000, PART, half):
            until(lambda: arrived(tmp_path) > 0)
        until(lambda: offset(http) > 1000)
        here = offset(http)
        rest = {"Upload-Offset": str(here), "Content-Type": "application/octet-stream"}
        answer = http.patch(path(CONTENT), content=CONTENT[here:], headers=rest)
        assert ok(answer, 201)["dataset"]["sha256"] == HASH


def arrived(folder: Path) -> int:
    """Bytes of parts that are on their way in."""
    return sum(file.stat().st_size for file in (folder / "data/uploads").glob("tmp*"))
