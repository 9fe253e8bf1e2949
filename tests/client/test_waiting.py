"""Waiting for a job: with few questions, over outages, to an end that is told as it was."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flatlora_client import (
    ConnectionFailed,
    JobCancelled,
    JobData,
    JobFailed,
    NotFound,
    ServerError,
    WaitTimeout,
)
from tests.app.service import Service
from tests.client.both import Connect
from tests.client.peer import Peer
from tests.faults.proxy import Proxy
from tests.system.service import until

POLL = 0.01


@contextmanager
def meanwhile(*changes: Any) -> Iterator[None]:
    """Another thread, which makes one change after the other."""
    thread = threading.Thread(target=lambda: [change() for change in changes])
    thread.start()
    yield
    thread.join(30)


class Course:
    """A job that moves on once its last change has been seen."""

    def __init__(self, peer: Peer, *changes: dict[str, Any]) -> None:
        self.job = peer.add_job()
        self.seen: list[str] = []
        self._changes = list(changes)

    def progress(self, job: JobData) -> None:
        self.seen.append(f"{job.status} {job.step}")
        if self._changes:
            self.job.update(self._changes.pop(0))


RUN: list[dict[str, Any]] = [
    {"status": "running"},
    {"step": 1},
    {"step": 2},
    {"status": "succeeded"},
]
SEEN = ["queued 0", "running 0", "running 1", "running 2", "succeeded 2"]


def test_each_change_is_told_once(peer: Peer, connect: Connect) -> None:
    course = Course(peer, *RUN)
    job = connect(peer.url).jobs.wait(course.job["id"], progress=course.progress, poll_seconds=POLL)
    assert (job.status, course.seen) == ("succeeded", SEEN)


def test_a_service_that_holds_the_question_is_asked_once_per_change(
    peer: Peer, connect: Connect
) -> None:
    job = peer.add_job()
    with meanwhile(
        lambda: until(lambda: len(peer.seen) == 2, every=0.01),
        lambda: time.sleep(0.5),  # in which another would have polled many times
        lambda: job.update(status="succeeded"),
    ):
        connect(peer.url).jobs.wait(job["id"], poll_seconds=POLL)
    first, second = peer.seen
    assert (first.query, second.query) == ({}, {"wait": "30"})
    assert second.headers["if-none-match"]


def test_one_that_does_not_is_polled(peer: Peer, connect: Connect) -> None:
    peer.waits = False
    job = peer.add_job()
    with meanwhile(
        lambda: until(lambda: len(peer.seen) > 5, every=0.01),
        lambda: job.update(status="succeeded"),
    ):
        connect(peer.url).jobs.wait(job["id"], poll_seconds=POLL)
    assert {seen.query["wait"] for seen in peer.seen[1:]} == {"30"}


def test_the_real_service_is_waited_for(real: Service, connect: Connect) -> None:
    job_id = real.submit()["id"]
    seen: list[str] = []

    def progress(job: JobData) -> None:
        seen.append(job.status)
        if job.status == "queued":
            real.set(job_id, status="running")
        elif job.status == "running":
            real.set(job_id, status="succeeded")

    client = connect(str(real.http.base_url))
    assert client.jobs.get(job_id).wait(progress=progress, poll_seconds=POLL).is_over
    assert seen == ["queued", "running", "succeeded"]


@pytest.mark.parametrize("kind", [ConnectionFailed, ServerError])
def test_an_outage_is_waited_for(peer: Peer, connect: Connect, kind: type[Exception]) -> None:
    job, outages = peer.add_job(), list[Exception]()
    peer.waits = False

    def fall_ill() -> None:
        peer.fail("GET /jobs/*", status=500, times=2)

    with (
        Proxy("127.0.0.1", int(peer.url.rpartition(":")[2])) as proxy,
        meanwhile(
            lambda: until(lambda: len(peer.seen) > 2, every=0.01),
            proxy.cut if kind is ConnectionFailed else fall_ill,
            lambda: until(lambda: outages, every=0.01),
            proxy.pass_through,
            lambda: job.update(status="succeeded"),
        ),
    ):
        client = connect(f"http://127.0.0.1:{proxy.port}")
        client.jobs.wait(job["id"], poll_seconds=POLL, on_outage=outages.append)
    assert [type(error) for error in outages] == [kind]


def test_patience_ends(peer: Peer, connect: Connect) -> None:
    peer.fail("GET /jobs/*", status=503, times=1000)
    outages: list[Exception] = []
    with pytest.raises(ServerError):
        connect(peer.url).jobs.wait("j", patience=0.7, on_outage=outages.append)
    assert len(outages) == 1
    assert len(peer.seen) > 1


def test_so_does_the_time_that_was_given(peer: Peer, connect: Connect) -> None:
    job, began_at = peer.add_job(), time.monotonic()
    with pytest.raises(WaitTimeout, match=r"not over, after 0\.2 s") as caught:
        connect(peer.url).jobs.wait(job["id"], timeout=0.2, poll_seconds=POLL)
    assert caught.value.job.status == "queued"
    assert isinstance(caught.value, TimeoutError)
    assert 0.2 <= time.monotonic() - began_at < 5


def test_an_outage_does_not_lengthen_it(peer: Peer, connect: Connect) -> None:
    peer.fail("GET /jobs/*", status=503, times=1000)
    began_at = time.monotonic()
    with pytest.raises(ServerError):
        connect(peer.url).jobs.wait("j", timeout=0.3)
    assert time.monotonic() - began_at < 5


def test_a_failure_is_raised_with_its_reason(peer: Peer, connect: Connect) -> None:
    failure = {"reason": "loss_diverged", "message": "NaN.", "hint": "Lower sigma."}
    job_id = peer.add_job(status="failed", failure=failure)["id"]
    client = connect(peer.url)
    with pytest.raises(JobFailed, match=r"loss_diverged: NaN\. Hint: Lower sigma\.") as caught:
        client.jobs.wait(job_id)
    assert (caught.value.reason, caught.value.hint) == ("loss_diverged", "Lower sigma.")
    assert client.jobs.wait(job_id, raise_on_failure=False).status == "failed"


def test_so_is_a_cancellation(peer: Peer, connect: Connect) -> None:
    with pytest.raises(JobCancelled) as caught:
        connect(peer.url).jobs.wait(peer.add_job(status="cancelled")["id"])
    assert caught.value.reason == "cancelled"


def test_a_job_that_is_removed_is_not_waited_for(peer: Peer, connect: Connect) -> None:
    job = peer.add_job()
    with pytest.raises(NotFound):
        connect(peer.url).jobs.wait(job["id"], progress=lambda _: peer.jobs.clear())
