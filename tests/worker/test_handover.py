"""A job's newest checkpoint follows it to another machine, and no older one ever does."""

import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from app.storage import ArtifactStore, Damaged
from tests.system.service import until
from tests.worker.jobs import add_job, change, claimed, row
from worker.claims import Claims
from worker.handover import Handover, checkpoint_folder, newest_step, restore
from worker.lease import Lease


def write_checkpoint(folder: Path, step: int, content: bytes = b"") -> Path:
    path = checkpoint_folder(folder, step)
    path.mkdir(parents=True)
    (path / "adapter.safetensors").write_bytes(content or os.urandom(1000))
    (path / "manifest.json").write_text(f'{{"step": {step}}}')
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class SlowStore(ArtifactStore):
    """Takes one checkpoint when it is told to, and remembers which it was asked to take."""

    asked: list[int]
    taking: threading.Semaphore

    def put_checkpoint(
        self, job_id: str, fence: int, step: int, folder: Path
    ) -> list[dict[str, Any]]:
        self.asked.append(step)
        assert self.taking.acquire(timeout=30)
        return super().put_checkpoint(job_id, fence, step, folder)


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    store = SlowStore.local(tmp_path / "store")
    assert isinstance(store, SlowStore)
    store.asked, store.taking = [], threading.Semaphore(1000)
    return store


@pytest.fixture
def lease(engine: Engine, claims: Claims) -> Lease:
    add_job(engine)
    return claimed(claims)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The job's folder on another machine."""
    return tmp_path / "there"


def step_in_row(engine: Engine, lease: Lease) -> int | None:
    checkpoint = row(engine, lease.job_id).checkpoint
    return checkpoint["step"] if checkpoint else None


def stored_steps(store: ArtifactStore) -> set[tuple[int, int]]:
    """Fence and step of what lies in the store."""
    keys = [entry.key.split("/") for page in store.job_files() for entry in page]
    return {(int(key[3]), int(key[4])) for key in keys if key[:3:2] == ["jobs", "checkpoints"]}


def has_only(store: ArtifactStore, fence: int, step: int) -> bool:
    return stored_steps(store) == {(fence, step)}


class TestHandover:
    def test_a_checkpoint_arrives_byte_for_byte_on_another_machine(
        self,
        engine: Engine,
        claims: Claims,
        lease: Lease,
        store: SlowStore,
        here: Path,
        there: Path,
    ) -> None:
        path = write_checkpoint(here, 5)
        with Handover(claims, store, lease, here) as handover:
            handover.take(5)
            until(lambda: step_in_row(engine, lease) == 5, seconds=30)
        claims.release(lease, "drained")
        again = claimed(claims)
        restore(store, again, there)
        assert contents(checkpoint_folder(there, 5)) == contents(path)
        assert newest_step(there) == 5

    def test_while_one_is_uploaded_only_the_newest_of_the_others_matters(
        self, engine: Engine, claims: Claims, lease: Lease, store: SlowStore, here: Path
    ) -> None:
        store.taking = threading.Semaphore(0)
        with Handover(claims, store, lease, here) as handover:
            for step in (5, 10, 15, 20):
                write_checkpoint(here, step)
                handover.take(step)
                until(lambda: store.asked, seconds=30)
            store.taking.release(2)
            until(lambda: step_in_row(engine, lease) == 20, seconds=30)
            until(partial(has_only, store, 1, 20), seconds=30)
        assert store.asked == [5, 20]

    def test_the_row_never_points_backwards(
        self, engine: Engine, claims: Claims, lease: Lease, store: SlowStore, here: Path
    ) -> None:
        store.taking = threading.Semaphore(0)
        for step in (5, 10, 15):
            write_checkpoint(here, step)
        with Handover(claims, store, lease, here) as handover:
            handover.take(5)
            until(lambda: store.asked, seconds=30)
            for step in (15, 10, 5):
                handover.take(step)
            store.taking.release(2)
            until(lambda: step_in_row(engine, lease) == 15, seconds=30)
        assert store.asked == [5, 15]

    def test_who_finishes_waits_for_the_newest_though_nobody_told_of_it(
        self, engine: Engine, claims: Claims, lease: Lease, store: SlowStore, here: Path
    ) -> None:
        write_checkpoint(here, 7)
        with Handover(claims, store, lease, here) as handover:
            handover.finish(30)
            assert step_in_row(engine, lease) == 7

    def test_who_finishes_waits_no_longer_than_asked(
        self, claims: Claims, lease: Lease, store: SlowStore, here: Path
    ) -> None:
        store.taking = threading.Semaphore(0)
        write_checkpoint(here, 7)
        started = time.monotonic()
        with Handover(claims, store, lease, here) as handover:
            handover.finish(0.3)
            assert 0.2 < time.monotonic() - started < 25
            store.taking.release()

    def test_one_that_is_deleted_under_it_is_passed_over(
        self, engine: Engine, claims: Claims, lease: Lease, store: SlowStore, here: Path
    ) -> None:
        with Handover(claims, store, lease, here) as handover:
            handover.take(5)  # the trainer keeps two, and was faster
            handover.finish(30)
            assert step_in_row(engine, lease) is None
            write_checkpoint(here, 10)
            handover.take(10)
            handover.finish(30)
        assert step_in_row(engine, lease) == 10

    def test_an_outage_costs_a_checkpoint_and_not_the_next(
        self, engine: Engine, lease: Lease, store: SlowStore, here: Path
    ) -> None:
        class Away(Claims):
            is_away = True

            def hand_over(self, lease: Lease, checkpoint: Any) -> None:
                if self.is_away:
                    raise OperationalError("hand_over", {}, Exception("away"))
                super().hand_over(lease, checkpoint)

        claims = Away(engine, worker="w1", lease_seconds=60, max_attempts=3)
        with Handover(claims, store, lease, here) as handover:
            write_checkpoint(here, 5)
            handover.take(5)
            handover.finish(30)
            claims.is_away = False
            write_checkpoint(here, 10)
            handover.take(10)
            handover.finish(30)
        assert step_in_row(engine, lease) == 10


