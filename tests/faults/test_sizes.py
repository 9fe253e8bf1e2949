"""Slots of different sizes on a machine: wake-ups alone find jobs the one they fit into."""

from pathlib import Path

from tests.faults.cluster import Cluster
from tests.faults.conftest import MakeCluster
from tests.system.service import until

ENVIRONMENT = {"FLATLORA_DEVICES": "cpu,cpu+cpu", "FLATLORA_SWEEP_SECONDS": "300"}


def slot_names(cluster: Cluster) -> list[str]:
    folder: Path = cluster.workers[0].data_dir / "slots"
    return [(folder / f"{index}.lock").read_text().strip() for index in range(2)]


def test_jobs_of_several_gpus_run_where_there_are_as_many(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(environment=ENVIRONMENT)
    small, large = slot_names(cluster)
    too_large = cluster.submit(resources={"gpus": 4})
    for _ in range(3):
        job_id = cluster.submit(resources={"gpus": 2})
        cluster.finish(job_id)
        assert cluster.row(job_id)["worker"] == large
    busy = [cluster.submit(steps=1000, resources={"gpus": gpus}) for gpus in (2, 1)]
    until(lambda: all(cluster.row(job_id)["status"] == "running" for job_id in busy))
    assert [cluster.row(job_id)["worker"] for job_id in busy] == [large, small]
    assert cluster.row(too_large)["status"] == "queued"
    events = cluster.api.http.get(f"/jobs/{too_large}/events").json()["items"]
    assert [event["type"] for event in events] == ["job.queued", "job.waiting"]
    assert events[1]["data"] == {"gpus": 4, "largest_slot": 2}
    for job_id in (too_large, *busy):
        cluster.api.http.post(f"/jobs/{job_id}/cancel")
    cluster.settle()
    cluster.check()
