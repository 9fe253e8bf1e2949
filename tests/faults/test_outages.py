"""Promise 5: an outage of the database or of the broker loses nothing, and fails no job."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.cluster import Cluster
from tests.faults.conftest import MakeCluster
from tests.faults.nodes import Node
from tests.system.service import until

PATIENT = {"FLATLORA_LEASE_SECONDS": "20", "FLATLORA_HEARTBEAT_SECONDS": "1"}
HALF_A_LEASE = 10.0  # as are 30 s of 60; as much is left for the way back on a busy machine
FIVE_LEASES = 15.0  # as are 5 minutes; of the 3 s that clusters of tests have

NETWORK = ("cut", "stall", "half_open")
LONG = pytest.mark.torture


@contextmanager
def no_postgres(cluster: Cluster, how: str) -> Iterator[None]:
    if how == "stopped":
        cluster.stop_postgres()
    else:
        cluster.kill("postgres")
    try:
        yield
    finally:
        cluster.postgres.start()


@contextmanager
def network_faults(nodes: list[Node]) -> Iterator[None]:
    """Another one for each, between it and Postgres."""
    for node, fault in zip(nodes, NETWORK, strict=True):
        getattr(node.postgres, fault)()
    try:
        yield
    finally:
        for node in nodes:
            node.postgres.pass_through()


def requeued(cluster: Cluster, job_id: str) -> list[str]:
    events = cluster.query("SELECT type, message FROM job_events WHERE job_id = %s", job_id)
    return [event["message"] for event in events if event["type"] == "job.requeued"]


def done(cluster: Cluster, job_id: str) -> int:
    return sum(entry["event"] == "step" for entry in cluster.executions(job_id))


def pids(cluster: Cluster) -> list[int]:
    """Of all that is no trainer."""
    found = [node.pid for node in cluster.nodes]
    for worker in cluster.workers:
        found += [*worker.celery(), *worker.pool_children()]
    return sorted(found)


class TestHalfALease:
    @pytest.fixture(scope="class")
    @staticmethod
    def cluster(shared: MakeCluster) -> Cluster:
        return shared(workers=3, environment=PATIENT)

    @pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=LONG)])
    def test_without_postgres_no_job_is_restarted(self, cluster: Cluster, how: str) -> None:
        job_ids = self._running(cluster)
        with no_postgres(cluster, how):
            self._go_on(cluster, job_ids)
        self._finish_unbroken(cluster, job_ids)

    @pytest.mark.torture
    def test_without_a_network_no_job_is_restarted(self, cluster: Cluster) -> None:
        job_ids = self._running(cluster)
        with network_faults([*cluster.workers]):
            self._go_on(cluster, job_ids)
        self._finish_unbroken(cluster, job_ids)

    def _running(self, cluster: Cluster) -> list[str]:
        job_ids = [cluster.submit(steps=330, step_ms=40) for _ in cluster.workers]
        for job_id in job_ids:
            cluster.wait(job_id, lambda row: row["step"] >= 6)
        return job_ids

    def _go_on(self, cluster: Cluster, job_ids: list[str]) -> None:
        before = [done(cluster, job_id) for job_id in job_ids]
        time.sleep(HALF_A_LEASE)
        after = [done(cluster, job_id) for job_id in job_ids]
        assert all(now > then + 20 for then, now in zip(before, after, strict=True))

    def _finish_unbroken(self, cluster: Cluster, job_ids: list[str]) -> None:
        for job_id in job_ids:
            row = cluster.finish(job_id)
            assert (row["attempt"], row["fence"]) == (1, 1), requeued(cluster, job_id)
        cluster.check()


COMMITS = {
    "claim": "job.running",
    "end": "job.succeeded",
    "requeue": "job.requeued",
    "checkpoint": "job.checkpoint",
}
"""Transactions of a worker, each with the event that it writes."""


class TestOneMachine:
    """One cluster for all: each test finds it as good as new, or the one before has failed."""

    @pytest.fixture(scope="class")
    @staticmethod
    def cluster(shared: MakeCluster) -> Cluster:
        return shared()

    @pytest.mark.parametrize("how", ["stopped", pytest.param("killed", marks=LONG)])
    @pytest.mark.torture
    def test_without_postgres_for_five_leases_jobs_write_a_checkpoint_and_go_on_afterwards(
        self, cluster: Cluster, how: str
    ) -> None:
        running, queued = self._submit(cluster)
        before = pids(cluster)
        with no_postgres(cluster, how):
            over = time.monotonic() + FIVE_LEASES
            self._is_told_at_once(cluster)
            until(lambda: not any(worker.trainers() for worker in cluster.workers), seconds=10)
            time.sleep(over - time.monotonic())
        self._has_lost_nothing(cluster, [*running, queued])
        assert pids(cluster) == before
        ends = [entry["how"] for entry in cluster.executions() if entry["event"] == "end"]
        assert ends.count("drain") >= len(running)

    @LONG
    def test_without_a_network_for_five_leases_jobs_go_on_afterwards(
        self, make_cluster: MakeCluster
    ) -> None:
        cluster = make_cluster(workers=3)
        running, queued = self._submit(cluster)
        before = pids(cluster)
        with network_faults([*cluster.workers]):
            time.sleep(FIVE_LEASES)
        self._has_lost_nothing(cluster, [*running, queued])
        assert pids(cluster) == before

    def _submit(self, cluster: Cluster) -> tuple[list[str], str]:
        running = [cluster.submit(steps=150, step_ms=40) for _ in cluster.workers]
        for job_id in running:
            cluster.wait(job_id, lambda row: row["step"] >= 6)
        return running, cluster.submit(steps=5)

    def _is_told_at_once(self, cluster: Cluster) -> None:
        """Each request is answered, and says what is wrong."""
        for _ in range(3):
            started = time.monotonic()
            answer = cluster.post(cluster.body())
            assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
            assert time.monotonic() - started < 2

    def _has_lost_nothing(self, cluster: Cluster, job_ids: list[str]) -> None:
        for job_id in job_ids:
            assert cluster.finish(job_id)["attempt"] == 1, requeued(cluster, job_id)
        assert cluster.submit(steps=1)
        cluster.settle()
        cluster.check()

    @pytest.mark.parametrize("what", COMMITS)
    @pytest.mark.parametrize("times", [1, pytest.param(25, marks=LONG)])
    def test_a_commit_whose_answer_is_lost_is_neither_lost_nor_done_twice(
        self, cluster: Cluster, what: str, times: int
    ) -> None:
        proxy = cluster.workers[0].postgres
        for _ in range(times):
            before = proxy.faults
            proxy.cut_after(COMMITS[what].encode(), b"COMMIT")
            crashes = what == "requeue"
            labels = {"crash_at": "7 first"} if crashes else {}
            row = cluster.finish(job_id := cluster.submit(steps=8, labels=labels))
            assert proxy.faults == before + 1
            assert row["attempt"] == 1 + crashes, requeued(cluster, job_id)
        cluster.check()

    @pytest.mark.parametrize("times", [5, pytest.param(100, marks=LONG)])
    def test_a_request_whose_answer_is_lost_gets_the_same_job_when_it_is_repeated(
        self, cluster: Cluster, times: int
    ) -> None:
        proxy = cluster.api.postgres
        for number in range(times):
            key = f"key-{times}-{number}"
            body = cluster.body(steps=1, labels={"key": key})
            proxy.cut_after(key.encode(), b"COMMIT")
            answer = cluster.post(body, key=key)
            assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
            answer = cluster.post(body, key=key)
            assert answer.status_code == 202
            assert answer.headers["Idempotent-Replayed"] == "true"
            found = cluster.query("SELECT id FROM jobs WHERE labels->>'key' = %s", key)
            assert found == [{"id": answer.json()["id"]}]
        cluster.settle()
        cluster.check()

    @pytest.mark.torture
    def test_jobs_go_on_over_a_slow_network_to_postgres(self, cluster: Cluster) -> None:
        for proxy in cluster.proxies("postgres"):
            proxy.slow(48_000)
        job_ids = [cluster.submit(steps=30, step_ms=30) for _ in range(2)]
        for job_id in job_ids:
            row = cluster.finish(job_id)
            assert (row["attempt"], row["fence"]) == (1, 1), requeued(cluster, job_id)
        for proxy in cluster.proxies("postgres"):
            proxy.pass_through()
        cluster.check()

    @pytest.mark.parametrize("fault", ["stall", pytest.param("half_open", marks=LONG)])
    @pytest.mark.torture
    def test_jobs_that_came_while_redis_was_silent_are_consumed_afterwards(
        self, cluster: Cluster, fault: str
    ) -> None:
        for proxy in cluster.proxies("redis"):
            getattr(proxy, fault)()
        job_ids = [cluster.submit(steps=1) for _ in range(3)]
        time.sleep(3)
        assert all(cluster.row(job_id)["status"] == "queued" for job_id in job_ids)
        for proxy in cluster.proxies("redis"):
            proxy.pass_through()
        for job_id in job_ids:
            cluster.finish(job_id, seconds=25)
        cluster.check()

    @pytest.mark.parametrize("word", [b"BRPOP", pytest.param(b"ZREM", marks=LONG)])
    def test_a_wake_up_whose_taking_is_cut_off_stops_no_consumer(
        self, cluster: Cluster, word: bytes
    ) -> None:
        """Where wake-ups are acknowledged, with ZREM, a lost acknowledgement does."""
        cluster.workers[0].redis.cut_after(word)
        cluster.finish(cluster.submit(steps=1), seconds=20)
        cluster.finish(cluster.submit(steps=1), seconds=10)
        cluster.workers[0].redis.pass_through()
        cluster.check()

    @pytest.mark.torture
    def test_a_connection_to_redis_that_breaks_twenty_times_in_a_row_is_made_again(
        self, cluster: Cluster
    ) -> None:
        proxy, before = cluster.workers[0].redis, pids(cluster)
        for number in range(20):
            until(lambda: proxy.connections, seconds=20)
            cluster.submit(steps=1)
            time.sleep(number / 200)  # now before its wake-up is taken, now after
            proxy.cut()
            proxy.pass_through()
        cluster.settle(seconds=30)
        assert pids(cluster) == before
        cluster.check()


class TestSilence:
    """A connection that stays open and on which nothing comes is an outage too."""

    @LONG
    @pytest.mark.parametrize("fault", ["stall", pytest.param("half_open", marks=LONG)])
    def test_a_request_does_not_hang_on_it(self, cluster: Cluster, fault: str) -> None:
        key = f"silence-{fault}"
        cluster.post(cluster.body(steps=1), key=key)
        getattr(cluster.api.postgres, fault)()
        started = time.monotonic()
        answer = cluster.post(cluster.body(steps=1), key=key)
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert time.monotonic() - started < 20
        cluster.api.postgres.pass_through()
        assert cluster.post(cluster.body(steps=1), key=key).status_code == 202
        assert len(cluster.settle()) == len(cluster.accepted)
        cluster.check()

    @pytest.mark.torture
    def test_the_row_of_a_machine_that_froze_in_a_transaction_is_not_locked_for_ever(
        self, make_cluster: MakeCluster, tmp_path: Path
    ) -> None:
        once = tmp_path / "once"
        point = f"heartbeat.before_commit=sleep:600@{once}"
        cluster = make_cluster(workers=2, environment={"FLATLORA_FAILPOINTS": point})
        job_id = cluster.submit(steps=50)
        until(once.exists)
        (frozen,) = [
            index for index, worker in enumerate(cluster.workers) if worker.trainers(job_id)
        ]
        cluster.freeze(frozen)
        row = cluster.finish(job_id, seconds=30)
        assert (row["attempt"], row["fence"]) == (2, 2)
        cluster.check()
