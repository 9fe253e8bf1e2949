"""Following a job over real sockets: long-polls that answer when it changes, streams of events."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import delete
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from app.etags import prefers
from app.jobs import following
from app.jobs.records import EVENTS_AT_ONCE
from app.jobs.states import Status
from app.migrate import upgrade
from app.tables import JobRow
from tests.app.conftest import make_settings
from tests.app.keys import make_key
from tests.app.live import Live, live, messages
from tests.app.service import ok, running
from tests.faults.procs import descendants
from tests.faults.servers import PostgresServer
from tests.system.service import until

MORE = EVENTS_AT_ONCE + 5  # than are read at once


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture
def served(tmp_path: Path, migrated_url: str) -> Iterator[Live]:
    with live(make_settings(tmp_path, migrated_url)) as service:
        yield service


@pytest.fixture
def one(tmp_path: Path, migrated_sqlite_url: str) -> Iterator[Live]:
    """Where it does not matter which database it is."""
    with live(make_settings(tmp_path, migrated_sqlite_url)) as service:
        yield service


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(300) as pool:
        yield pool


def ask(
    service: Live, pool: ThreadPoolExecutor, job_id: str, wait: float, **headers: str
) -> "Future[httpx2.Response]":
    """A request that waits already when this returns."""
    waiting = service.waiting
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    future = pool.submit(
        service.http.get, f"/jobs/{job_id}", params={"wait": wait}, headers=named, timeout=90
    )
    until(lambda: service.waiting > waiting or future.done(), seconds=10, every=0.01)
    return future


class TestLongPoll:
    def test_it_answers_when_the_job_is_not_what_the_client_has(
        self, served: Live, pool: ThreadPoolExecutor
    ) -> None:
        job_id = served.submit()["id"]
        etag = served.http.get(f"/jobs/{job_id}").headers["etag"]
        asked = ask(served, pool, job_id, 60, If_None_Match=etag)
        assert not asked.done()
        changed_at = time.monotonic()
        served.happen(job_id, "job.running", status=Status.RUNNING)
        answer = asked.result(20)
        assert (answer.status_code, answer.json()["status"]) == (200, "running")
        assert answer.headers["etag"] != etag
        assert time.monotonic() - changed_at < 3
        assert served.waiting == 0

    def test_or_when_it_changes_where_the_client_has_nothing(
        self, served: Live, pool: ThreadPoolExecutor
    ) -> None:
        job_id = served.submit()["id"]
        asked, steps = ask(served, pool, job_id, 60), count(1)

        def train() -> bool:  # it may not have read the job yet when it is waiting
            served.happen(job_id, "job.evaluated", status=Status.RUNNING, step=next(steps))
            return asked.done()

        until(train, seconds=20, every=0.2)
        assert asked.result().json()["status"] == "running"

    def test_without_a_change_it_is_what_it_was_when_the_time_is_over(
        self, one: Live, pool: ThreadPoolExecutor
    ) -> None:
        job_id = one.submit()["id"]
        etag = one.http.get(f"/jobs/{job_id}").headers["etag"]
        started = time.monotonic()
        plain = ask(one, pool, job_id, 1)
        known = ask(one, pool, job_id, 1, If_None_Match=etag)
        assert (plain.result().status_code, plain.result().headers["etag"]) == (200, etag)
        assert (known.result().status_code, known.result().content) == (304, b"")
        assert known.result().headers["retry-after"] == "2"
        assert time.monotonic() - started >= 1

    def test_what_the_client_has_not_seen_is_told_at_once(self, one: Live) -> None:
        job_id = one.submit()["id"]
        started = time.monotonic()
        answer = one.http.get(f"/jobs/{job_id}?wait=60", headers={"If-None-Match": '"old"'})
        assert answer.status_code == 200
        assert time.monotonic() - started < 10

    def test_nobody_waits_for_a_job_that_is_over(self, one: Live) -> None:
        job_id = one.submit()["id"]
        one.set(job_id, status=Status.SUCCEEDED)
        started = time.monotonic()
        etag = one.http.get(f"/jobs/{job_id}?wait=60").headers["etag"]
        again = one.http.get(f"/jobs/{job_id}?wait=60", headers={"If-None-Match": etag})
        assert again.status_code == 304
        assert time.monotonic() - started < 10

    def test_a_place_in_the_queue_that_comes_nearer_is_a_change(
        self, one: Live, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(following, "RECHECK_SECONDS", 0.2)
        first, second = (one.submit()["id"] for _ in range(2))
        etag = one.http.get(f"/jobs/{second}").headers["etag"]
        asked = ask(one, pool, second, 60, If_None_Match=etag)
        one.set(first, status=Status.RUNNING)
        assert asked.result(20).json()["queue_position"] == 0

    @pytest.mark.torture
    def test_three_hundred_who_wait_leave_the_database_to_others(
        self, tmp_path: Path, migrated_postgres_url: str, pool: ThreadPoolExecutor
    ) -> None:
        with live(make_settings(tmp_path, migrated_postgres_url)) as served:
            self.wait_in_crowds(served, pool)

    def wait_in_crowds(self, served: Live, pool: ThreadPoolExecutor) -> None:
        ids = [served.submit()["id"] for _ in range(3)]
        for job_id in ids:  # else their places in the queue change too
            served.set(job_id, status=Status.RUNNING)
        asked = [
            pool.submit(served.http.get, f"/jobs/{ids[n % 3]}?wait=60", timeout=90)
            for n in range(300)
        ]
        until(lambda: served.waiting == 300, seconds=30)
        pool_of = served.state["database"].engine.pool
        until(lambda: pool_of.checkedout() <= 1, seconds=30)  # all have read it, and now wait
        started = time.monotonic()
        served.submit()
        assert time.monotonic() - started < 5
        for job_id in ids:
            served.happen(job_id, "job.cancelled", status=Status.CANCELLED)
        assert {future.result(60).json()["status"] for future in asked} == {"cancelled"}
        until(lambda: served.waiting == 0, seconds=10)

    def test_one_that_has_gone_waits_no_longer(
        self, one: Live, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(following, "RECHECK_SECONDS", 0.2)
        job_id = one.submit()["id"]
        with pytest.raises(httpx2.ReadTimeout):
            one.http.get(f"/jobs/{job_id}?wait=60", timeout=0.5)
        until(lambda: one.waiting == 0, seconds=5)

    @pytest.mark.parametrize("query", ["wait=61", "wait=-1", "wait=nan", "wait=x", "hold=1"])
    def test_what_cannot_be_asked_is_422(self, service: Any, query: str) -> None:
        job_id = service.submit()["id"]
        ok(service.http.get(f"/jobs/{job_id}?{query}"), 422)

    def test_its_head_is_that_of_the_answer(self, one: Live) -> None:
        job_id = one.submit()["id"]
        head, whole = one.http.head(f"/jobs/{job_id}"), one.http.get(f"/jobs/{job_id}")
        assert (head.status_code, head.content) == (200, b"")
        for name in ("etag", "content-length", "retry-after"):
            assert head.headers[name] == whole.headers[name]


class TestStream:
    def test_every_event_comes_once_and_in_order_until_the_job_is_over(self, served: Live) -> None:
        job_id = served.submit()["id"]
        served.happen(job_id, "job.running", status=Status.RUNNING)
        with served.stream(job_id) as told:
            heard = [next(told), next(told)]
            for number in range(20):
                served.happen(job_id, "job.evaluated", step=number)
            served.happen(job_id, "job.succeeded", status=Status.SUCCEEDED)
            heard += [message for message in told if "id" in message]  # and it ends
        assert [message["id"] for message in heard] == [str(n) for n in range(1, 24)]
        listed = served.get(f"/jobs/{job_id}/events")["items"]
        assert [message["data"] for message in heard] == listed
        assert [message["event"] for message in heard] == [event["type"] for event in listed]
        until(lambda: served.waiting == 0, seconds=10)

    def test_who_comes_again_hears_what_was_missed(self, one: Live) -> None:
        job_id = one.submit()["id"]
        for _ in range(MORE):
            one.happen(job_id, "job.evaluated")
        one.happen(job_id, "job.failed", status=Status.FAILED)
        last = MORE + 2
        for given in ({"query": "?after=3"}, {"Last_Event_ID": "3"},
                      {"query": "?after=1", "Last_Event_ID": "3"}):  # fmt: skip
            with one.stream(job_id, **given) as told:
                ids = [int(message["id"]) for message in told]
            assert ids == list(range(4, last + 1))
        done = one.http.get(
            f"/jobs/{job_id}/events",
            headers={"Accept": "text/event-stream", "Last-Event-ID": str(last)},
        )
        assert (done.status_code, done.content) == (204, b""), "a browser stops coming then"

    def test_steps_are_told_between_events_and_at_most_one_a_second(self, one: Live) -> None:
        job_id = one.submit()["id"]
        one.happen(job_id, "job.running", status=Status.RUNNING)
        over = threading.Event()

        def train() -> None:
            step = 0
            while not over.wait(0.05):
                step += 1
                one.set(job_id, step=step, total_steps=99, progress={"loss": 1 / step})
            one.happen(job_id, "job.succeeded", status=Status.SUCCEEDED)

        with ThreadPoolExecutor(1) as training, one.stream(job_id) as told:
            training.submit(train)
            heard: list[tuple[float, dict[str, Any]]] = []
            for message in told:
                if message.get("event") == "progress":
                    heard.append((time.monotonic(), message))
                    if len(heard) == 5:
                        over.set()
        times = [at for at, _ in heard]
        assert times[4] - times[0] > 2.5  # four, if the first is not read late
        steps = [message["data"]["step"] for _, message in heard[:5]]
        assert steps == sorted(set(steps))
        for _, message in heard:
            assert "id" not in message
            assert message["data"]["progress"]["loss"] == 1 / message["data"]["step"]

    def test_it_says_that_it_lives_while_nothing_happens(
        self, one: Live, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(following, "PING_SECONDS", 0.3)
        job_id = one.submit()["id"]
        with one.stream(job_id) as told:
            assert next(told)["event"] == "job.queued"
            assert [next(told), next(told)] == [{"comment": "ping"}] * 2

    def test_one_that_nobody_hears_any_more_ends(self, one: Live) -> None:
        job_id = one.submit()["id"]
        with one.stream(job_id) as told:
            next(told)
            assert one.waiting == 1
        until(lambda: one.waiting == 0, seconds=5)

    def test_it_outlives_an_outage_of_the_database(self, tmp_path: Path) -> None:
        with PostgresServer(tmp_path) as postgres:
            url = postgres.url().replace("postgresql:", "postgresql+psycopg:")
            upgrade(url)
            with live(make_settings(tmp_path, url, auth="key")) as service:
                # With a key of a project: the stream asks again and again whether it is valid.
                key = make_key(service, role="submitter")["key"]
                service.http.headers["Authorization"] = f"Bearer {key}"
                job_id = service.submit()["id"]
                with service.stream(job_id) as told:
                    assert next(told)["id"] == "1"
                    postgres.stop("immediate")
                    time.sleep(1)
                    postgres.start()
                    until(lambda: service.http.get(f"/jobs/{job_id}").is_success, seconds=20)
                    service.happen(job_id, "job.running", status=Status.RUNNING)
                    service.happen(job_id, "job.failed", status=Status.FAILED)
                    assert [m["id"] for m in told if "id" in m] == ["2", "3"]

    def test_a_job_that_is_removed_ends_it(self, one: Live) -> None:
        job_id = one.submit()["id"]
        with one.stream(job_id) as told:
            next(told)
            with Session(one.engine) as session, session.begin():
                session.execute(delete(JobRow).where(JobRow.id == job_id))
            assert list(told) == []

    @pytest.mark.parametrize("given", ["-1", "x", str(2**31)])
    def test_what_cannot_be_asked_is_422(self, service: Any, given: str) -> None:
        job_id = service.submit()["id"]
        headers = {"Accept": "text/event-stream", "Last-Event-ID": given}
        ok(service.http.get(f"/jobs/{job_id}/events", headers=headers), 422)

    def test_an_unknown_job_is_404(self, service: Any) -> None:
        path = f"/jobs/job_{'0' * 32}/events"
        ok(service.http.get(path, headers={"Accept": "text/event-stream"}), 404)


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream", True),
        ("text/event-stream, */*;q=0.1", True),
        ("TEXT/EVENT-STREAM;q=0.5", True),
        ("application/json, text/event-stream", True),
        ("application/json, text/event-stream;q=0.9", False),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=x", False),
        ("*/*", False),
        ("", False),
    ],
)
def test_a_stream_is_for_those_who_ask_for_it(accept: str, streams: bool) -> None:
    assert prefers(accept, "text/event-stream") is streams


def test_a_server_that_is_told_to_stop_does_not_wait_for_those_who_follow(
    tmp_path: Path, migrated_sqlite_url: str
) -> None:
    settings = make_settings(tmp_path, migrated_sqlite_url)
    service = Live(httpx2.Client(), settings)
    with running(settings) as url, httpx2.Client(base_url=url, timeout=60) as http:
        job_id = http.post("/jobs", json=service.body).json()["id"]
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        heard = threading.Event()

        def follow() -> int:
            wanted = {"Accept": "text/event-stream"}
            with http.stream("GET", f"/jobs/{job_id}/events", headers=wanted) as response:
                told = messages(response.iter_lines())
                next(told)
                heard.set()
                return len(list(told))

        with ThreadPoolExecutor(1) as pool, socket.create_connection(address) as polling:
            # Before the stream is opened: it is with the server when that has begun.
            poll = f"GET /jobs/{job_id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n"
            polling.sendall(poll.encode())
            streaming = pool.submit(follow)
            assert heard.wait(60)
            (server,) = [p for p in descendants(os.getpid()) if "app.main:make_app" in p.command]
            os.kill(server.pid, signal.SIGTERM)
            assert streaming.result(20) == 0
            polling.settimeout(20)
            assert polling.recv(4096).startswith(b"HTTP/1.1 200")
    service.http.close()
