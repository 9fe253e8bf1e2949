"""What a request becomes: one job however often it is sent, an answer, or an error by its kind."""

import re
import secrets
import time
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

import flatlora_client
from flatlora_client import (
    APIError,
    Conflict,
    ConnectionFailed,
    FlatLora,
    FlatLoraError,
    Forbidden,
    InvalidRequest,
    NotFound,
    RateLimited,
    ServerError,
    Unauthenticated,
    UnexpectedAnswer,
    errors,
)
from tests.app.service import Service
from tests.client.both import Connect
from tests.client.peer import Peer
from tests.faults.proxy import Proxy

ROWS = "dataset:ds_1"


def create(client: FlatLora) -> str:
    return client.jobs.create(base_model="m", dataset_uri=ROWS).id


class TestRetries:
    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_one_that_may_help_is_made_with_the_same_key(
        self, peer: Peer, connect: Connect, status: int
    ) -> None:
        peer.fail("POST /jobs", status=status, times=2)
        client = connect(peer.url)
        first, second = create(client), create(client)
        keys = [seen.headers["idempotency-key"] for seen in peer.asked("POST /jobs")]
        assert len(keys) == 4
        assert len(set(keys[:3])) == 1
        assert keys[3] != keys[0]
        assert list(peer.jobs) == [first, second]

    def test_a_lost_answer_makes_no_second_job(self, peer: Peer, connect: Connect) -> None:
        peer.fail("POST /jobs", after=True, times=2)
        assert create(connect(peer.url)) in peer.jobs
        assert (len(peer.asked("POST /jobs")), len(peer.jobs)) == (3, 1)

    def test_nor_does_one_that_is_lost_on_the_real_service(
        self, real: Service, connect: Connect
    ) -> None:
        port = int(str(real.http.base_url).rstrip("/").rpartition(":")[2])
        with Proxy("127.0.0.1", port) as proxy:
            client = connect(f"http://127.0.0.1:{proxy.port}")
            proxy.cut_after(b"POST /jobs", b"train.jsonl")
            label = secrets.token_hex(4)
            job = client.jobs.create(
                base_model="file:tiny", dataset_uri="file:train.jsonl", labels={"test": label}
            )
            assert (proxy.faults, proxy.is_armed) == (1, False)
        found = real.get("/jobs", **{"label.test": label})["items"]
        assert [each["id"] for each in found] == [job.id]

    def test_the_service_says_for_how_long_it_wants_to_be_left_alone(
        self, peer: Peer, connect: Connect
    ) -> None:
        peer.fail("GET /jobs/*", status=429, headers={"Retry-After": "1"})
        job_id, began_at = peer.add_job()["id"], time.monotonic()
        assert connect(peer.url).jobs.get(job_id).id == job_id
        assert time.monotonic() - began_at >= 1

    def test_one_who_asks_for_more_time_than_there_is_gets_no_retry(
        self, peer: Peer, connect: Connect
    ) -> None:
        peer.fail("GET /jobs/*", status=429, headers={"Retry-After": "3600"})
        with pytest.raises(RateLimited) as caught:
            connect(peer.url).jobs.get("j")
        assert caught.value.retry_after == 3600
        assert len(peer.seen) == 1

    def test_there_are_no_more_than_was_said(self, peer: Peer, connect: Connect) -> None:
        peer.fail("GET /jobs/*", status=503, times=9)
        with pytest.raises(ServerError) as caught:
            connect(peer.url, max_retries=2).jobs.get("j")
        assert (caught.value.status, len(peer.seen)) == (503, 3)

    def test_nor_for_longer(self, peer: Peer, connect: Connect) -> None:
        peer.fail("GET /jobs/*", status=503, times=10_000)
        began_at = time.monotonic()
        with pytest.raises(ServerError):
            connect(peer.url, max_retries=10_000, retry_seconds=0.3).jobs.get("j")
        assert time.monotonic() - began_at < 5
        assert len(peer.seen) > 2

    def test_a_refusal_is_final(self, peer: Peer, connect: Connect) -> None:
        peer.fail("POST /jobs", status=422, times=9)
        with pytest.raises(InvalidRequest):
            create(connect(peer.url))
        assert len(peer.seen) == 1

    def test_what_would_make_another_thing_is_not_sent_twice(
        self, peer: Peer, connect: Connect
    ) -> None:
        client = connect(peer.url)
        peer.fail("POST /keys", after=True)
        with pytest.raises(ConnectionFailed):
            client.keys.create(name="ci")
        assert len(peer.keys) == 1
        peer.fail("POST /keys", status=429)
        made = client.keys.create(name="ci")
        assert made.key == "flk_new"
        assert "flk_new" not in repr(made)

    def test_a_service_that_comes_back_is_found(self, peer: Peer, connect: Connect) -> None:
        job_id = peer.add_job()["id"]
        with Proxy("127.0.0.1", int(peer.url.rpartition(":")[2])) as proxy:
            client = connect(f"http://127.0.0.1:{proxy.port}", max_retries=1)
            client.jobs.get(job_id)
            proxy.cut()
            with pytest.raises(ConnectionFailed, match="no answer from http://127"):
                client.jobs.get(job_id)
            proxy.pass_through()
            assert client.jobs.get(job_id).id == job_id

    def test_a_removal_whose_answer_was_lost_is_one(self, peer: Peer, connect: Connect) -> None:
        job_id, client = peer.add_job(status="failed")["id"], connect(peer.url)
        peer.fail("DELETE /jobs/*", after=True)
        client.jobs.delete(job_id)
        assert (peer.jobs, len(peer.asked("DELETE /jobs/*"))) == ({}, 2)
        with pytest.raises(NotFound):
            client.jobs.delete(job_id)


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, InvalidRequest), (401, Unauthenticated), (403, Forbidden), (404, NotFound),
            (405, APIError), (409, Conflict), (413, InvalidRequest), (415, InvalidRequest),
            (422, InvalidRequest), (429, RateLimited), (500, ServerError), (503, ServerError),
        ],
    )  # fmt: skip
    def test_one_of_each_status(
        self, peer: Peer, connect: Connect, status: int, kind: type[APIError]
    ) -> None:
        peer.fail("GET /jobs/*", status=status)
        with pytest.raises(kind) as caught:
            connect(peer.url, max_retries=0).jobs.get("j")
        assert type(caught.value) is kind
        assert (caught.value.status, caught.value.code) == (status, "on_purpose")

    def test_all_that_the_real_service_says_of_it_is_there(
        self, real: Service, connect: Connect
    ) -> None:
        client = connect(str(real.http.base_url))
        with pytest.raises(InvalidRequest) as caught:
            client.jobs.create(base_model="file:tiny", dataset_uri="file:train.jsonl", rank=0)
        error = caught.value
        assert (error.status, error.code) == (422, "invalid_request")
        assert [fault["pointer"] for fault in error.errors] == ["/rank"]
        assert error.hint
        assert error.hint in str(error)
        assert "/rank: " in str(error)
        assert error.request_id == error.problem["request_id"]
        with pytest.raises(NotFound, match="There is no ") as missing:
            client.jobs.get("x/y")
        assert missing.value.code == "not_found"

    @pytest.mark.parametrize(
        "answer",
        [
            PlainTextResponse("<html>Welcome to the hotel"),
            JSONResponse([]),
            JSONResponse({"items": 3}),
            JSONResponse({"items": [{"name": "no host"}]}),
        ],
    )
    def test_what_is_no_answer_of_flatlora_is_told_as_such(
        self, peer: Peer, connect: Connect, answer: PlainTextResponse
    ) -> None:
        async def hotel(request: Request) -> PlainTextResponse:
            return answer

        peer.more["GET /workers"] = hotel
        with pytest.raises(UnexpectedAnswer):
            connect(peer.url).workers.list()

    def test_a_proxys_page_is_no_problem_of_ours(self, peer: Peer, connect: Connect) -> None:
        async def page(request: Request) -> PlainTextResponse:
            return PlainTextResponse("<html>", 500)

        peer.more["GET /workers"] = page
        with pytest.raises(ServerError, match="HTTP 500") as caught:
            connect(peer.url).workers.list()
        assert (caught.value.problem, caught.value.code) == ({}, None)

    def test_their_tree_is_the_one_that_is_drawn(self) -> None:
        drawn = re.findall(r"^ {4}[ │├└─]*(\w+)", errors.__doc__ or "", re.MULTILINE)
        kinds = {
            name
            for name, kind in vars(flatlora_client).items()
            if isinstance(kind, type) and issubclass(kind, FlatLoraError)
        }
        assert len(drawn) == len(set(drawn))
        assert set(drawn) == kinds


