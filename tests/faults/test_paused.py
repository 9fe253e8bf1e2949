"""A pause gives the slot free whatever happens meanwhile, and the job goes on to the same bytes."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from app.failpoints import Point
from tests.faults.cluster import Cluster, Row
from tests.faults.conftest import MakeCluster
from tests.faults.failpoints import Failpoints
from tests.faults.journal import repeated_steps
from tests.faults.summary import count
from tests.faults.whole import assert_clean, assert_no_orphans, holder_of, make_whole
from tests.system.service import TERMINAL, until

JOB: dict[str, Any] = {"steps": 100, "step_ms": 20, "checkpoint_steps": 20}


class Stage:
    """Two machines with a slot each."""

    def __init__(self, cluster: Cluster, failpoints: Failpoints) -> None:
        self.cluster = cluster
        self.failpoints = failpoints

    def ask(self, job_id: str, what: Any) -> int:
        response = self.cluster.ask(job_id, what)
        assert response.status_code in {202, 409}, response.text
        count(f"job asked to {what}")
        return response.status_code

    def training(self, **more: Any) -> str:
        job_id = self.cluster.submit(**{**JOB, **more})
        self.cluster.wait(job_id, lambda row: row["step"] >= 25)
        return job_id

    def paused(self, job_id: str) -> Row:
        row = self.cluster.wait(job_id, lambda row: row["status"] == "paused", seconds=30)
        assert (row["worker"], row["lease_until"], row["finished_at"]) == (None, None, None)
        assert not any(worker.trainers(job_id) for worker in self.cluster.workers)
        return row

    def finish(self, job_id: str) -> Row:
        """Resume it; the rules of the journal compare its adapter with an unbroken run's."""
        assert self.ask(job_id, "resume") == 202
        row = self.cluster.finish(job_id)
        assert_clean(self.cluster, job_id)
        return row


@pytest.fixture(scope="module")
def stage(shared_by_all: MakeCluster, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    failpoints = Failpoints(tmp_path_factory.mktemp("points") / "armed")
    # A worker whose database is slow for a moment must not lose its job for it.
    environment = {**failpoints.environment, "FLATLORA_LEASE_SECONDS": "6"}
    return Stage(shared_by_all(workers=2, environment=environment), failpoints)


@pytest.fixture(autouse=True)
def whole(stage: Stage) -> Iterator[None]:
    make_whole(stage.cluster)
    yield
    make_whole(stage.cluster)
    assert_no_orphans(stage.cluster)


def test_it_goes_on_from_where_it_was_also_on_another_machine(stage: Stage) -> None:
    job_id = stage.training(steps=200)  # it must not be over before it has heard
    first = stage.cluster.workers[holder_of(stage.cluster, job_id)]
    stage.ask(job_id, "pause")
    row = stage.paused(job_id)
    assert row["attempt"] == 0
    assert row["checkpoint"]["step"] == row["step"] >= 25, "its last one is in the store"
    assert first.stop() == 0
    assert stage.finish(job_id)["attempt"] == 1
    assert repeated_steps(stage.cluster.executions(job_id)) == 0
    lines = stage.cluster.query("SELECT seq FROM job_logs WHERE job_id = %s ORDER BY seq", job_id)
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.parametrize(
    "what",
    [
        "pool child",
        *(pytest.param(what, marks=pytest.mark.torture) for what in ("trainer", "worker parent")),
    ],
)
def test_whatever_dies_meanwhile_it_is_paused(stage: Stage, what: Any) -> None:
    job_id = stage.training(steps=160, labels={"deaf": "1"})  # so that it dies of nothing else
    worker = holder_of(stage.cluster, job_id)
    stage.ask(job_id, "pause")
    stage.cluster.kill(what, worker=worker, job_id=job_id)
    row = stage.paused(job_id)
    assert row["fence"] == 1
    assert stage.finish(job_id)["fence"] == 2


@pytest.mark.torture
def test_who_writes_that_it_is_paused_may_die_of_it(stage: Stage) -> None:
    for point in (Point.REQUEUE_BEFORE_COMMIT, Point.REQUEUE_AFTER_COMMIT):
        job_id = stage.training()
        stage.failpoints.arm(point)
        stage.ask(job_id, "pause")
        stage.failpoints.wait(point)
        assert stage.paused(job_id)["fence"] == 1
        stage.finish(job_id)


@pytest.mark.torture
def test_a_worker_that_drains_leaves_it_paused(stage: Stage) -> None:
    job_id = stage.training()
    worker = stage.cluster.workers[holder_of(stage.cluster, job_id)]
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(worker.stop)
        stage.ask(job_id, "pause")
        assert stopping.result() == 0
    count("worker drained")
    row = stage.cluster.wait(job_id, lambda row: row["status"] in {"paused", "queued", "running"})
    if row["status"] != "paused":  # it had been put back before it was asked
        stage.ask(job_id, "pause")
    stage.paused(job_id)
    stage.finish(job_id)


@pytest.mark.parametrize(
    "seed",
    [0, *(pytest.param(seed, marks=pytest.mark.torture) for seed in range(1, 50))],
)
def test_at_any_time_and_again_and_again_it_ends_as_if_nothing_had_been(
    stage: Stage, seed: int
) -> None:
    chance = random.Random(seed)
    job_id = stage.cluster.submit(**JOB)
    for _ in range(3):
        time.sleep(chance.uniform(0, 1.5))
        if stage.ask(job_id, "pause") == 409:  # over
            break
        until(lambda: stage.cluster.row(job_id)["status"] in {"paused", *TERMINAL}, seconds=30)
        if stage.ask(job_id, "resume") == 409:
            break
    row = stage.cluster.finish(job_id)
    assert row["attempt"] == 1
    assert_clean(stage.cluster, job_id)
