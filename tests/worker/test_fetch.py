"""Every attempt of a job reads the same, on whichever machine, whatever became of the sources."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, insert
from sqlalchemy.orm import Session

from app.db import now
from app.settings import Settings
from app.storage import ArtifactStore, sha256_of
from app.tables import DatasetRow
from tests.app.service import make_model
from tests.worker.jobs import add_job, change, claimed, make_spec, row
from worker.claims import Claims
from worker.fetch import Fetcher
from worker.inputs import pinned, read_job
from worker.lease import Lease, LeaseLost
from worker.remote import Arrived, Order
from worker.training.config import TrainingJob
from worker.training.errors import BaseModelUnavailable, DatasetUnavailable

ROWS, OTHERS = b'{"prompt": "a", "completion": "b"}\n', b'{"prompt": "c", "completion": "d"}\n'
DATASET = f"dataset:ds_{'1' * 32}"
COMMITS = "a" * 40, "b" * 40


@dataclass
class Hub:
    """Where ``main`` stands, and what was asked for."""

    folder: Path
    main: str = COMMITS[0]
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def download(self, name: str, revision: str | None) -> Path:
        self.asked.append((name, revision))
        path = self.folder / (revision if revision in COMMITS else self.main)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def bring(self, order: Order) -> Arrived:
        """A dataset, whose rows are those of its commit."""
        assert order.task == "hub"
        revision = order.parts["revision"]
        self.asked.append((order.parts["repo"], revision))
        commit = revision if revision in COMMITS else self.main
        Path(order.target).write_bytes(commit.encode())
        return Arrived("rows.jsonl", sha256_of(Path(order.target)), commit)


@dataclass
class Machine:
    """A worker's data folder."""

    settings: Settings
    engine: Engine
    store: ArtifactStore
    claims: Claims
    hub: Hub

    def folder(self, lease: Lease) -> Path:
        path = self.settings.work_dir / lease.job_id
        path.mkdir(parents=True, exist_ok=True)
        return path

    def fetch(self, lease: Lease) -> TrainingJob:
        def pin(inputs: Mapping[str, Any]) -> None:
            self.claims.pin(lease, inputs)

        fetcher = Fetcher(self.settings, self.engine, self.store)
        fetcher.fetch(self.folder(lease), lease, self.hub.download, self.hub.bring, pin)
        return read_job(self.folder(lease))

    def attempt(self) -> TrainingJob:
        """Claim the job, fetch its inputs and give it back."""
        lease = claimed(self.claims)
        job = self.fetch(lease)
        self.claims.release(lease, "drained")
        return job


@dataclass
class Cluster:
    """Machines that share a database, a store, a folder of datasets and a hub."""

    root: Path
    engine: Engine
    claims: Claims
    broker_url: str = "redis://broker"

    def __post_init__(self) -> None:
        self.rows = self.root / "rows"
        self.rows.mkdir()
        self.source = self.rows / "train.jsonl"
        self.source.write_bytes(ROWS)
        self.store = ArtifactStore.local(self.root / "store")
        self.hub = Hub(self.root / "hub")

    def machine(self, name: str) -> Machine:
        settings = Settings.model_validate({
            "data_dir": self.root / name,
            "database_url": "postgresql://host/db",
            "broker_url": self.broker_url,
            "dataset_roots": [self.rows],
            "model_roots": [self.rows],
        })  # fmt: skip
        return Machine(settings, self.engine, self.store, self.claims, self.hub)

    def submit(self, **values: Any) -> str:
        return add_job(self.engine, spec=make_spec(dataset_uri="file:train.jsonl", **values))

    def upload(self, content: bytes) -> None:
        scratch = self.root / "scratch"
        scratch.write_bytes(content)
        values = {
            "id": DATASET.removeprefix("dataset:"), "sha256": self.store.put_file(scratch),
            "filename": "rows.jsonl", "size": len(content), "created_at": now(),
        }  # fmt: skip
        with Session(self.engine.execution_options(writes=True)) as session, session.begin():
            session.execute(insert(DatasetRow).values(values))

    def blobs(self) -> list[Path]:
        return [path for path in (self.root / "store" / "blobs").rglob("*") if path.is_file()]


