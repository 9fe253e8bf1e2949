"""Of a job that is over its description and log stay on the worker; of one that is gone nothing."""

from pathlib import Path

import pytest
from sqlalchemy import Engine, delete
from sqlalchemy.orm import Session

from app.ids import new_id
from app.jobs.states import Status
from app.tables import JobRow
from tests.worker.jobs import add_job, change
from worker.claims import Claims
from worker.folders import Folders


def make(work: Path, job_id: str, *names: str) -> Path:
    folder = work / job_id
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


ALL = ("job.json", "trainer.log", "trainer.log.id", "dataset/rows", "checkpoints/ckpt-1/state")


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def remove(engine: Engine, job_id: str) -> None:
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        session.execute(delete(JobRow).where(JobRow.id == job_id))


@pytest.fixture
def folders(claims: Claims, tmp_path: Path) -> Folders:
    return Folders(claims, tmp_path)


def test_those_of_deleted_jobs_go_and_all_others_stay(
    engine: Engine, folders: Folders, tmp_path: Path
) -> None:
    jobs = {status: make(tmp_path, add_job(engine, status=status), *ALL) for status in Status}
    gone = [
        make(tmp_path, new_id("job"), *ALL), make(tmp_path, new_id("job"), "job.json")
    ]  # fmt: skip
    (tmp_path / "somebody's").mkdir()
    assert folders.forget_gone() == 2
    assert not any(folder.exists() for folder in gone)
    assert (tmp_path / "somebody's").exists()
    assert {len(left(folder)) for folder in jobs.values()} == {5}
    assert folders.forget_gone() == 0


def test_more_than_one_page_of_them(
    engine: Engine, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.folders.AT_ONCE", 2)
    kept = [make(tmp_path, add_job(engine), "job.json") for _ in range(3)]
    for _ in range(4):
        make(tmp_path, new_id("job"), "job.json")
    assert folders.forget_gone() == 4
    assert set(tmp_path.glob("job_*")) == set(kept)


def test_in_a_database_without_jobs_no_work_is_thrown_away(
    engine: Engine, folders: Folders, tmp_path: Path
) -> None:
    """It may be the wrong one. A folder that was cleared when its job ended costs nothing."""
    ended, held = add_job(engine, status=Status.FAILED), add_job(engine)
    cleared = make(tmp_path, ended, "job.json", "trainer.log")
    working = make(tmp_path, held, *ALL)
    for job_id in (ended, held):
        remove(engine, job_id)
    assert folders.forget_gone() == 1
    assert (cleared.exists(), working.exists()) == (False, True)


def test_a_paused_job_keeps_what_it_goes_on_from(
    engine: Engine, folders: Folders, tmp_path: Path
) -> None:
    job_id = add_job(engine)
    folder = make(tmp_path, job_id, *ALL)
    for status in (Status.PAUSING, Status.PAUSED):
        change(engine, job_id, status=status)
        folders.sweep()
        assert len(left(folder)) == 5
    change(engine, job_id, status=Status.CANCELLED)
    folders.sweep()
    assert left(folder) == {"job.json", "trainer.log"}
