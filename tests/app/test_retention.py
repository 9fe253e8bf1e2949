"""What is cleaned away, and that nothing that is needed goes with it."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.datasets.parts import Parts
from app.db import make_engine
from app.ids import new_id
from app.jobs.states import Status
from app.objects import Entry
from app.retention import Retention
from app.storage import ArtifactStore, Freed, Outage, open_store
from app.tables import (
    EventRow,
    IdempotencyRow,
    MetricRow,
    OutboxRow,
    UploadPartRow,
    UploadRow,
    WebhookDeliveryRow,
)
from tests.app.house import House, adapter, blob, dataset, environment, keeping

MANY = """
import resource
from hashlib import sha256
from app.garbage import Candidates

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Candidates() as candidates:
    candidates.add((sha256(b"%d" % n).hexdigest(), n) for n in range(300_000))
    candidates.discard(sha256(b"%d" % n).hexdigest() for n in range(0, 300_000, 2))
    shards = list((shard, len(blobs)) for shard, blobs in candidates.shards())
assert [shard for shard, _ in shards] == [f"{n:02x}" for n in range(256)]
assert sum(count for _, count in shards) == 150_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


class TestFiles:
    @pytest.mark.parametrize("by", ["dataset", "adapter", "input", "held out", "publication"])
    def test_what_is_needed_stays(self, house: House, by: str) -> None:
        digest = house.put(b"needed")
        match by:
            case "dataset":
                house.add(dataset(digest))
            case "adapter":
                house.job(Status.SUCCEEDED, adapter=adapter("0" * 64, digest))
            case "input":
                inputs = {"dataset": {"sha256": digest}, "validation": None}
                house.job(Status.QUEUED, inputs=inputs)
            case "held out":
                inputs = {"dataset": {"sha256": "0" * 64}, "validation": {"sha256": digest}}
                house.job(Status.PAUSED, inputs=inputs)
            case "publication":
                # An attempt has died between its manifest and the row: the next one takes it over.
                house.manifest(house.job(Status.QUEUED, fence=1), digest)
        unneeded = house.put(b"unneeded")
        assert house.clean().blobs == Freed(1, len(b"unneeded"))
        listed = house.stored.listed("blobs")
        assert blob(digest) in listed
        assert blob(unneeded) not in listed

    @pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED, Status.CANCELLED])
    def test_what_a_job_has_read_goes_when_it_is_over(self, house: House, status: Status) -> None:
        digest = house.put(b"rows")
        inputs = {"dataset": {"sha256": digest}, "validation": {"sha256": digest}}
        house.job(status, inputs=inputs)
        assert house.clean().blobs.files == 1

    def test_what_is_young_stays(self, used: House) -> None:
        digest = used.put(b"young", hours=23)
        assert used.clean().blobs == Freed()
        assert blob(digest) in used.stored.listed()
        assert keeping(used, keep_unreferenced_hours=22).clean().blobs.files == 1

    def test_beside_an_empty_database_nothing_is_garbage(self, house: House) -> None:
        digest, job_id = house.put(b"of another database"), new_id("job")
        house.checkpoint(job_id)
        cleaned = house.clean()
        assert (cleaned.blobs, cleaned.job_files) == (Freed(), Freed())
        assert blob(digest) in house.stored.listed()

    def test_what_is_put_and_referred_to_after_the_listing_stays(self, used: House) -> None:
        class Busy(ArtifactStore):
            """While it is listed, somebody uploads the same bytes again."""

            def blobs(self) -> Iterator[list[Entry]]:
                yield from super().blobs()
                used.scratch.write_bytes(b"came back")
                used.add(dataset(used.stored.store.put_file(used.scratch)))

        digest = used.put(b"came back")
        assert used.clean(store=Busy(used.stored.store.raw)).blobs == Freed()
        assert blob(digest) in used.stored.listed()

    def test_what_is_put_and_referred_to_after_the_rows_were_read_stays(self, used: House) -> None:
        class Late(ArtifactStore):
            """Before anything is deleted, somebody uploads the same bytes again."""

            def collect(self, shard: str, hashes: Any, before: datetime) -> Freed:
                used.scratch.write_bytes(b"came back")
                used.add(dataset(used.stored.store.put_file(used.scratch)))
                return super().collect(shard, hashes, before)

        digest = used.put(b"came back")
        assert used.clean(store=Late(used.stored.store.raw)).blobs == Freed()
        assert blob(digest) in used.stored.listed()

    def test_files_that_are_not_ours_stay(self, used: House) -> None:
        for key in ("blobs/readme", "jobs/readme", "jobs/other/manifest.json", "backup/x"):
            used.stored.store._objects.write(key, b"")
            used.stored.age(key, days=100)
        used.clean()
        assert {"blobs/readme", "jobs/readme", "jobs/other/manifest.json", "backup/x"} <= (
            used.stored.listed()
        )

    def test_hundreds_of_thousands_of_them_take_little_memory(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", MANY], capture_output=True, text=True, check=True
        )
        unit = 1 if sys.platform == "darwin" else 1024
        assert int(done.stdout) * unit < 16 << 20  # their hashes alone have 19 MB


