"""One attempt commits, and a job has one adapter: whoever is woken, how often, and late."""

import json
import pickle
import signal
import time
import uuid
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from app.broker import QUEUE, WAKE, make_celery
from app.failpoints import Point
from app.outbox import send_wake_up
from tests.faults.cluster import SHORT, Cluster
from tests.faults.conftest import MakeCluster
from tests.faults.failpoints import Failpoints
from tests.faults.journal import repeated_steps
from tests.faults.procs import is_alive, send
from tests.faults.summary import count
from tests.faults.whole import assert_clean, assert_no_orphans, hashes, holder_of, make_whole
from tests.system.service import until

LEASE_SECONDS = float(SHORT["FLATLORA_LEASE_SECONDS"])


def starts(cluster: Cluster, job_id: str) -> int:
    """How often a trainer has begun with it."""
    return sum(entry["event"] == "start" for entry in cluster.executions(job_id))


class TestWakeUps:
    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls, shared: MakeCluster) -> Cluster:
        # A lease that also eight trainers at once on a small machine do not outlast.
        return shared(workers=2, slots=4, environment={"FLATLORA_LEASE_SECONDS": "15"})

    @pytest.fixture
    def broker(self, cluster: Cluster) -> Celery:
        return make_celery(cluster.redis.url())

    @pytest.fixture(autouse=True)
    def whole(self, cluster: Cluster) -> Iterator[None]:
        make_whole(cluster)
        celery = [worker.celery() for worker in cluster.workers]
        yield
        assert [worker.celery() for worker in cluster.workers] == celery
        cluster.check()

    @pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.torture), 8])
    def test_sent_fifty_times_to_eight_slots_they_run_each_job_once(
        self, cluster: Cluster, broker: Celery, jobs: int
    ) -> None:
        job_ids = [cluster.submit(steps=10, step_ms=20) for _ in range(jobs)]
        for job_id in job_ids:
            for _ in range(50):
                send_wake_up(broker, job_id)
        count("wake-up sent again")
        for job_id in job_ids:
            row = cluster.finish(job_id)
            assert (row["fence"], row["attempt"]) == (1, 1)
        self._wait_until_taken(cluster)
        assert [starts(cluster, job_id) for job_id in job_ids] == [1] * jobs

    @pytest.mark.torture
    def test_about_a_job_that_is_over_they_do_nothing(
        self, cluster: Cluster, broker: Celery
    ) -> None:
        job_id = cluster.submit(steps=5)
        before = cluster.finish(job_id)
        for _ in range(50):
            send_wake_up(broker, job_id)
        self._wait_until_taken(cluster)
        assert cluster.row(job_id) == before
        assert starts(cluster, job_id) == 1

    def test_forged_they_do_no_harm(self, cluster: Cluster, tmp_path: Path) -> None:
        running = [cluster.submit(steps=150, step_ms=20) for _ in range(8)]
        for job_id in running:
            cluster.wait(job_id, lambda row: row["step"] >= 1)
        canary = tmp_path / "opened"
        with cluster.redis.client() as client:
            for message in [*forged(canary)] * 2:  # for each of the two workers
                client.lpush(QUEUE, message)
                count("message forged")
        self._wait_until_taken(cluster)
        for job_id in (*running, cluster.submit(steps=5)):
            row = cluster.finish(job_id)
            assert (row["attempt"], row["fence"]) == (1, 1)
        assert not canary.exists()

    def _wait_until_taken(self, cluster: Cluster) -> None:
        with cluster.redis.client() as client:
            until(lambda: not client.llen(QUEUE), seconds=30)