class TestLostLease:
    @pytest.fixture
    def lost(self, engine: Engine, lease: Lease) -> Lease:
        change(engine, lease.job_id, fence=lease.fence + 1)
        return lease

    def test_it_points_nowhere_and_deletes_nothing_of_the_next_attempt(
        self, engine: Engine, claims: Claims, lost: Lease, store: SlowStore, here: Path
    ) -> None:
        store.put_checkpoint(lost.job_id, 2, 30, write_checkpoint(here, 30))
        with Handover(claims, store, lost, here) as handover:
            handover.finish(30)
        assert step_in_row(engine, lost) is None
        assert (2, 30) in stored_steps(store)

    def test_nobody_waits_for_one_that_has_given_up(
        self, claims: Claims, lost: Lease, store: SlowStore, here: Path
    ) -> None:
        write_checkpoint(here, 5)
        started = time.monotonic()
        with Handover(claims, store, lost, here) as handover:
            handover.finish(60)
            write_checkpoint(here, 10)
            handover.take(10)
            handover.finish(60)
        assert time.monotonic() - started < 30
        assert store.asked == [5]


class TestRestore:
    @pytest.fixture
    def handed(
        self, engine: Engine, claims: Claims, lease: Lease, store: SlowStore, here: Path
    ) -> Lease:
        """The next attempt, for which step 10 lies in the store."""
        write_checkpoint(here, 10, b"of the first attempt")
        with Handover(claims, store, lease, here) as handover:
            handover.finish(30)
        claims.release(lease, "drained")
        return claimed(claims)

    @pytest.mark.parametrize(("local", "taken"), [(5, 10), (10, 10), (15, 15)])
    def test_the_newer_of_here_and_there_is_taken(
        self, handed: Lease, store: SlowStore, there: Path, local: int, taken: int
    ) -> None:
        write_checkpoint(there, local, b"local")
        restore(store, handed, there)
        assert newest_step(there) == taken
        expected = b"of the first attempt" if local < taken else b"local"
        assert contents(checkpoint_folder(there, taken))["adapter.safetensors"] == expected

    def test_half_a_local_one_counts_for_nothing(
        self, handed: Lease, store: SlowStore, there: Path
    ) -> None:
        path = write_checkpoint(there, 15)
        path.rename(path.with_name(path.name + ".tmp"))
        assert newest_step(there) == 0
        restore(store, handed, there)
        assert newest_step(there) == 10

    def test_without_one_in_the_row_nothing_happens(
        self, lease: Lease, store: SlowStore, there: Path
    ) -> None:
        restore(store, lease, there)
        assert not there.exists()

    @pytest.mark.parametrize("damage", ["changed", "gone"])
    def test_a_damaged_one_is_refused_and_leaves_nothing(
        self, handed: Lease, store: SlowStore, tmp_path: Path, there: Path, damage: str
    ) -> None:
        (path,) = (tmp_path / "store").rglob("adapter.safetensors")
        path.write_bytes(b"changed") if damage == "changed" else path.unlink()
        with pytest.raises(Damaged):
            restore(store, handed, there)
        assert newest_step(there) == 0
        assert list((there / "checkpoints").iterdir()) == []

    def test_what_a_finished_job_has_left_is_forgotten(
        self, engine: Engine, claims: Claims, handed: Lease, store: SlowStore
    ) -> None:
        claims.succeed(handed, result={}, adapter=None)
        assert row(engine, handed.job_id).checkpoint is None
        store.forget_checkpoints(handed.job_id, fence=handed.fence, keep_step=None)
        assert stored_steps(store) == set()


def test_a_checkpoint_may_be_handed_over_again(
    engine: Engine, claims: Claims, lease: Lease, store: SlowStore, here: Path, there: Path
) -> None:
    """A job may move again before it has made a new one, or without its folder."""
    write_checkpoint(here, 10, b"first")
    with Handover(claims, store, lease, here) as handover:
        handover.finish(30)
    shutil.rmtree(here)
    for fence in (2, 3):
        claims.release(lease, "drained")
        lease = claimed(claims)
        restore(store, lease, there)
        with Handover(claims, store, lease, there) as handover:
            handover.finish(30)
        until(partial(has_only, store, fence, 10), seconds=30)
        shutil.rmtree(there)
