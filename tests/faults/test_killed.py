"""Whoever is killed or told to stop: the job goes on to the same adapter, and nobody is left."""

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.faults.cluster import Cluster, Row
from tests.faults.conftest import MakeCluster
from tests.faults.journal import repeated_steps
from tests.faults.procs import descendants, end, is_alive, send
from tests.faults.summary import count
from tests.faults.whole import assert_clean, assert_no_orphans, hashes, holder_of, make_whole
from tests.system.service import example_job, until

LEASE_SECONDS = 6.0
BOUND = 1.25 * (LEASE_SECONDS + LEASE_SECONDS / 6) + 4  # 75 s and these with a lease of a minute
ORPHAN_SECONDS = 10
REAL_JOB = example_job(
    labels={"real": "1"},
    training={"max_steps": 20, "batch_size": 4, "checkpoint_steps": 5},
    evaluation={"max_rows": 4, "every_steps": 10},
)
JOB: dict[str, Any] = {"steps": 100, "checkpoint_steps": 5, "step_ms": 20}

VICTIMS = [
    "trainer", "worker parent",
    *(
        pytest.param(what, marks=pytest.mark.torture)
        for what in ("pool child", "celery main", "worker parent, restarted")
    ),
]  # fmt: skip
UNCOUNTED = ("The service was restarted", "The worker stops", "The worker could not reach")
"""How the service says that it goes on without counting an attempt."""


@dataclass
class Unbroken:
    files: dict[str, str]
    seconds: float


@pytest.fixture(scope="module")
def cluster(shared_by_all: MakeCluster) -> Cluster:
    return shared_by_all(workers=2, environment={"FLATLORA_LEASE_SECONDS": f"{LEASE_SECONDS}"})


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster) -> Unbroken:
    """The same job, undisturbed."""
    started = time.monotonic()
    row = cluster.finish(cluster.submit(**JOB))
    return Unbroken(hashes(row), time.monotonic() - started)


class TestKilled:
    @pytest.fixture(autouse=True)
    def whole(self, cluster: Cluster) -> Iterator[None]:
        make_whole(cluster)
        yield
        make_whole(cluster)

    @pytest.mark.parametrize("what", VICTIMS)
    @pytest.mark.parametrize(
        "seed",
        [1, *(pytest.param(seed, marks=pytest.mark.torture) for seed in range(2, 21))],
    )
    def test_at_a_random_moment_the_job_ends_as_if_nobody_had_been(
        self, cluster: Cluster, unbroken: Unbroken, what: str, seed: int
    ) -> None:
        moment = random.Random(f"{what} {seed}").uniform(0, 0.95)  # of the job's life
        job_id = cluster.submit(**JOB)
        time.sleep(moment * unbroken.seconds)
        killed_at = kill(cluster, job_id, what)
        row = cluster.finish(job_id)
        told = f"{what} killed at {moment:.3f} of {unbroken.seconds:.1f} s (seed {seed})"
        assert hashes(row) == unbroken.files, told
        assert_clean(cluster, job_id)
        assert_back_in_time(cluster, job_id, what, killed_at, told)
        assert_counted(cluster, row, what, told)
        assert_no_orphans(cluster, seconds=max(0.5, killed_at + ORPHAN_SECONDS - time.time()))


def kill(cluster: Cluster, job_id: str, what: str) -> float:
    """When it was done. What the victim has started is gone soon after."""
    victims = find(cluster, job_id, what)
    dependants = [process.pid for victim in victims for process in descendants(victim)]
    killed_at = time.time()
    end(victims)
    count(f"{what.partition(',')[0]} killed")
    until(lambda: not any(map(is_alive, dependants)), seconds=ORPHAN_SECONDS)
    for worker in cluster.workers:
        if what.endswith("restarted") and not worker.is_running:
            worker.start()
    return killed_at