@pytest.fixture
def cluster(tmp_path: Path, engine: Engine, claims: Claims) -> Cluster:
    return Cluster(tmp_path, engine, claims)


def read(job: TrainingJob) -> dict[str, Any]:
    """What the trainer sees of a job, but for where it lies."""
    files = [file for file in (job.dataset, job.validation) if file]
    return {
        "bytes": [file.path.read_bytes() for file in files],
        "files": [(file.uri, file.filename, file.sha256) for file in files],
        "model": (job.base_model.name, job.base_model.revision),
        "clock": job.clock,
    }


class TestAnotherMachine:
    def test_it_reads_the_same_though_everything_has_changed_meanwhile(
        self, cluster: Cluster
    ) -> None:
        job_id = cluster.submit(evaluation={"validation_uri": "file:validation.jsonl"})
        (cluster.rows / "validation.jsonl").write_bytes(OTHERS)
        first = cluster.machine("a").attempt()
        inputs = row(cluster.engine, job_id).inputs
        assert inputs is not None
        inputs["clock"] = "2020-01-01T00:00:00+00:00"  # as if the first attempt was long ago
        change(cluster.engine, job_id, inputs=inputs)
        cluster.source.write_bytes(OTHERS)
        (cluster.rows / "validation.jsonl").write_bytes(ROWS)
        cluster.hub.main = COMMITS[1]
        second = cluster.machine("b").attempt()
        expected = read(replace(first, clock=second.clock))
        assert read(second) == expected
        assert read(second)["bytes"] == [ROWS, OTHERS]
        assert second.clock == datetime(2020, 1, 1, tzinfo=UTC)
        assert cluster.hub.asked == [("org/name", None), ("org/name", COMMITS[0])]

    def test_the_source_may_be_gone(self, cluster: Cluster) -> None:
        cluster.submit()
        first = cluster.machine("a").attempt()
        cluster.source.unlink()
        assert read(cluster.machine("b").attempt()) == read(first)

    def test_an_upload_may_be_gone_too(self, cluster: Cluster) -> None:
        cluster.upload(ROWS)
        add_job(cluster.engine, spec=make_spec(dataset_uri=DATASET))
        first = cluster.machine("a").attempt()
        with Session(cluster.engine.execution_options(writes=True)) as session, session.begin():
            session.execute(delete(DatasetRow))
        second = cluster.machine("b").attempt()
        assert read(second) == read(first)
        assert second.dataset.filename == "rows.jsonl"

    def test_a_branch_of_the_hub_may_have_moved(self, cluster: Cluster) -> None:
        uri = "hf://datasets/org/rows@main/rows.jsonl"
        job_id = add_job(cluster.engine, spec=make_spec(dataset_uri=uri, base_model="file:model"))
        make_model(cluster.rows / "model")
        first = cluster.machine("a").attempt()
        assert first.dataset.revision == COMMITS[0]
        inputs = row(cluster.engine, job_id).inputs
        assert inputs is not None
        assert inputs["dataset"]["revision"] == COMMITS[0]
        cluster.hub.main = COMMITS[1]
        second = cluster.machine("b").attempt()
        assert read(second) == read(first)
        assert second.dataset.revision == COMMITS[0]
        assert read(second)["bytes"] == [COMMITS[0].encode()]
        assert cluster.hub.asked == [("org/rows", "main")]

    def test_inputs_without_a_commit_are_those_that_workers_of_0_1_read(
        self, cluster: Cluster
    ) -> None:
        job_id = cluster.submit()
        cluster.machine("a").attempt()
        inputs = row(cluster.engine, job_id).inputs
        assert inputs is not None
        assert inputs["dataset"].keys() == {"uri", "filename", "sha256"}

    @pytest.mark.parametrize("damage", ["changed", "gone"])
    def test_what_the_store_has_lost_is_told_to_the_author(
        self, cluster: Cluster, damage: str
    ) -> None:
        cluster.submit()
        cluster.machine("a").attempt()
        (blob,) = cluster.blobs()
        blob.write_bytes(OTHERS) if damage == "changed" else blob.unlink()
        with pytest.raises(DatasetUnavailable, match=r"file:train\.jsonl is damaged or gone"):
            cluster.machine("b").attempt()

    def test_a_local_model_is_looked_for_where_the_machine_has_it(self, cluster: Cluster) -> None:
        cluster.submit(base_model="file:model")
        model = make_model(cluster.rows / "model")
        cluster.machine("a").attempt()
        assert cluster.machine("b").attempt().base_model.path == model
        shutil.rmtree(model)
        with pytest.raises(BaseModelUnavailable):
            cluster.machine("c").attempt()


