"""The harness itself: a job goes all the way, what is killed is gone, and nothing is left."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.cluster import ROWS, Cluster, What
from tests.faults.conftest import MakeCluster
from tests.faults.journal import expected_files, repeated_steps
from tests.faults.procs import is_alive, naming
from tests.faults.summary import FAULTS
from tests.system.service import EXAMPLES, until

FOREVER = """
import pathlib, signal, sys
from tests.faults.cluster import Cluster
cluster = Cluster(pathlib.Path(sys.argv[1]))
cluster.start()
cluster.submit(steps=10_000)
while not cluster.workers[0].trainers():
    pass
print(cluster.postgres.pid, cluster.redis.pid, flush=True)
signal.pause()
"""


class TestJob:
    def test_it_goes_from_the_api_to_the_adapter_that_was_foretold(self, cluster: Cluster) -> None:
        started = time.monotonic()
        job_id = cluster.submit(steps=20)
        cluster.finish(job_id)
        assert time.monotonic() - started < 5
        files = {file["name"]: file["sha256"] for file in cluster.job(job_id)["adapter"]["files"]}
        (story,) = cluster.stories()
        assert files == expected_files(story)
        cluster.check()

    @pytest.mark.torture
    def test_so_does_one_whose_rows_were_uploaded(self, cluster: Cluster) -> None:
        rows = ROWS * 2
        upload = cluster.api.http.post(
            "/datasets", params={"filename": "rows.jsonl"}, content=rows,
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        assert upload.status_code == 201, upload.text
        job_id = cluster.submit(dataset_uri=upload.json()["uri"])
        cluster.finish(job_id)
        assert cluster.accepted[job_id] == hashlib.sha256(rows).hexdigest()
        cluster.check()

    def test_what_is_wrong_with_one_is_found(self, cluster: Cluster) -> None:
        spoiled, lost = cluster.submit(), cluster.submit()
        cluster.settle()
        cluster.check()
        named = next(iter(cluster.row(spoiled)["adapter"]["files"]))["sha256"]
        blob = cluster.folder / "store" / "blobs" / named[:2] / named
        blob.write_bytes(b"other")
        cluster.query("UPDATE jobs SET fence = 2 WHERE id = %s", spoiled)
        cluster.query("DELETE FROM jobs WHERE id = %s", lost)
        found = {(violation.job, violation.rule) for violation in cluster.violations()}
        assert found == {(spoiled, "adapter"), (spoiled, "claims"), (lost, "lost")}


class TestRealTrainer:
    @pytest.mark.torture
    def test_a_label_makes_it_the_real_one(self, cluster: Cluster) -> None:
        job_id = cluster.submit(
            labels={"real": "1"},
            steps=2,
            base_model=f"file:{EXAMPLES / 'tiny-base'}",
            dataset_uri=f"file:{EXAMPLES / 'data' / 'train.jsonl'}",
            evaluation={"max_rows": 4},
        )
        cluster.finish(job_id, seconds=120)
        names = {file["name"] for file in cluster.row(job_id)["adapter"]["files"]}
        assert "tokenizer.json" in names
        cluster.check()


KINDS: list[What] = ["api", "postgres"]
ON_DEMAND: list[What] = [
    "api server", "redis", "trainer", "pool child", "celery main", "worker parent",
]  # fmt: skip


class TestKill:
    @pytest.mark.parametrize(
        "what",
        [*KINDS, *(pytest.param(what, marks=pytest.mark.torture) for what in ON_DEMAND)],
    )
    def test_what_is_killed_is_gone_and_the_job_goes_on(self, cluster: Cluster, what: What) -> None:
        job_id = cluster.submit(steps=60, step_ms=20)
        cluster.wait(job_id, lambda row: row["step"] >= 12)
        before = FAULTS.copy()
        killed = cluster.kill(what)
        assert len(killed) == 1
        assert not any(map(is_alive, killed))
        assert (FAULTS - before).total() == 1
        match what:
            case "postgres":
                cluster.postgres.start()
            case "redis":
                cluster.redis.start()
            case "api":
                cluster.api.start()
            case "worker parent":
                cluster.workers[0].start()
        cluster.finish(job_id)
        cluster.check()
        until(lambda: not cluster.orphans(), seconds=10)


class TestMachines:
    def test_a_worker_that_is_stopped_drains_and_another_goes_on(
        self, make_cluster: MakeCluster
    ) -> None:
        # A worker whose database is slow for a moment must not lose its job for it.
        cluster = make_cluster(workers=2, environment={"FLATLORA_LEASE_SECONDS": "6"})
        job_id = cluster.submit(steps=160, step_ms=20)
        cluster.wait(job_id, lambda row: row["step"] >= 12)
        (holder,) = [worker for worker in cluster.workers if worker.trainers(job_id)]
        assert holder.stop() == 0
        row = cluster.finish(job_id)
        assert (row["attempt"], row["fence"]) == (1, 2)
        assert repeated_steps(cluster.executions(job_id)) == 0
        cluster.check()

    @pytest.mark.torture
    @pytest.mark.torture
    def test_a_frozen_worker_loses_its_job_to_another_and_is_refused_when_it_wakes(
        self, make_cluster: MakeCluster
    ) -> None:
        cluster = make_cluster(workers=2)
        job_id = cluster.submit(steps=400, step_ms=20)
        cluster.wait(job_id, lambda row: row["step"] >= 12)
        (holder,) = [
            index for index, worker in enumerate(cluster.workers) if worker.trainers(job_id)
        ]
        cluster.freeze(holder)
        cluster.wait(job_id, lambda row: row["fence"] == 2, seconds=20)
        cluster.thaw(holder)
        cluster.finish(job_id)
        cluster.check()
        until(lambda: not cluster.orphans(), seconds=10)


@pytest.mark.torture
class TestNoneIsLeft:
    def test_a_closed_cluster_leaves_no_process(self, make_cluster: MakeCluster) -> None:
        cluster = make_cluster(workers=2, slots=2)
        for _ in range(4):
            cluster.submit(steps=1000)
        until(lambda: sum(len(worker.trainers()) for worker in cluster.workers) == 4)
        assert len(cluster.processes()) == 2 + 2 * (1 + 1 + 2 + 2)
        cluster.freeze(0)
        started = time.monotonic()
        cluster.close()
        assert time.monotonic() - started < 5
        assert not cluster.processes()
        assert not cluster.postgres.is_running
        assert not cluster.redis.is_running

    def test_neither_do_tests_that_are_killed(self, tmp_path: Path, open_folder: Path) -> None:
        tests = subprocess.Popen(
            [sys.executable, "-c", FOREVER, str(tmp_path / "cluster")],
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(open_folder)},
        )
        assert tests.stdout
        servers = [int(pid) for pid in tests.stdout.readline().split()]
        assert len(servers) == 2
        folder = str(tmp_path / "cluster")
        assert len(naming(folder)) > 6
        tests.kill()
        tests.wait()
        tests.stdout.close()
        until(lambda: not naming(folder) and not any(map(is_alive, servers)), seconds=10)
