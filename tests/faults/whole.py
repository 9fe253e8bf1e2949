"""Between the faults of one test and the next: the cluster is whole again, and the job in order."""

from collections.abc import Mapping
from typing import Any

from tests.faults.cluster import Cluster
from tests.system.service import until


def make_whole(cluster: Cluster) -> None:
    """Start what has ended, and wait until every machine has all of its processes, and no other."""
    cluster.postgres.start()
    cluster.redis.start()

    def look() -> bool:
        for node in cluster.nodes:
            if not node.is_running:  # also one that was still draining a moment ago
                node.launch()
        return is_whole(cluster)

    until(look, seconds=60, every=0.2)
    for node in cluster.nodes:
        node.wait_until_ready()


def is_whole(cluster: Cluster) -> bool:
    return (
        len(cluster.api.servers()) == 1
        and all(len(worker.pool_children()) == worker.slots for worker in cluster.workers)
        and not cluster.orphans()
    )


def assert_clean(cluster: Cluster, *job_ids: str) -> None:
    """That no rule of the journal is broken by these jobs."""
    found = [violation for violation in cluster.violations() if violation.job in job_ids]
    assert not found, "\n".join(map(str, found))


def assert_no_orphans(cluster: Cluster, *, seconds: float = 10) -> None:
    try:
        until(lambda: not cluster.orphans(), seconds=seconds)
    except AssertionError:
        raise AssertionError(f"left behind: {cluster.orphans()}") from None


def hashes(row: Mapping[str, Any]) -> dict[str, str]:
    """Of a finished job's adapter, by the names of its files."""
    return {file["name"]: file["sha256"] for file in row["adapter"]["files"]}


def holder_of(cluster: Cluster, job_id: str) -> int:
    """The worker that trains it."""
    (index,) = until(
        lambda: [i for i, worker in enumerate(cluster.workers) if worker.trainers(job_id)],
        every=0.01,
    )
    return index