class TestJobs:
    def test_old_ones_that_are_over_go_with_all_that_is_theirs(self, used: House) -> None:
        used = keeping(used, keep_jobs_days=30)
        digest, at = used.put(b"weights"), datetime.now(UTC)
        old = used.job(Status.SUCCEEDED, days=31, adapter=adapter(digest))
        used.add(
            EventRow(job_id=old, seq=1, at=at, type="job.accepted", message="", data={}),
            MetricRow(job_id=old, series="train", step=1, data={}),
            OutboxRow(job_id=old, due_at=at, created_at=at),
            IdempotencyRow(key="k", body_sha256="", job_id=old, created_at=at),
            WebhookDeliveryRow(
                job_id=old, seq=1, id="msg_1", type="job.succeeded", url="", host="", body="",
                state="delivered", attempts=[], give_up_at=at, created_at=at,
            ),
        )  # fmt: skip
        used.manifest(old, digest)
        kept = {
            used.job(Status.SUCCEEDED, days=29),
            used.job(Status.QUEUED, days=400),
            used.job(Status.PAUSED, days=400),
        }
        for job_id in kept:
            used.manifest(job_id)
        cleaned = used.clean()
        assert (cleaned.jobs, cleaned.job_files.files, cleaned.blobs.files) == (1, 1, 1)
        assert used.ids() == kept
        assert used.stored.listed("jobs") == {f"jobs/{job_id}/manifest.json" for job_id in kept}
        for table in (EventRow, MetricRow, OutboxRow, IdempotencyRow, WebhookDeliveryRow):
            assert used.count(table) == 0

    def test_all_are_kept_unless_that_is_set(self, used: House) -> None:
        digest = used.put(b"weights")
        old = used.job(Status.SUCCEEDED, days=4000, adapter=adapter(digest))
        assert used.clean().jobs == 0
        assert used.ids() == {old}
        assert blob(digest) in used.stored.listed()

    def test_more_than_are_removed_at_a_time(self, used: House) -> None:
        used = keeping(used, keep_jobs_days=1)
        for _ in range(230):
            used.job(Status.FAILED, days=2)
        assert used.clean().jobs == 230

    def test_killed_between_rows_and_files_it_leaves_garbage_alone(self, used: House) -> None:
        class Killed(Exception):
            pass

        class Dying(ArtifactStore):
            def forget_job(self, job_id: str) -> Freed:
                assert job_id not in used.ids()
                raise Killed

        used = keeping(used, keep_jobs_days=30)
        digest = used.put(b"weights")
        old = used.job(Status.SUCCEEDED, days=31, adapter=adapter(digest))
        used.manifest(old, digest)
        with pytest.raises(Killed):
            used.clean(store=Dying(used.stored.store.raw))
        assert used.ids() == set()
        assert {blob(digest), f"jobs/{old}/manifest.json"} < used.stored.listed()
        cleaned = used.clean()
        assert (cleaned.jobs, cleaned.job_files.files, cleaned.blobs.files) == (0, 1, 1)
        assert len(used.stored.listed()) == 1  # the rows of somebody

    def test_while_the_store_is_away_no_row_goes(
        self, used: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if used.stored.folder:
            pytest.skip("a folder is not away")
        used = keeping(used, keep_jobs_days=30)
        old = used.job(Status.SUCCEEDED, days=31)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(Outage):
            used.clean(store=open_store(used.settings))
        assert used.ids() == {old}


class TestCheckpoints:
    @pytest.mark.parametrize("status", list(Status))
    def test_they_go_when_the_job_is_over(self, house: House, status: Status) -> None:
        job_id = house.job(status)
        house.checkpoint(job_id, hours=0)
        house.manifest(job_id)
        assert house.clean().job_files.files == status.is_terminal
        left = house.stored.listed(f"jobs/{job_id}")
        assert f"jobs/{job_id}/manifest.json" in left
        assert len(left) == (1 if status.is_terminal else 2)

    def test_those_of_jobs_that_are_gone_go_when_they_are_old(self, used: House) -> None:
        old, young = new_id("job"), new_id("job")
        used.checkpoint(old)
        used.manifest(old)
        used.checkpoint(young, hours=20)
        assert used.clean().job_files.files == 2
        assert {key.split("/")[1] for key in used.stored.listed("jobs")} == {young}


class TestKeys:
    def test_old_ones_go_and_their_jobs_stay(self, used: House) -> None:
        job_id, now = used.job(Status.QUEUED), datetime.now(UTC)
        for key, days in (("new", 6.9), ("old", 7.1), ("older", 70)):
            then = now - timedelta(days=days)
            used.add(IdempotencyRow(key=key, body_sha256="", job_id=job_id, created_at=then))
        assert used.clean().idempotency_keys == 2
        with Session(used.engine) as session:
            assert session.scalars(select(IdempotencyRow.key)).all() == ["new"]
        assert used.ids() == {job_id}


class TestRun:
    def fill(self, house: House) -> House:
        """Something of everything that goes, and of everything that stays."""
        house = keeping(house, keep_jobs_days=30)
        shared, own = house.put(b"shared"), house.put(b"own")
        old = house.job(Status.SUCCEEDED, days=31, adapter=adapter(shared, own))
        house.manifest(old, shared, own)
        house.checkpoint(old, hours=1)
        house.manifest(house.job(Status.SUCCEEDED, adapter=adapter(shared)), shared)
        house.checkpoint(house.job(Status.FAILED))
        house.checkpoint(house.job(Status.RUNNING))
        house.checkpoint(new_id("job"))
        house.put(b"nobody's")
        then = datetime.now(UTC) - timedelta(days=8)
        kept = next(iter(house.ids() - {old}))
        house.add(IdempotencyRow(key="k", body_sha256="", job_id=kept, created_at=then))
        if house.stored.folder:
            (house.stored.folder / "blobs" / "x#1").write_bytes(b"torn")
            house.stored.age("blobs/x#1", hours=30)
        return house

    def test_a_dry_run_changes_nothing_and_says_what_will_go(self, used: House) -> None:
        used = self.fill(used)
        ids, listed = used.ids(), used.stored.listed()
        foretold = used.clean(dry_run=True)
        assert (used.ids(), used.stored.listed()) == (ids, listed)
        done = used.clean()
        assert foretold.as_dict() | {"dry_run": False} == done.as_dict()
        assert (done.jobs, done.idempotency_keys, done.blobs.files) == (1, 1, 2)
        assert done.job_files.files == 4
        assert done.unfinished.files == (1 if used.stored.folder else 0)
        assert done.bytes > 0
        again = used.clean()
        assert (again.jobs, again.idempotency_keys, again.bytes) == (0, 0, 0)

    def test_one_process_at_a_time(self, used: House) -> None:
        used.put(b"unneeded")
        other = make_engine(used.settings.database)
        with Retention(other, used.stored.store, used.settings)._alone() as is_alone:
            assert is_alone
            cleaned = used.clean()
        other.dispose()
        assert cleaned.busy
        assert cleaned.blobs == Freed()
        assert used.clean().blobs.files == 1

    def test_the_lock_of_one_that_was_killed_is_free(self, used: House) -> None:
        script = (
            "import os, signal\n"
            "from app.db import make_engine\n"
            "from app.retention import Retention\n"
            "from app.settings import Settings\n"
            "from app.storage import open_store\n"
            "settings = Settings()\n"
            "engine = make_engine(settings.database)\n"
            "with Retention(engine, open_store(settings), settings)._alone() as alone:\n"
            "    assert alone\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], env=environment(used), check=False)
        assert done.returncode == -9
        assert not used.clean().busy


class TestUploads:
    def upload(self, house: House, *, hours: float) -> str:
        """One that has not grown for so long, with a part in the store; its folder there."""
        then = datetime.now(UTC) - timedelta(hours=hours)
        upload = UploadRow(
            id=new_id("up"), project="a/b", sha256="0" * 64, filename="a.csv", size=9, received=4,
            created_at=then, updated_at=then,
        )  # fmt: skip
        folder, part = upload.folder, UploadPartRow(upload_id=upload.id, start=0, size=4, name="0")
        house.add(upload)
        house.add(part)
        self.part(house, folder, hours=hours)
        return folder

    def part(self, house: House, folder: str, *, hours: float) -> None:
        house.scratch.write_bytes(b"part")
        digest = sha256(b"part").hexdigest()
        Parts(house.stored.store).put(folder, "0", house.scratch, digest)
        house.stored.age(f"uploads/{folder}/0", hours=hours)

    def test_one_that_has_not_grown_for_a_day_goes_with_its_parts(self, house: House) -> None:
        self.upload(house, hours=25)
        for is_dry in (True, False):
            cleaned = house.clean(dry_run=is_dry)
            assert (cleaned.uploads, cleaned.parts, cleaned.bytes) == (1, Freed(1, 4), 4)
        assert house.stored.listed("uploads") == set()
        assert (house.count(UploadRow), house.count(UploadPartRow)) == (0, 0)

    def test_a_younger_one_stays_and_so_do_its_old_parts(self, used: House) -> None:
        folder = self.upload(used, hours=23)
        used.stored.age(f"uploads/{folder}/0", hours=30)
        cleaned = used.clean()
        assert (cleaned.uploads, cleaned.parts) == (0, Freed())
        assert used.stored.listed("uploads") == {f"uploads/{folder}/0"}

    def test_parts_of_no_upload_go_when_they_are_old(self, used: House) -> None:
        """What was left where a server was killed between the dataset and their deletion."""
        for hours in (25, 23):
            self.part(used, f"p/{'0' * 64}/{new_id('up')}", hours=hours)
        used.stored.store.objects.write("uploads/readme", b"")
        used.stored.age("uploads/readme", hours=99)
        assert used.clean().parts == Freed(1, 4)
        assert len(used.stored.listed("uploads")) == 2
