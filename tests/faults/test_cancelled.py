"""Cancelling is acknowledged at once, whatever the job is doing, and ends it once and soon."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from app.failpoints import Point
from tests.faults.cluster import SHORT, Cluster, Row
from tests.faults.conftest import MakeCluster
from tests.faults.failpoints import Failpoints
from tests.faults.summary import count
from tests.faults.whole import assert_clean, assert_no_orphans, make_whole
from tests.system.service import TERMINAL, until

ACKNOWLEDGED_SECONDS = 2.0  # less than the grace
HEARD_SECONDS = 2.0  # after the step that is under way
GRACE_SECONDS = float(SHORT["FLATLORA_CANCEL_GRACE_SECONDS"])
STEP_SECONDS = 0.02
JOB: dict[str, Any] = {"steps": 100, "step_ms": 1000 * STEP_SECONDS}


@dataclass
class Stage:
    cluster: Cluster
    failpoints: Failpoints

    def cancel(self, job_id: str) -> httpx2.Response:
        """Acknowledged at once, or too late."""
        started = time.monotonic()
        response = self.cluster.cancel(job_id)
        took = time.monotonic() - started
        assert response.status_code in {202, 409}, response.text
        if response.status_code == 202:
            assert response.json()["status"] in {"cancelling", "cancelled"}
        assert took < ACKNOWLEDGED_SECONDS
        count("job cancelled")
        return response

    def ended(self, job_id: str, *, seconds: float = 30) -> Row:
        row = self.cluster.wait(job_id, lambda row: row["status"] in TERMINAL, seconds=seconds)
        assert_clean(self.cluster, job_id)
        return row

    def training(self, **more: Any) -> str:
        job_id = self.cluster.submit(**{**JOB, **more})
        self.cluster.wait(job_id, lambda row: row["step"] >= 1)
        return job_id


@pytest.fixture(scope="module")
def stage(shared_by_all: MakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """One slot, and a job whose trainer has died waits for long."""
    failpoints = Failpoints(tmp_path_factory.mktemp("points") / "armed", "sleep:1")
    # A worker whose database is slow for a moment must not lose its job for it.
    more = {"FLATLORA_RETRY_SECONDS": "60", "FLATLORA_LEASE_SECONDS": "6"}
    return Stage(shared_by_all(environment={**failpoints.environment, **more}), failpoints)


@pytest.fixture(autouse=True)
def whole(stage: Stage) -> Iterator[None]:
    make_whole(stage.cluster)
    yield
    assert not any(worker.trainers() for worker in stage.cluster.workers)
    make_whole(stage.cluster)
    assert_no_orphans(stage.cluster)


class TestAtAnyTime:
    @pytest.fixture(scope="class")
    @classmethod
    def seconds(cls, stage: Stage) -> float:
        """Of an undisturbed job, from its submission to its end."""
        started = time.monotonic()
        stage.cluster.finish(stage.cluster.submit(**JOB))
        return time.monotonic() - started

    @pytest.mark.parametrize(
        "seed",
        [0, *(pytest.param(seed, marks=pytest.mark.torture) for seed in range(1, 56))],
    )
    def test_it_ends_once_and_soon(self, stage: Stage, seconds: float, seed: int) -> None:
        moment = (seed % 6 + random.Random(seed).random()) / 6  # of the job's life
        told = f"cancelled at {moment:.3f} of {seconds:.1f} s (seed {seed})"
        job_id = stage.cluster.submit(**JOB)
        time.sleep(moment * seconds)
        response, cancelled_at = stage.cancel(job_id), time.time()
        row = stage.ended(job_id)
        if response.status_code == 409:
            assert row["status"] == "succeeded", told
            return
        assert row["status"] in {"cancelled", "succeeded"}, told
        took = row["finished_at"].timestamp() - cancelled_at
        assert took < HEARD_SECONDS + STEP_SECONDS, f"after {took:.2f} s: {told}"
        until(lambda: not stage.cluster.workers[0].trainers(job_id), seconds=GRACE_SECONDS)


class TestWhile:
    def test_it_waits_it_is_over_at_once_and_never_runs(self, stage: Stage) -> None:
        running = stage.training(steps=1000)
        waiting = stage.cluster.submit(**JOB)
        assert stage.cancel(waiting).json()["status"] == "cancelled"
        stage.cancel(running)
        stage.ended(running)
        next_one = stage.cluster.submit(steps=1)
        stage.cluster.finish(next_one)
        assert stage.ended(waiting)["fence"] == 0
        assert not stage.cluster.executions(waiting)

    @pytest.mark.torture
    def test_its_inputs_are_fetched_it_does_not_train(self, stage: Stage) -> None:
        stage.failpoints.arm(Point.INPUTS_AFTER_PIN)
        job_id = stage.cluster.submit(**JOB)
        stage.failpoints.wait(Point.INPUTS_AFTER_PIN)
        stage.cancel(job_id)
        assert stage.ended(job_id)["status"] == "cancelled"
        assert not stage.cluster.executions(job_id)

    @pytest.mark.torture
    def test_its_adapter_is_published_it_came_too_late(self, stage: Stage) -> None:
        stage.failpoints.arm(Point.PUBLISH_AFTER_BLOBS)
        job_id = stage.cluster.submit(**JOB)
        stage.failpoints.wait(Point.PUBLISH_AFTER_BLOBS)
        assert stage.cancel(job_id).json()["status"] == "cancelling"
        assert stage.ended(job_id)["status"] == "succeeded"
        assert stage.cluster.api.http.get(f"/jobs/{job_id}/adapter").status_code == 200

    def test_its_trainer_listens_to_nobody_that_is_killed(self, stage: Stage) -> None:
        job_id = stage.training(steps=1000, labels={"deaf": "1"})
        cancelled_at = time.time()
        stage.cancel(job_id)
        row = stage.ended(job_id)
        assert row["status"] == "cancelled"
        took = row["finished_at"].timestamp() - cancelled_at
        assert GRACE_SECONDS < took < GRACE_SECONDS + 6

    @pytest.mark.torture
    def test_it_pauses_after_a_death_it_is_over_at_once(self, stage: Stage) -> None:
        job_id = stage.training()
        stage.cluster.kill("trainer", job_id=job_id)
        stage.cluster.wait(job_id, lambda row: row["status"] == "queued")
        assert stage.cancel(job_id).json()["status"] == "cancelled"
        assert stage.ended(job_id)["fence"] == 1

    @pytest.mark.torture
    def test_it_waits_for_another_worker_it_is_over_at_once(self, stage: Stage) -> None:
        (worker,) = stage.cluster.workers
        job_id = stage.training()
        assert worker.stop() == 0
        count("worker drained")
        assert stage.cluster.row(job_id)["checkpoint"] is not None
        assert stage.cancel(job_id).json()["status"] == "cancelled"
        worker.start()
        stage.cluster.finish(stage.cluster.submit(steps=1))
        assert stage.ended(job_id)["fence"] == 1

    @pytest.mark.torture
    def test_its_worker_drains_it_is_cancelled_and_not_handed_over(self, stage: Stage) -> None:
        (worker,) = stage.cluster.workers
        job_id = stage.training(steps=20, step_ms=1000)
        told_at = worker.log.stat().st_size
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(worker.stop)
            until(lambda: b"Warm shutdown" in worker.log.read_bytes()[told_at:])
            assert stage.cancel(job_id).json()["status"] == "cancelling"
            assert stopping.result() == 0
        count("worker drained")
        assert stage.ended(job_id)["status"] == "cancelled"

    def test_its_worker_is_dead_the_next_one_ends_it(self, stage: Stage) -> None:
        (worker,) = stage.cluster.workers
        job_id = stage.training()
        worker.kill()
        assert stage.cancel(job_id).json()["status"] == "cancelling"
        worker.start()
        row = stage.ended(job_id, seconds=20)
        assert (row["status"], row["fence"]) == ("cancelled", 1)


class TestStorm:
    @pytest.mark.parametrize(
        "state", [pytest.param("queued", marks=pytest.mark.torture), "running"]
    )
    def test_a_hundred_at_once_are_one(self, stage: Stage, state: str) -> None:
        ahead = stage.training(steps=200)
        job_id = stage.cluster.submit(**JOB) if state == "queued" else ahead
        with ThreadPoolExecutor(100) as pool:
            responses = list(pool.map(stage.cluster.cancel, [job_id] * 100))
        count("job cancelled")
        assert {response.status_code for response in responses} <= {202, 409}
        assert stage.ended(job_id)["status"] == "cancelled"
        types = Counter(event["type"] for event in stage.cluster.events(job_id))
        assert types["job.cancelled"] == 1
        assert types["job.cancelling"] == (1 if state == "running" else 0)
        if state == "queued":
            stage.cancel(ahead)
            stage.ended(ahead)
