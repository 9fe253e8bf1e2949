"""Deleting what nothing needs, while others put it again."""

import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.objects import Entry
from app.storage import ArtifactStore, Freed
from tests.app.stored import Stored

ROWS = b'{"prompt": "1 + 1", "completion": "2"}\n' * 1000
DIGEST = hashlib.sha256(ROWS).hexdigest()
BLOB = f"blobs/{DIGEST[:2]}/{DIGEST}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    return path


def now() -> datetime:
    return datetime.now(UTC)


class Hesitant(ArtifactStore):
    """Waits between its look at ages and the deletion."""

    def __init__(self, store: ArtifactStore) -> None:
        super().__init__(store.raw)
        self.has_looked, self.may_go_on = threading.Event(), threading.Event()

    def delete(self, entries: Sequence[Entry]) -> Freed:
        self.has_looked.set()
        assert self.may_go_on.wait(30)
        return super().delete(entries)


class TestCollect:
    SHARD = DIGEST[:2]

    def test_the_old_ones_that_it_is_told_go(self, stored: Stored, source: Path) -> None:
        stored.store.put_file(source)
        old = stored.store.collect(self.SHARD, {DIGEST}, now() - timedelta(hours=1))
        other = stored.store.collect(self.SHARD, {"0" * 64}, now() + timedelta(hours=1))
        assert (old, other) == (Freed(), Freed())
        assert stored.listed() == {BLOB}
        stored.age(BLOB, hours=2)
        gone = stored.store.collect(self.SHARD, {DIGEST}, now() - timedelta(hours=1))
        assert gone == Freed(1, len(ROWS))
        assert stored.listed() == set()

    def test_what_is_put_between_the_look_and_the_deletion_is_there_when_that_returns(
        self, stored: Stored, source: Path
    ) -> None:
        stored.store.put_file(source)
        stored.age(BLOB, hours=30)
        hesitant = Hesitant(stored.store)
        limit = now() - timedelta(hours=24)
        with ThreadPoolExecutor(2) as pool:
            collecting = pool.submit(hesitant.collect, self.SHARD, {DIGEST}, limit)
            assert hesitant.has_looked.wait(30)
            putting = pool.submit(stored.store.put_file, source)
            # It has put the file, and must not yet say so.
            while stored.age_of(BLOB) > timedelta(hours=1):
                time.sleep(0.01)
            assert not putting.done()
            hesitant.may_go_on.set()
            assert collecting.result(30) == Freed(1, len(ROWS))
            assert putting.result(30) == DIGEST
        assert stored.listed() == {BLOB}
        assert stored.read(BLOB) == ROWS

    def test_whoever_puts_while_others_collect_finds_it_there(
        self, stored: Stored, source: Path
    ) -> None:
        stored.store.put_file(source)
        with ThreadPoolExecutor(2) as pool:
            for _ in range(20):
                stored.age(BLOB, hours=30)
                limit = now() - timedelta(hours=24)
                collecting = pool.submit(stored.store.collect, self.SHARD, {DIGEST}, limit)
                pool.submit(stored.store.put_file, source).result(60)
                assert stored.read(BLOB) == ROWS
                collecting.result(60)
                assert stored.read(BLOB) == ROWS

    def test_only_one_collects_in_a_shard(self, stored: Stored, source: Path) -> None:
        stored.store.put_file(source)
        stored.age(BLOB, hours=30)
        stored.store._objects.create(f"collecting/{self.SHARD}", b"")
        assert stored.store.collect(self.SHARD, {DIGEST}, now()) == Freed()
        assert BLOB in stored.listed()

    def test_one_that_was_killed_is_not_waited_for(self, stored: Stored, source: Path) -> None:
        mark = f"collecting/{self.SHARD}"
        stored.store._objects.create(mark, b"")
        stored.age(mark, hours=1)
        started = time.monotonic()
        stored.store.put_file(source)
        assert time.monotonic() - started < 10
        stored.age(BLOB, hours=30)
        limit = now() - timedelta(hours=24)
        assert stored.store.collect(self.SHARD, {DIGEST}, limit) == Freed(1, len(ROWS))
        assert stored.listed() == set()

    def test_unfinished_writes_go_when_they_are_old(
        self, local_stored: Stored, source: Path
    ) -> None:
        local_stored.store.put_file(source)
        folder = local_stored.folder
        assert folder is not None
        staged = folder / f"{BLOB}#1"  # as a killed write leaves it
        staged.write_bytes(ROWS[:100])
        limit = now() - timedelta(hours=24)
        assert local_stored.store.forget_unfinished(limit) == Freed()
        local_stored.age(f"{BLOB}#1", hours=25)
        found = Freed(1, 100)
        assert local_stored.store.forget_unfinished(limit, dry_run=True) == found
        assert staged.exists()
        assert local_stored.store.forget_unfinished(limit) == found
        assert not staged.exists()
        assert local_stored.read(BLOB) == ROWS
