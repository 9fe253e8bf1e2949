"""One attempt at a job, with a trainer that does what it is told to."""

import itertools
import json
import re
import signal
import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from app.jobs.states import Reason, Status
from app.settings import Settings
from app.tables import LogRow
from tests.worker.jobs import add_job, event_types, make_spec, row
from worker import supervisor
from worker.slot import Bench, Slot
from worker.trainer import DRAINED
from worker.watch import Draining

ROWS = '{"prompt": "1", "completion": "1"}\n'


class Told:
    """A worker that was told to drain, and whose watch has not looked since."""

    def is_set(self) -> bool:
        return threading.current_thread() is threading.main_thread()

    def wait(self, _timeout: float) -> bool:
        return self.is_set()


@pytest.fixture
def settings(tmp_path: Path, migrated_url: str) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=migrated_url,
        dataset_roots=[tmp_path],
        model_roots=[tmp_path],
        trainer_module="tests.worker.scripted_trainer",
        retry_seconds=0,
    )


@pytest.fixture
def job_id(engine: Engine, settings: Settings, tmp_path: Path) -> str:
    """Its trainer drains as soon as it has started."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(8))
    spec = make_spec(
        base_model=f"file:{tmp_path / 'model'}", dataset_uri=f"file:{tmp_path / 'rows.jsonl'}"
    )
    job_id = add_job(engine, spec=spec)
    folder = settings.work_dir / job_id
    folder.mkdir(parents=True)
    (folder / "script.json").write_text(json.dumps({"then": "exit", "code": DRAINED}))
    return job_id


def attempt(settings: Settings, draining: Draining) -> None:
    bench = Bench(settings, Slot("slot-a", "cpu"), draining)
    assert bench.run_next()
    bench.close()


class TestTrainerThatHasDrainedUnasked:
    def test_is_no_death_where_the_worker_was_told_too(
        self, engine: Engine, settings: Settings, job_id: str
    ) -> None:
        """A service manager may tell every process, and the trainer be the first to hear."""
        attempt(settings, Told())
        assert (row(engine, job_id).status, row(engine, job_id).attempt) == (Status.QUEUED, 0)
        assert event_types(engine, job_id) == ["job.running", "job.requeued"]

    def test_is_one_where_it_was_not(self, engine: Engine, settings: Settings, job_id: str) -> None:
        attempt(settings, threading.Event())
        assert (row(engine, job_id).status, row(engine, job_id).attempt) == (Status.QUEUED, 1)


class TestTrainerThatIsKilled:
    """With SIGKILL, which says nothing of why: the kernel counts those that it kills for memory."""

    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_attempts": 1})

    @pytest.fixture(autouse=True)
    def killed(self, settings: Settings, job_id: str) -> None:
        script = settings.work_dir / job_id / "script.json"
        script.write_text(json.dumps({"then": "exit", "code": -signal.SIGKILL}))

    def test_by_somebody_it_is_lost(
        self, engine: Engine, settings: Settings, job_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "out_of_memory_kills", lambda: 0)
        attempt(settings, threading.Event())
        job = row(engine, job_id)
        assert (job.status, job.reason) == (Status.FAILED, Reason.WORKER_LOST)

    def test_for_the_machines_memory_it_is_told_so(
        self, engine: Engine, settings: Settings, job_id: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No test can make the kernel do it, so its count is told for it."""
        counts = itertools.count()
        monkeypatch.setattr(supervisor, "out_of_memory_kills", lambda: next(counts))
        attempt(settings, threading.Event())
        job = row(engine, job_id)
        assert (job.status, job.reason) == (Status.FAILED, Reason.HOST_OUT_OF_MEMORY)
        assert "SIGKILL" in (job.message or "")


def test_what_the_trainer_has_printed_comes_with_its_end(
    engine: Engine, settings: Settings, job_id: str
) -> None:
    attempt(settings, Told())
    attempt(settings, Told())
    with Session(engine) as session:
        lines = session.scalars(select(LogRow.text).order_by(LogRow.seq)).all()
    told = [fence for line in lines for fence in re.findall(r'"FLATLORA_FENCE": "(\d)"', line)]
    assert told == ["1", "2"], "each attempt prints its environment, and none of it comes twice"