def find(cluster: Cluster, job_id: str, what: str) -> list[int]:
    """Of the worker that has the job, or of any where none has; no trainer of one that is over."""
    worker = cluster.workers[where(cluster, job_id) or 0]
    match what:
        case "trainer":
            found: list[int] = []

            def look() -> bool:
                found.extend(pid for node in cluster.workers for pid in node.trainers(job_id))
                return bool(found) or cluster.row(job_id)["status"] == "succeeded"

            until(look, every=0.005)
            return found
        case "pool child":
            return worker.pool_children()
        case "celery main":
            return worker.celery()
    return [worker.pid]


def where(cluster: Cluster, job_id: str) -> int | None:
    slot = cluster.row(job_id)["worker"]
    names = [(node.data_dir / "slots" / "0.lock").read_text().strip() for node in cluster.workers]
    return names.index(slot) if slot in names else None


def assert_back_in_time(
    cluster: Cluster, job_id: str, what: str, killed_at: float, told: str
) -> None:
    requeued = [event for event in raw_events(cluster, job_id) if event["type"] == "job.requeued"]
    if not requeued:  # it was not held yet, or no more
        return
    took = requeued[0]["at"].timestamp() - killed_at
    is_quick = what in {"trainer", "pool child"}  # the slot's own processes put it back
    assert took < (LEASE_SECONDS if is_quick else BOUND), f"back after {took:.2f} s: {told}"


def raw_events(cluster: Cluster, job_id: str) -> list[Row]:
    return cluster.query("SELECT * FROM job_events WHERE job_id = %s ORDER BY seq", job_id)


def assert_counted(cluster: Cluster, row: Row, what: str, told: str) -> None:
    """The trainer's death uses an attempt, and a lease that ran out; the others' do not."""
    whys = [
        event["message"]
        for event in raw_events(cluster, row["id"])
        if event["type"] == "job.requeued"
    ]
    counted = [why for why in whys if not why.startswith(UNCOUNTED)]
    assert row["attempt"] == 1 + len(counted), f"{whys}: {told}"
    if what == "trainer":
        assert all("SIGKILL" in why for why in counted), f"{whys}: {told}"
    elif what == "worker parent":
        assert all("heartbeat stopped" in why for why in counted), f"{whys}: {told}"
    elif what == "pool child":
        assert not counted, f"{whys}: {told}"


