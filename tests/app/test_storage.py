"""What the store holds, and what it makes of bytes that a crash has damaged."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.storage import ArtifactStore, Damaged, make_private

ROWS = b'{"prompt": "1 + 1", "completion": "2"}\n' * 1000
DIGEST = hashlib.sha256(ROWS).hexdigest()

PUT_AND_FETCH = """
import resource, sys
from pathlib import Path
from app.storage import ArtifactStore

source, folder = map(Path, sys.argv[1:])
store = ArtifactStore.local(folder / "store")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
digest = store.put_file(source)
store.put_file(source, digest)
store.fetch(digest, folder / "copy")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore.local(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    return path


def blob(tmp_path: Path) -> Path:
    return tmp_path / "store" / "blobs" / DIGEST[:2] / DIGEST


class TestPut:
    def test_it_returns_the_hash_under_which_the_bytes_lie(
        self, store: ArtifactStore, source: Path, tmp_path: Path
    ) -> None:
        assert store.put_file(source) == DIGEST
        assert blob(tmp_path).read_bytes() == ROWS

    def test_the_same_bytes_again_write_nothing(
        self, store: ArtifactStore, source: Path, tmp_path: Path
    ) -> None:
        store.put_file(source)
        before = blob(tmp_path).stat()
        store.put_file(source)
        after = blob(tmp_path).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    @pytest.mark.parametrize(
        "torn", [b"", ROWS[:-1], ROWS + b"\0", bytes(len(ROWS)), b"[" + ROWS[1:]]
    )
    def test_putting_the_bytes_again_repairs_damaged_ones(
        self, store: ArtifactStore, source: Path, tmp_path: Path, torn: bytes
    ) -> None:
        store.put_file(source)
        blob(tmp_path).write_bytes(torn)
        assert store.put_file(source, DIGEST) == DIGEST
        assert blob(tmp_path).read_bytes() == ROWS

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files by /proc")
    def test_the_file_and_every_folder_to_it_are_on_disk_when_it_returns(
        self,
        store: ArtifactStore,
        source: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        synced, fsync = [], os.fsync

        def watched(descriptor: int) -> None:
            synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", watched)
        store.put_file(source)
        folder = tmp_path / "store"
        assert synced == [blob(tmp_path), blob(tmp_path).parent, folder / "blobs", folder]
        synced.clear()
        store.put_manifest("job_1", {})
        manifest = folder / "jobs" / "job_1" / "manifest.json"
        assert synced == [manifest, manifest.parent, folder / "jobs", folder]

    def test_a_large_file_goes_in_and_out_in_little_memory(self, tmp_path: Path) -> None:
        size = 200 << 20
        source = tmp_path / "large"
        with source.open("wb") as file:
            file.truncate(size)
        done = subprocess.run(
            [sys.executable, "-c", PUT_AND_FETCH, source, tmp_path],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        unit = 1 if sys.platform == "darwin" else 1024
        assert int(done.stdout) * unit < size / 3
        assert (tmp_path / "copy").stat().st_size == size


class TestFetch:
    def test_it_writes_the_bytes(self, store: ArtifactStore, source: Path, tmp_path: Path) -> None:
        store.put_file(source)
        store.fetch(DIGEST, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == ROWS

    @pytest.mark.parametrize("torn", [b"", bytes(len(ROWS)), None])
    def test_damaged_bytes_are_said_to_be_so_and_not_written(
        self, store: ArtifactStore, source: Path, tmp_path: Path, torn: bytes | None
    ) -> None:
        store.put_file(source)
        if torn is None:
            blob(tmp_path).unlink()
        else:
            blob(tmp_path).write_bytes(torn)
        with pytest.raises(Damaged, match=DIGEST):
            store.fetch(DIGEST, tmp_path / "copy")
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "store"}


class TestManifest:
    def test_the_first_one_stays(self, store: ArtifactStore) -> None:
        assert store.put_manifest("job_1", {"a": 1}) == {"a": 1}
        assert store.put_manifest("job_1", {"a": 2}) == {"a": 1}

    @pytest.mark.parametrize("torn", [b"", b'{"a"', bytes(8)])
    def test_a_torn_one_is_replaced(
        self, store: ArtifactStore, tmp_path: Path, torn: bytes
    ) -> None:
        store.put_manifest("job_1", {"a": 1})
        path = tmp_path / "store" / "jobs" / "job_1" / "manifest.json"
        path.write_bytes(torn)
        assert store.put_manifest("job_1", {"a": 2}) == {"a": 2}
        assert json.loads(path.read_bytes()) == {"a": 2}


class TestPrivate:
    def test_nobody_else_may_enter_what_is_made(self, tmp_path: Path) -> None:
        ArtifactStore.local(tmp_path / "data" / "artifacts")
        for folder in (tmp_path / "data", tmp_path / "data" / "artifacts"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_a_folder_that_is_there_keeps_its_rights(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o755)
        make_private(tmp_path)
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
