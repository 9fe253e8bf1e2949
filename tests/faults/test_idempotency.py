"""Promise 7: one ``Idempotency-Key`` makes one job, however many requests carry it at once."""

import asyncio
from collections import Counter
from collections.abc import Sequence

import httpx2
import pytest

from tests.faults.cluster import Cluster, Json
from tests.faults.conftest import MakeCluster

LONG = pytest.mark.torture


def post_at_once(cluster: Cluster, body: Json, keys: Sequence[str]) -> list[httpx2.Response]:
    """One request for each key, all of them on their way before the first is answered."""
    limits = httpx2.Limits(max_connections=None)
    headers = cluster.api.http.headers

    async def send() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(
            base_url=cluster.api.url, headers=headers, limits=limits, timeout=120
        ) as http:
            requests = (
                http.post("/jobs", json=body, headers={"Idempotency-Key": key}) for key in keys
            )
            return list(await asyncio.gather(*requests))

    return asyncio.run(send())


def jobs_of(cluster: Cluster, test: str) -> list[str]:
    rows = cluster.query("SELECT id FROM jobs WHERE labels->>'test' = %s", test)
    return [row["id"] for row in rows]


class TestAtOnce:
    @pytest.fixture(scope="class")
    @staticmethod
    def cluster(shared: MakeCluster) -> Cluster:
        """None trains: they would take the machine from those that ask."""
        return shared(workers=0)

    @pytest.mark.parametrize("requests", [200, pytest.param(1000, marks=LONG)])
    def test_many_requests_with_one_key_make_one_job(self, cluster: Cluster, requests: int) -> None:
        test = f"one-{requests}"
        body = cluster.body(steps=1, labels={"test": test})
        answers = post_at_once(cluster, body, [test] * requests)
        assert Counter(answer.status_code for answer in answers) == {202: requests}
        (job_id,) = {answer.json()["id"] for answer in answers}
        assert jobs_of(cluster, test) == [job_id]
        new = [answer for answer in answers if "Idempotent-Replayed" not in answer.headers]
        assert len(new) == 1
        told = cluster.query(
            "SELECT count(*) FROM job_events WHERE type = 'job.queued' AND job_id = %s", job_id
        )
        assert told == [{"count": 1}]

    @pytest.mark.parametrize("keys", [20, pytest.param(200, marks=LONG)])
    def test_each_of_many_keys_that_come_five_times_at_once_makes_one(
        self, cluster: Cluster, keys: int
    ) -> None:
        test = f"many-{keys}"
        body = cluster.body(steps=1, labels={"test": test})
        sent = [f"{test}-{number}" for number in range(keys)] * 5
        answers = post_at_once(cluster, body, sent)
        assert Counter(answer.status_code for answer in answers) == {202: 5 * keys}
        answered = {(key, answer.json()["id"]) for key, answer in zip(sent, answers, strict=True)}
        assert len(answered) == keys
        assert sorted(jobs_of(cluster, test)) == sorted(job_id for _, job_id in answered)