class TestSameMachine:
    def test_it_uses_its_copies_again_without_the_store(self, cluster: Cluster) -> None:
        cluster.submit()
        first = cluster.machine("a").attempt()
        for blob in cluster.blobs():
            blob.unlink()
        cluster.source.unlink()
        assert read(cluster.machine("a").attempt()) == read(first)
        assert len(cluster.hub.asked) == 1

    def test_a_copy_that_is_torn_comes_from_the_store(self, cluster: Cluster) -> None:
        cluster.submit()
        first = cluster.machine("a").attempt()
        first.dataset.path.write_bytes(ROWS[:5])
        cluster.source.write_bytes(OTHERS)
        assert read(cluster.machine("a").attempt())["bytes"] == [ROWS]

    def test_what_it_has_read_and_could_not_pin_gives_way_to_what_is_pinned(
        self, cluster: Cluster
    ) -> None:
        cluster.submit()
        here, there = cluster.machine("a"), cluster.machine("b")
        lost = claimed(cluster.claims)
        change(cluster.engine, lost.job_id, status="queued")
        with pytest.raises(LeaseLost):
            here.fetch(lost)
        cluster.source.write_bytes(OTHERS)
        theirs = there.attempt()
        assert read(here.attempt()) == read(theirs)
        assert read(theirs)["bytes"] == [OTHERS]

    def test_a_pin_that_is_repeated_says_the_same(self, cluster: Cluster) -> None:
        """Its answer may have been lost, and the file may have changed since."""
        job_id = cluster.submit()
        machine, lease = cluster.machine("a"), claimed(cluster.claims)
        machine.fetch(lease)
        first = row(cluster.engine, job_id).inputs
        cluster.source.write_bytes(OTHERS)
        machine.fetch(lease)
        assert row(cluster.engine, job_id).inputs == first == pinned(machine.folder(lease))

    def test_the_row_holds_no_path_of_this_machine(self, cluster: Cluster, tmp_path: Path) -> None:
        job_id = cluster.submit()
        cluster.machine("a").attempt()
        inputs = row(cluster.engine, job_id).inputs
        assert inputs is not None
        assert str(tmp_path) not in str(inputs)
        assert inputs.keys() == {"clock", "base_model", "dataset", "validation"}


class TestEmbedded:
    @pytest.fixture
    def cluster(self, tmp_path: Path, engine: Engine, claims: Claims) -> Cluster:
        return Cluster(tmp_path, engine, claims, broker_url="")

    def test_nothing_is_pinned_and_the_copies_are_used_again(self, cluster: Cluster) -> None:
        job_id = cluster.submit()
        first = cluster.machine("a").attempt()
        cluster.source.write_bytes(OTHERS)
        assert read(cluster.machine("a").attempt()) == read(first)
        assert row(cluster.engine, job_id).inputs is None
        assert not cluster.blobs()

    def test_what_is_damaged_of_an_upload_is_told_to_its_author(self, cluster: Cluster) -> None:
        cluster.upload(ROWS)
        add_job(cluster.engine, spec=make_spec(dataset_uri=DATASET))
        (blob,) = cluster.blobs()
        blob.write_bytes(b"x" * len(ROWS))
        with pytest.raises(DatasetUnavailable, match="damaged or gone"):
            cluster.machine("a").attempt()
