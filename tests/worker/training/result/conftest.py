"""One finished adapter for all tests, and copies of it to be spoilt."""

import shutil
from pathlib import Path

import pytest

from tests.worker.training.result.finished import finish, job_on
from worker.training.config import TrainingJob


@pytest.fixture(scope="session")
def pristine(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingJob, Path]:
    folder = tmp_path_factory.mktemp("finished")
    job = job_on(base_folder, folder / "rows.jsonl")
    finish(job, folder)
    return job, folder


@pytest.fixture
def job(pristine: tuple[TrainingJob, Path]) -> TrainingJob:
    return pristine[0]


@pytest.fixture
def adapter(pristine: tuple[TrainingJob, Path], tmp_path: Path) -> Path:
    """The finished folder, in ``tmp_path`` beside the probe."""
    shutil.copytree(pristine[1], tmp_path, dirs_exist_ok=True)
    return tmp_path / "adapter"