class Opened:
    """What makes a file where somebody unpickles it."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._canary,))


def forged(canary: Path) -> Iterator[str]:
    """What somebody may send who has the broker's password."""
    pickled = pickle.dumps(Opened(canary))
    yield envelope(b64encode(pickled).decode(), "application/x-python-serialize")
    yield envelope(b64encode(pickled).decode(), "application/json")
    yield envelope("{}", "application/x-yaml")
    arguments: list[Any] = [
        [], ["job_1", "job_2"], [None], [7], [{"id": "job"}], [["job"]], ["x" * 20_000_000],
        ["job_" + "0" * 32], ["'; DROP TABLE jobs; --"], ["\0"], [canary.as_posix()] * 1000,
    ]  # fmt: skip
    for args in arguments:
        yield envelope(json.dumps([args, {}, {}]))
    yield envelope(json.dumps([[], {"job_id": "job_1"}, {}]))  # a name that it does not take
    yield envelope(json.dumps("neither a list nor a mapping"))
    yield envelope("[[], {}")
    yield envelope(json.dumps([[], {}, {}]), task="os.system")
    yield envelope(json.dumps([[], {}, {}]), task=None)
    yield envelope(json.dumps([[], {}, {}]), eta="2999-01-01T00:00:00")
    yield envelope(json.dumps([[], {}, {}]), eta="tomorrow")
    yield envelope(json.dumps([[], {}, {}]), expires="tomorrow")
    yield envelope(json.dumps([[], {}, {}]), timelimit=[0.1, 0.1])
    yield envelope(json.dumps([[], {}, {}]), timelimit="soon")
    yield envelope(json.dumps([[], {}, {}]), retries="many", group=[], root_id={}, argsrepr=7)
    yield envelope(json.dumps([[], {}, {"callbacks": [{"task": "os.system"}], "chord": 7}]))
    yield envelope(json.dumps([[], {}, 7]))
    yield envelope(json.dumps([7, 7, 7]))