class TestDrained:
    @pytest.fixture(autouse=True)
    def whole(self, cluster: Cluster) -> Iterator[None]:
        make_whole(cluster)
        yield
        make_whole(cluster)

    def test_a_worker_hands_its_job_over_and_ends(
        self, cluster: Cluster, unbroken: Unbroken
    ) -> None:
        job_id = self._training(cluster)
        holder = holder_of(cluster, job_id)
        tree = cluster.workers[holder].tree()
        assert cluster.workers[holder].stop(seconds=20) == 0
        count("worker drained")
        assert not any(is_alive(process.pid) for process in tree)
        row = cluster.finish(job_id)
        assert hashes(row) == unbroken.files
        assert (row["attempt"], row["fence"]) == (1, 2)
        assert repeated_steps(cluster.executions(job_id)) == 0
        assert where_it_ran(cluster, job_id) == [holder, 1 - holder]
        assert_clean(cluster, job_id)
        assert "did not drain in time" not in cluster.workers[holder].tail()

    def test_all_workers_one_after_the_other_under_six_jobs(
        self, cluster: Cluster, unbroken: Unbroken
    ) -> None:
        job_ids = [cluster.submit(**JOB) for _ in range(6)]
        cluster.wait(job_ids[0], lambda row: row["step"] >= 1)
        for worker in cluster.workers:
            assert worker.stop() == 0
            count("worker drained")
            worker.start()
        for job_id in job_ids:
            row = cluster.finish(job_id)
            assert hashes(row) == unbroken.files
            assert row["attempt"] == 1
            assert repeated_steps(cluster.executions(job_id)) == 0
        assert_clean(cluster, *job_ids)
        assert_no_orphans(cluster)

    @pytest.mark.parametrize("step_ms", [20, pytest.param(1000, marks=pytest.mark.torture)])
    @pytest.mark.torture
    def test_also_where_a_service_manager_tells_every_process(
        self, cluster: Cluster, step_ms: int
    ) -> None:
        job_id = cluster.submit(steps=2000 // step_ms, checkpoint_steps=50, step_ms=step_ms)
        cluster.wait(job_id, lambda row: row["step"] >= 1)
        worker = cluster.workers[holder_of(cluster, job_id)]
        for process in reversed(worker.tree()):  # the trainer first: it may end before its
            send(process.pid, signal.SIGTERM)  # supervisor has heard of anything
        assert worker.stop() == 0
        count("worker drained")
        row = cluster.finish(job_id)
        assert row["attempt"] == 1
        assert repeated_steps(cluster.executions(job_id)) == 0
        assert_clean(cluster, job_id)

    @pytest.mark.parametrize(
        "time_", [1, *(pytest.param(time_, marks=pytest.mark.torture) for time_ in range(2, 21))]
    )
    @pytest.mark.torture
    def test_told_twice_it_ends_at_once(self, cluster: Cluster, time_: int) -> None:
        """Its trainer does not listen; the job goes on from its last checkpoint."""
        job_id = cluster.submit(**JOB, labels={"deaf": "1"})
        cluster.wait(job_id, lambda row: row["checkpoint"] is not None)
        worker = cluster.workers[holder_of(cluster, job_id)]
        tree, told_at = worker.tree(), worker.log.stat().st_size
        send(worker.pid, signal.SIGTERM)
        until(lambda: b"Warm shutdown" in worker.log.read_bytes()[told_at:])
        started = time.monotonic()
        worker.stop(seconds=5)
        count("worker drained")
        assert time.monotonic() - started < 5
        until(lambda: not any(is_alive(process.pid) for process in tree), seconds=5)
        worker.start()
        cluster.finish(job_id)
        assert_clean(cluster, job_id)

    def _training(self, cluster: Cluster) -> str:
        job_id = cluster.submit(**{**JOB, "step_ms": 35})  # it must not be over before it has heard
        cluster.wait(job_id, lambda row: row["step"] >= 12)
        return job_id


@pytest.mark.torture
class TestRealTrainer:
    def test_killed_on_one_machine_it_goes_on_on_another_to_the_same_bytes(
        self, cluster: Cluster
    ) -> None:
        """From the store alone: the machines share no folder, and the first stays dead."""
        make_whole(cluster)
        unbroken = hashes(cluster.finish(cluster.submit(**REAL_JOB), seconds=120))
        job_id = cluster.submit(**REAL_JOB)
        cluster.wait(job_id, lambda row: row["checkpoint"] is not None, seconds=120)
        holder = holder_of(cluster, job_id)
        cluster.kill("worker parent", worker=holder)
        checkpoint = cluster.row(job_id)["checkpoint"]
        assert not (cluster.workers[1 - holder].data_dir / "work" / job_id).exists()
        row = cluster.finish(job_id, seconds=120)
        assert hashes(row) == unbroken
        resumed = [event for event in cluster.events(job_id) if event["type"] == "job.resumed"]
        assert [event["data"]["step"] for event in resumed] == [checkpoint["step"]]
        assert (row["attempt"], row["fence"]) == (2, 2)
        assert_clean(cluster, job_id)
        assert_no_orphans(cluster)


def where_it_ran(cluster: Cluster, job_id: str) -> list[int]:
    """The workers that have claimed it, in turn."""
    names = [(node.data_dir / "slots" / "0.lock").read_text().strip() for node in cluster.workers]
    return [
        names.index(event["data"]["worker"])
        for event in raw_events(cluster, job_id)
        if event["type"] == "job.running"
    ]
