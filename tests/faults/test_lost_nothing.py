"""A job that was answered with 202 is never lost, whatever becomes of Redis or of the API."""

import secrets
import statistics
import time
from collections.abc import Iterator

import httpx2
import pytest

from app.broker import QUEUE
from app.failpoints import Point
from tests.faults.cluster import Cluster
from tests.faults.conftest import MakeCluster
from tests.faults.failpoints import Failpoints
from tests.faults.procs import is_alive
from tests.faults.summary import count
from tests.faults.whole import make_whole
from tests.system.service import until

POST_SECONDS = 0.5  # a request waits no longer for it, with Redis or without

OFTEN = [3, pytest.param(100, marks=[pytest.mark.torture, pytest.mark.timeout(3600)])]


@pytest.fixture(scope="class")
def cluster(shared: MakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """One machine with two slots, whose wake-ups come from Redis or from its sweeper."""
    return shared(slots=2)


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> Iterator[None]:
    """Of what a test has submitted everything is over once, and nothing is left of it."""
    make_whole(cluster)
    yield
    assert all(row["status"] == "succeeded" for row in cluster.settle())
    until(lambda: not cluster.query("SELECT 1 FROM outbox"), seconds=20)
    cluster.check()


def messages(cluster: Cluster) -> int:
    """Wake-ups that wait in Redis."""
    with cluster.redis.client() as client:
        return int(client.llen(QUEUE))


def unsent(cluster: Cluster) -> int:
    (found,) = cluster.query("SELECT count(*) AS rows FROM outbox")
    return int(found["rows"])


class TestRedis:
    @pytest.mark.parametrize("times", OFTEN)
    def test_emptied_while_jobs_wait_and_run_it_loses_none(
        self, cluster: Cluster, times: int
    ) -> None:
        for _ in range(times):
            job_ids = [cluster.submit(steps=10, step_ms=20) for _ in range(4)]
            cluster.wait(job_ids[0], lambda row: row["step"] >= 1)
            cluster.wipe_redis()
            for job_id in job_ids:
                cluster.finish(job_id)

    @pytest.mark.torture
    def test_emptied_before_anybody_has_taken_a_wake_up_it_loses_none(
        self, cluster: Cluster
    ) -> None:
        (worker,) = cluster.workers
        assert worker.stop() == 0
        job_ids = [cluster.submit(steps=5) for _ in range(6)]
        until(lambda: messages(cluster) == len(job_ids), seconds=20)
        assert not unsent(cluster)
        cluster.wipe_redis()
        assert not messages(cluster)
        worker.start()
        for job_id in job_ids:
            cluster.finish(job_id)

    def test_killed_and_down_for_a_while_it_holds_up_no_running_job(self, cluster: Cluster) -> None:
        running = [cluster.submit(steps=100, step_ms=20) for _ in range(2)]
        for job_id in running:
            cluster.wait(job_id, lambda row: row["step"] >= 1)
        next_one = cluster.submit(steps=5)
        (celery,) = cluster.workers[0].celery()
        cluster.kill("redis")
        for job_id in (*running, next_one):  # a slot takes the next job without being woken
            assert cluster.finish(job_id)["attempt"] == 1
        assert is_alive(celery)
        cluster.redis.start()

    def test_down_it_keeps_nobody_from_submitting(self, cluster: Cluster) -> None:
        cluster.submit(steps=5)
        cluster.settle()
        cluster.kill("redis")
        took = []
        for _ in range(20):
            started = time.monotonic()
            cluster.submit(steps=5)
            took.append(time.monotonic() - started)
        assert statistics.median(took) < POST_SECONDS, took
        assert max(took) < 3, took  # both slots start their trainers meanwhile
        assert unsent(cluster) == 20
        cluster.redis.start()
        cluster.settle()

    @pytest.mark.torture
    def test_full_it_takes_no_wake_up_and_jobs_wait_in_the_outbox(self, cluster: Cluster) -> None:
        long, short = cluster.submit(steps=300, step_ms=20), cluster.submit(steps=50, step_ms=20)
        for job_id in (long, short):
            cluster.wait(job_id, lambda row: row["step"] >= 1)
        queued = cluster.submit(steps=5)
        until(lambda: messages(cluster), seconds=20)
        (celery,) = cluster.workers[0].celery()
        with cluster.redis.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            count("redis full")
            waiting = [cluster.submit(steps=5) for _ in range(5)]
            until(lambda: "used memory > 'maxmemory'" in cluster.api.tail(20_000), seconds=20)
            assert unsent(cluster) == len(waiting)
            # The slot that becomes free takes them without Redis. Then Celery finds the wake-up
            # that was there before, and cannot mark it as taken.
            for job_id in (short, queued, *waiting):
                assert cluster.finish(job_id)["attempt"] == 1
            until(lambda: not messages(cluster), seconds=20)
            late = cluster.submit(steps=5)
            assert cluster.finish(long)["attempt"] == 1
            client.config_set("maxmemory", 0)
        assert cluster.finish(late)["attempt"] == 1
        assert cluster.workers[0].celery() == [celery]


class TestApi:
    @pytest.fixture(scope="class")
    @classmethod
    def failpoints(cls, tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
        return Failpoints(tmp_path_factory.mktemp("points") / "armed")

    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls, shared: MakeCluster, failpoints: Failpoints) -> Cluster:
        """Whose sweeper would come much later than anybody waits for a job here."""
        return shared(environment={**failpoints.environment, "FLATLORA_SWEEP_SECONDS": "300"})

    @pytest.mark.torture
    def test_cut_off_from_redis_it_leaves_its_wake_ups_to_the_workers(
        self, cluster: Cluster
    ) -> None:
        cluster.api.redis.cut()
        for _ in range(3):
            row = cluster.finish(cluster.submit(steps=5), seconds=30)
            # Not only when the API has given up, whose relay is the first to find it.
            assert (row["started_at"] - row["created_at"]).total_seconds() < 3
        cluster.api.redis.pass_through()

    @pytest.mark.parametrize(
        "times", [2, pytest.param(100, marks=[pytest.mark.torture, pytest.mark.timeout(3600)])]
    )
    def test_killed_between_commit_and_publish_it_has_taken_the_job_for_good(
        self, cluster: Cluster, failpoints: Failpoints, times: int
    ) -> None:
        for _ in range(times):
            key, body = secrets.token_hex(8), cluster.body(steps=5)
            failpoints.arm(Point.REQUEST_AFTER_COMMIT)
            with pytest.raises(httpx2.TransportError):
                cluster.post(body, key=key)
            failpoints.wait(Point.REQUEST_AFTER_COMMIT)
            known = "SELECT job_id FROM idempotency_keys WHERE key = %s"
            (row,) = cluster.query(known, key)
            cluster.finish(row["job_id"], seconds=30)  # nobody has asked again, and no API need be
            cluster.api.restart()
            again = cluster.post(body, key=key)
            assert (again.status_code, again.json()["id"]) == (202, row["job_id"])
            assert again.headers["Idempotent-Replayed"] == "true"
        (jobs,) = cluster.query("SELECT count(*) AS number FROM jobs")
        assert jobs["number"] == len(cluster.accepted)