def envelope(body: str, content_type: str = "application/json", **headers: Any) -> str:
    """A message as Kombu lays it into Redis."""
    task_id = str(uuid.uuid4())
    return json.dumps(
        {
            "body": b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": content_type,
            "headers": {"lang": "py", "task": WAKE, "id": task_id, "root_id": task_id, **headers},
            "properties": {
                "correlation_id": task_id,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


class TestMessages:
    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls, shared: MakeCluster) -> Cluster:
        """Nobody is woken but by the messages of these tests, and by those of requeued jobs."""
        return shared(slots=2, environment={"FLATLORA_SWEEP_SECONDS": "300"})

    @pytest.mark.torture
    def test_one_that_sets_a_time_limit_does_not_set_that_of_the_job(
        self, cluster: Cluster
    ) -> None:
        first, second, third = (cluster.submit(steps=100, step_ms=20) for _ in range(3))
        with cluster.redis.client() as client:
            until(lambda: client.llen(QUEUE), seconds=20)
            client.delete(QUEUE)
            wait = "UPDATE jobs SET available_at = %s WHERE id = %s AND status = 'queued'"
            cluster.query(wait, "infinity", third)
            cluster.finish(first)
            cluster.finish(second)
            cluster.query(wait, None, third)
            client.lpush(QUEUE, envelope(json.dumps([[], {}, {}]), timelimit=[0.2, 0.2]))
            count("message forged")
        row = cluster.finish(third)
        assert (row["attempt"], row["fence"]) == (1, 1)
        cluster.check()

    def test_one_that_is_none_may_end_celery_but_no_attempt(self, cluster: Cluster) -> None:
        """Kombu does not outlive it. Jobs are drained, and Celery is started again."""
        running = cluster.submit(steps=150, step_ms=20)
        cluster.wait(running, lambda row: row["step"] >= 12)
        (celery,) = cluster.workers[0].celery()
        with cluster.redis.client() as client:
            client.lpush(QUEUE, "{")
        count("message forged")
        until(lambda: not is_alive(celery), seconds=20)
        row = cluster.finish(running)
        assert (row["attempt"], row["fence"]) == (1, 2)
        assert repeated_steps(cluster.executions(running)) == 0
        cluster.check()


class TestFrozen:
    @pytest.fixture(scope="class")
    @classmethod
    def failpoints(cls, tmp_path_factory: pytest.TempPathFactory) -> Failpoints:
        """Time to be frozen in."""
        return Failpoints(tmp_path_factory.mktemp("points") / "armed", "sleep:2")

    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls, shared: MakeCluster, failpoints: Failpoints) -> Cluster:
        return shared(workers=2, slots=2, environment=failpoints.environment)

    @pytest.fixture(autouse=True)
    def whole(self, cluster: Cluster) -> None:
        make_whole(cluster)

    @pytest.mark.torture
    def test_a_worker_that_wakes_after_three_leases_is_refused(self, cluster: Cluster) -> None:
        job_id = cluster.submit(steps=60, step_ms=20)
        cluster.wait(job_id, lambda row: row["step"] >= 12)
        row = self._outlived(cluster, job_id)
        assert row["attempt"] == 2

    @pytest.mark.parametrize(
        "point",
        [
            Point.PUBLISH_AFTER_MANIFEST,
            pytest.param(Point.PUBLISH_AFTER_BLOBS, marks=pytest.mark.torture),
            pytest.param(Point.END_BEFORE_COMMIT, marks=pytest.mark.torture),
        ],
    )
    @pytest.mark.torture
    def test_so_is_one_that_was_about_to_publish(
        self, cluster: Cluster, failpoints: Failpoints, point: Point
    ) -> None:
        failpoints.arm(point)
        job_id = cluster.submit(steps=20, step_ms=20)
        holder = holder_of(cluster, job_id)
        failpoints.wait(point)
        self._outlived(cluster, job_id, holder)

    def _outlived(self, cluster: Cluster, job_id: str, holder: int | None = None) -> dict[str, Any]:
        """Freeze the worker that has the job until another has finished it, for three leases."""
        holder = holder_of(cluster, job_id) if holder is None else holder
        cluster.freeze(holder)
        frozen_at = time.monotonic()
        done = cluster.finish(job_id)
        until(lambda: time.monotonic() > frozen_at + 3 * LEASE_SECONDS, seconds=60)
        offset = cluster.workers[holder].log.stat().st_size
        cluster.thaw(holder)
        until(lambda: b"lease lost" in cluster.workers[holder].log.read_bytes()[offset:])
        until(lambda: not cluster.workers[holder].trainers(job_id))
        after = cluster.row(job_id)
        assert after == done
        assert hashes(after) == cluster.stored(job_id)
        ends = [event["type"] for event in cluster.events(job_id)].count("job.succeeded")
        assert ends == 1
        assert_clean(cluster, job_id)
        assert_no_orphans(cluster)
        return after

    def test_a_supervisor_that_hangs_alone_finds_that_the_next_attempt_has_ended_its_trainer(
        self, cluster: Cluster
    ) -> None:
        """On its own machine: there the two would write into one folder."""
        job_id = cluster.submit(steps=400, step_ms=20)
        cluster.wait(job_id, lambda row: row["step"] >= 12)
        holder = holder_of(cluster, job_id)
        worker = cluster.workers[holder]
        cluster.freeze(1 - holder)
        (child,), (trainer,) = worker.pool_children(busy=True), worker.trainers(job_id)
        send(child, signal.SIGSTOP)
        count("pool child frozen")
        cluster.wait(job_id, lambda row: row["fence"] == 2, seconds=20)
        until(lambda: not is_alive(trainer), seconds=5)
        until(lambda: starts(cluster, job_id) == 2)
        cluster.thaw(1 - holder)
        send(child, signal.SIGCONT)
        assert cluster.finish(job_id)["attempt"] == 2
        first = [entry for entry in cluster.executions(job_id) if entry["fence"] == 1]
        second = [entry for entry in cluster.executions(job_id) if entry["fence"] == 2]
        assert first[-1]["at"] < second[0]["at"]
        assert first[-1]["at"] - first[0]["at"] > LEASE_SECONDS, "it went on without its supervisor"
        assert_clean(cluster, job_id)
        make_whole(cluster)
        assert is_alive(child)