class TestAnswers:
    def test_a_newer_services_fields_are_kept(self, peer: Peer, connect: Connect) -> None:
        new = {"mood": "good", "status": "dreaming", "created_at": "2026-11-27T10:00:00Z"}
        job_id = peer.add_job(**new)["id"]
        job = connect(peer.url).jobs.get(job_id)
        assert (job["mood"], job.status, job.is_over) == ("good", "dreaming", False)
        assert job.raw == peer.jobs[job_id]
        assert job.created_at is not None
        assert job.created_at.tzinfo is not None

    def test_an_older_services_lack_is_none(self, peer: Peer, connect: Connect) -> None:
        job = connect(peer.url).jobs.get(peer.add_job()["id"])
        assert (job.retried_from, job.failure, job.adapter, job.labels) == (None, None, None, {})

    def test_fields_of_a_newer_service_can_be_sent(self, peer: Peer, connect: Connect) -> None:
        connect(peer.url).jobs.create(
            base_model="m",
            dataset_uri=ROWS,
            training={"max_steps": 3},
            extra_fields={"mood": "good"},
            idempotency_key="mine",
        )
        [job] = peer.jobs.values()
        expected = {"base_model": "m", "dataset_uri": ROWS, "training": {"max_steps": 3}}
        assert job["spec"] == expected | {"mood": "good"}
        assert list(peer.made) == ["mine"]

    def test_a_list_is_fetched_page_by_page(self, peer: Peer, connect: Connect) -> None:
        made = [peer.add_job()["id"] for _ in range(5)]
        client = connect(peer.url)
        found = client.jobs.list(labels={"team": "nlp"}, status=["queued"], limit=2)
        assert peer.seen == []
        assert next(found).id == made[0]
        assert len(peer.seen) == 1
        assert [job.id for job in found] == made[1:]
        assert [seen.query.get("after") for seen in peer.seen] == [None, "2", "4"]
        assert peer.seen[0].query == {"label.team": "nlp", "status": "queued", "limit": "2"}

    def test_a_job_acts_on_itself(self, peer: Peer, connect: Connect) -> None:
        job = connect(peer.url).jobs.get(peer.add_job()["id"])
        assert job.pause().status == "paused"
        assert job.resume().status == "queued"
        assert job.cancel().status == "cancelled"
        assert job.refresh().status == "cancelled"
        again = job.retry()
        assert (again.retried_from, again.id) == (job.id, list(peer.jobs)[1])
        job.delete()
        assert list(peer.jobs) == [again.id]

    def test_the_real_service_answers_what_is_read(self, real: Service, connect: Connect) -> None:
        client, label = connect(str(real.http.base_url)), secrets.token_hex(4)
        job = client.jobs.create(
            base_model="file:tiny", dataset_uri="file:train.jsonl", labels={"team": label}
        )
        assert job.raw == real.get(f"/jobs/{job.id}")
        [listed] = client.jobs.list(labels={"team": label})
        assert (listed.id, listed.labels) == (job.id, {"team": label})
        real.add_metrics(job.id, "train", range(1, 8))
        points = client.jobs.metrics(job.id, since_step=3)
        assert [point.step for point in points] == [3, 4, 5, 6, 7]
        assert [event.type for event in job.events()] == ["job.queued"]
        assert client.models.list().items[0].id.endswith("/tiny")
        assert client.workers.list() == ()
        assert client.version().version
        assert job.cancel().is_over


def test_the_key_is_sent_and_never_shown(peer: Peer, connect: Connect, tmp_path: Path) -> None:
    client = connect(peer.url, api_key="flk_secret", data_dir=tmp_path)
    client.jobs.page()
    assert peer.seen[0].headers["authorization"] == "Bearer flk_secret"
    assert peer.seen[0].headers["user-agent"].startswith("flatlora-client/")
    assert "secret" not in repr(FlatLora(peer.url, "flk_secret"))
