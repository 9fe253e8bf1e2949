"""Events and logs as they come: none is lost, none comes twice, and there is an end."""

import pytest

from flatlora_client import ConnectionFailed, NotFound
from tests.client.both import Connect
from tests.client.peer import Peer
from tests.client.test_waiting import meanwhile
from tests.system.service import until

KINDS = ["job.queued", "job.running", "job.checkpoint", "job.evaluated", "job.succeeded"]


@pytest.fixture
def job_id(peer: Peer) -> str:
    for kind in KINDS:
        peer.add_event(kind)
    return str(peer.add_job(status="succeeded")["id"])


def test_what_is_there_is_paged_through(peer: Peer, connect: Connect, job_id: str) -> None:
    client = connect(peer.url)
    assert [event.type for event in client.jobs.events(job_id)] == KINDS
    assert [event.seq for event in client.jobs.events(job_id, after=3)] == [4, 5]
    assert {seen.headers["accept"] for seen in peer.seen} == {"*/*"}


def test_a_stream_ends_with_the_job(peer: Peer, connect: Connect, job_id: str) -> None:
    found = connect(peer.url).jobs.events(job_id, follow=True)
    assert [(event.seq, event.type) for event in found] == list(enumerate(KINDS, 1))
    assert len(peer.seen) == 1


def test_it_is_taken_up_again_where_it_broke_off(peer: Peer, connect: Connect, job_id: str) -> None:
    peer.hangs_up_after = 2
    peer.fail("GET /jobs/*/events", status=503)
    found = connect(peer.url).jobs.events(job_id, follow=True)
    assert [event.type for event in found] == KINDS
    asked = [seen.headers.get("last-event-id") for seen in peer.seen]
    assert asked == [None, None, "2", "4"]


def test_events_come_as_they_happen(peer: Peer, connect: Connect) -> None:
    job_id, seen = peer.add_job()["id"], list[str]()
    with meanwhile(
        *(
            step
            for count, kind in enumerate(KINDS)
            for step in (
                lambda count=count: until(lambda: len(seen) == count, every=0.01),
                lambda kind=kind: peer.add_event(kind),
            )
        )
    ):
        for event in connect(peer.url).jobs.events(job_id, follow=True):
            seen.append(event.type)
    assert seen == KINDS


def test_a_service_that_does_not_stream_is_asked_again_and_again(
    peer: Peer, connect: Connect
) -> None:
    peer.streams = False
    job, seen = peer.add_job(), list[str]()
    peer.add_event("job.queued")
    with meanwhile(
        lambda: until(lambda: seen, every=0.01),
        lambda: peer.add_event("job.running"),
        lambda: until(lambda: len(seen) == 2, every=0.01),
        lambda: peer.add_event("job.succeeded"),
        lambda: job.update(status="succeeded"),
    ):
        for event in connect(peer.url).jobs.events(job["id"], follow=True, poll_seconds=0.01):
            seen.append(event.type)
    assert seen == ["job.queued", "job.running", "job.succeeded"]


def test_after_the_last_event_there_is_an_end_too(
    peer: Peer, connect: Connect, job_id: str
) -> None:
    client = connect(peer.url, max_retries=0)
    assert list(client.jobs.events(job_id, follow=True, after=len(KINDS))) == []


def test_a_stream_that_ends_in_order_goes_on_in_another(
    peer: Peer, connect: Connect, job_id: str
) -> None:
    """As a service ends it that is stopped for an upgrade; here before its last event."""
    late = peer.events.pop()
    peer.when("GET /jobs/*/events", lambda: peer.events.append(late), of=2)
    found = connect(peer.url).jobs.events(job_id, follow=True)
    assert [event.type for event in found] == KINDS


def test_a_stream_that_breaks_each_time_is_an_error(
    peer: Peer, connect: Connect, job_id: str
) -> None:
    peer.fail("GET /jobs/*/events", bytes=1, times=9)
    with pytest.raises(ConnectionFailed):
        list(connect(peer.url, max_retries=2).jobs.events(job_id, follow=True))
    assert len(peer.seen) == 3


def test_there_are_none_of_a_job_that_does_not_exist(peer: Peer, connect: Connect) -> None:
    peer.fail("GET /jobs/*/events", status=404)
    with pytest.raises(NotFound):
        next(connect(peer.url).jobs.events("job_0", follow=True))


def test_who_has_seen_enough_leaves_no_connection_behind(
    peer: Peer, connect: Connect, job_id: str
) -> None:
    client = connect(peer.url)
    for _ in range(110):  # more than a client has connections
        found = client.jobs.events(job_id, follow=True)
        assert next(found).seq == 1
        found.close()  # type: ignore[attr-defined] # it is a generator


class TestLogs:
    def test_a_log_is_read_to_its_end(self, peer: Peer, connect: Connect, job_id: str) -> None:
        peer.logs = [{"seq": seq, "text": f"line {seq}"} for seq in range(1, 6)]
        client = connect(peer.url)
        assert [line.seq for line in client.jobs.logs(job_id)] == [1, 2, 3, 4, 5]
        assert [line.text for line in client.jobs.logs(job_id, after=4)] == ["line 5"]

    def test_or_followed_until_the_job_is_over(self, peer: Peer, connect: Connect) -> None:
        job, seen = peer.add_job(), list[int]()
        with meanwhile(
            lambda: peer.logs.append({"seq": 1, "text": "a"}),
            lambda: until(lambda: seen, every=0.01),
            lambda: peer.logs.append({"seq": 2, "text": "b"}),
            lambda: job.update(status="failed"),
        ):
            for line in connect(peer.url).jobs.logs(job["id"], follow=True, poll_seconds=0.01):
                seen.append(line.seq)
        assert seen == [1, 2]
