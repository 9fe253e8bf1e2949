"""Promise 6: one job's trouble ends that job, with its reason, and no other."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.failpoints import Point
from tests.faults.cluster import SHORT, Cluster
from tests.faults.conftest import MakeCluster
from tests.faults.failpoints import Failpoints
from tests.faults.proxy import Proxy
from tests.faults.summary import count
from tests.s3 import S3Server
from tests.system.service import until

RETRY_SECONDS = float(SHORT["FLATLORA_RETRY_SECONDS"])
LONG = pytest.mark.torture


def failed(cluster: Cluster, job_id: str, reason: str) -> None:
    row = cluster.wait(job_id, lambda row: row["status"] == "failed")
    assert row["reason"] == reason, row["message"]
    assert row["message"]
    assert row["hint"]


class TestInTheTrainer:
    """One slot: whatever happens there, the next job finds it in order."""

    @pytest.fixture(scope="class")
    @staticmethod
    def cluster(shared: MakeCluster) -> Cluster:
        return shared(environment={"FLATLORA_STALL_SECONDS": "1.5"})

    @pytest.mark.parametrize(
        ("label", "reason"), [("full_at", "disk_full"), ("memory_at", "gpu_out_of_memory")]
    )
    @pytest.mark.torture
    def test_what_would_come_again_fails_at_once(
        self, cluster: Cluster, label: str, reason: str
    ) -> None:
        job_id, next_id = cluster.submit(labels={label: "7"}), cluster.submit()
        failed(cluster, job_id, reason)
        assert cluster.row(job_id)["attempt"] == 1
        assert cluster.finish(next_id)["attempt"] == 1
        cluster.check()

    @pytest.mark.parametrize("label", ["crash_at", "stall_at"])
    @pytest.mark.torture
    def test_what_may_pass_is_tried_again(self, cluster: Cluster, label: str) -> None:
        job_id, next_id = cluster.submit(labels={label: "12 first"}), cluster.submit()
        assert cluster.finish(job_id)["attempt"] == 2
        (resumed,) = [log for log in cluster.executions(job_id) if log["event"] == "resume"]
        assert resumed["step"] == 10
        assert cluster.finish(next_id)["attempt"] == 1
        cluster.check()

    @LONG
    @pytest.mark.torture
    def test_one_that_always_hangs_is_given_up(self, cluster: Cluster) -> None:
        job_id = cluster.submit(labels={"stall_at": "12"})
        failed(cluster, job_id, "worker_lost")
        assert cluster.row(job_id)["attempt"] == 3
        cluster.check()


class TestPoison:
    def test_a_job_that_always_crashes_is_given_up_and_its_neighbours_go_on(
        self, make_cluster: MakeCluster
    ) -> None:
        cluster = make_cluster(slots=2)
        before = cluster.workers[0].pool_children()
        poison = cluster.submit(labels={"crash_at": "7"})
        neighbours = [cluster.submit() for _ in range(10)]
        failed(cluster, poison, "worker_lost")
        row = cluster.row(poison)
        assert row["attempt"] == 3
        assert "SIGSEGV" in row["message"]
        for job_id in neighbours:
            assert cluster.finish(job_id)["attempt"] == 1
        first, second, third = (
            log["at"] for log in cluster.executions(poison) if log["event"] == "start"
        )
        assert second - first > 0.8 * RETRY_SECONDS
        assert third - second > 0.8 * 2 * RETRY_SECONDS
        assert cluster.workers[0].pool_children() == before
        cluster.check()


class TestFullDisk:
    """Of a worker, in the trainer or beside it: each write that meets it ends its own job alone."""

    POINTS = (Point.CHECKPOINT_FILES_WRITTEN, Point.INPUTS_BEFORE_PIN, Point.PUBLISH_AFTER_BLOBS)

    def test_it_is_told_wherever_it_is_met(self, make_cluster: MakeCluster, tmp_path: Path) -> None:
        points = Failpoints(tmp_path / "points", "full")
        cluster = make_cluster(environment=points.environment)
        for point in self.POINTS:
            points.arm(point)
            failed(cluster, cluster.submit(), "disk_full")
            assert points.has_fired(point)
            count("disk full")
            assert cluster.finish(cluster.submit())["attempt"] == 1
        cluster.check()


class TestStore:
    """S3, behind a proxy."""

    @pytest.fixture
    @staticmethod
    def proxy(s3_server: S3Server) -> Iterator[Proxy]:
        with Proxy("127.0.0.1", s3_server.port, name="store") as proxy:
            yield proxy

    @pytest.fixture
    @staticmethod
    def cluster(make_cluster: MakeCluster, s3_server: S3Server, proxy: Proxy) -> Cluster:
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        environment = {**s3_server.environment, **endpoint}
        return make_cluster(environment=environment, store_url=s3_server.url("faults"))

    def test_one_that_is_away_while_a_job_publishes_makes_it_wait(
        self, cluster: Cluster, proxy: Proxy
    ) -> None:
        earlier = cluster.submit(steps=5)
        cluster.finish(earlier)
        job_id = cluster.submit(steps=120, step_ms=20)
        cluster.wait(job_id, lambda row: row["step"] >= 12)
        with away(proxy):
            cluster.wait(job_id, lambda row: row["phase"] == "publishing")
            answer = cluster.api.http.get(f"/jobs/{earlier}/adapter")
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            time.sleep(2)
            assert cluster.row(job_id)["phase"] == "publishing"
        assert cluster.finish(job_id)["attempt"] == 1
        assert cluster.api.http.get(f"/jobs/{earlier}/adapter").status_code == 200
        cluster.check()

    @pytest.mark.torture
    def test_one_that_is_away_when_a_job_begins_makes_it_wait(
        self, cluster: Cluster, proxy: Proxy
    ) -> None:
        with away(proxy):
            job_id = cluster.submit()
            until(lambda: cluster.row(job_id)["phase"] == "fetching")
            time.sleep(2)
            assert cluster.row(job_id)["phase"] == "fetching"
        assert cluster.finish(job_id)["attempt"] == 1
        cluster.check()


@contextmanager
def away(proxy: Proxy) -> Iterator[None]:
    proxy.cut()
    try:
        yield
    finally:
        proxy.pass_through()
