"""A dataset's repository may hold programs; none of them is run, and none but a named one comes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.worker.hub import COMMITS, Hub, small_hub
from tests.worker.ordering import ROWS, order_of
from tests.worker.training.data.kept import read
from worker.process import TrainerProcess
from worker.training.config import Data, DataFile
from worker.training.errors import DatasetInvalid

SCRIPT = "from pathlib import Path\n\nPath({canary!r}).touch()\n"


@dataclass
class Repository:
    hub: Hub
    folder: Path
    script: bytes

    def put(self, path: str, body: bytes) -> None:
        self.hub.files[COMMITS[0], path] = body

    def brought(self, path: str) -> DataFile:
        """By a process, as a worker has it brought into a job's folder."""
        uri = f"hf://datasets/org/name/{path}"
        order = order_of(uri, self.folder)
        with order.written() as written, TrainerProcess("hub", self.folder, str(written)) as hub:
            (told,) = [said for said in hub.messages() if said["kind"] != "phase"]
            assert hub.wait() == 0
        found = told["result"]
        return DataFile(uri, self.folder / "train", found["filename"], found["sha256"])


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """``name.py`` beside the rows is what the hub's library once loaded a dataset by."""
    canary, folder = tmp_path / "canary", tmp_path / "job"
    script = SCRIPT.format(canary=str(canary)).encode()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with small_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        folder.mkdir()
        repository = Repository(hub, folder, script)
        for path, body in {"name.py": script, "__init__.py": script, "rows.jsonl": ROWS}.items():
            repository.put(path, body)
        yield repository
        assert not canary.exists()
        assert list(tmp_path.rglob("*.py")) == []


def test_the_canary_is_made_by_a_script_that_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    exec(SCRIPT.format(canary=str(canary)), {"__name__": "name"})  # noqa: S102 - that is the point
    assert canary.exists()


def test_rows_beside_a_loading_script_come_without_it(repository: Repository) -> None:
    dataset = repository.brought("rows.jsonl")
    assert repository.hub.fetched() == {"rows.jsonl"}
    assert len(read(dataset, Data()).conversations) == 1000


@pytest.mark.parametrize("path", ["name.py", "scripts/rows.py", "rows.py.jsonl"])
def test_a_script_that_is_named_as_the_rows_is_read_and_is_none(
    repository: Repository, path: str
) -> None:
    repository.put(path, repository.script)
    dataset = repository.brought(path)
    assert dataset.path.read_bytes() == repository.script
    assert repository.hub.fetched() == {path}
    with pytest.raises(DatasetInvalid) as caught:
        read(dataset, Data())
    assert caught.value.message


def test_rows_in_a_file_that_is_called_as_a_script_are_rows(repository: Repository) -> None:
    repository.put("rows.py", ROWS)
    dataset = repository.brought("rows.py")
    assert len(read(dataset, Data()).conversations) == 1000
