"""One slot for each device, and each trainer sees its own alone."""

import json
import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine

from app.jobs.states import Status
from app.settings import Settings
from tests.app.conftest import make_settings
from tests.app.service import make_model
from tests.worker.jobs import add_job, make_spec, row
from tests.worker.scripted_trainer import told_environment
from worker.devices import CPU, gpus, slots
from worker.slot import Bench, Slot


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's ``nvidia-smi``, which says and does what is written into it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "nvidia-smi"


def answer(driver: Path, script: str) -> None:
    driver.write_text(f"#!/bin/sh\n{script}\n")
    driver.chmod(0o755)


class TestSlots:
    def test_what_is_configured_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        assert slots(["3", "cpu", "cpu"]) == ["3", "cpu", "cpu"]

    def test_the_settings_take_a_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLATLORA_DEVICES", "0, 1,cpu")
        assert slots(Settings().devices) == ["0", "1", "cpu"]

    @pytest.mark.parametrize(
        ("visible", "found"),
        [
            ("0", ["0"]),
            (" 2, 0 ", ["2", "0"]),
            ("GPU-1f,MIG-2e/1/0", ["GPU-1f", "MIG-2e/1/0"]),
            ("", []),
            ("-1", []),
            ("0,-1,1", ["0"]),  # CUDA stops to read at the first that is none
            ("NoDevFiles", []),
        ],
    )
    def test_those_that_are_to_be_seen(
        self, monkeypatch: pytest.MonkeyPatch, visible: str, found: list[str]
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus() == found
        assert slots([]) == (found or [CPU])

    def test_else_the_driver_is_asked(self, driver: Path) -> None:
        answer(driver, "printf '0\\n1\\n'")
        assert slots([]) == ["0", "1"]

    @pytest.mark.parametrize(
        "script", ["exit 9", "echo 'has failed to communicate' >&2; exit 9", "exit 0"]
    )
    def test_without_one_that_works_there_is_one_cpu(self, driver: Path, script: str) -> None:
        assert slots([]) == [CPU]
        answer(driver, script)
        assert slots([]) == [CPU]


class TestTrainer:
    @pytest.mark.parametrize(
        ("device", "visible"), [("1", "1"), ("GPU-1f", "GPU-1f"), ("cpu", ""), (None, "0,1,2")]
    )
    def test_it_sees_the_device_of_its_slot_alone(
        self,
        engine: Engine,
        migrated_url: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        device: str | None,
        visible: str,
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
        settings = make_settings(
            tmp_path, migrated_url, trainer_module="tests.worker.scripted_trainer"
        )
        make_model(tmp_path / "models" / "tiny")
        (tmp_path / "rows" / "rows.jsonl").write_text("{}\n")
        job_id = add_job(engine, spec=make_spec(base_model="file:tiny", dry_run=True))
        folder = settings.work_dir / job_id
        folder.mkdir(parents=True)
        says = [{"kind": "result", "result": {"steps": 0}}]
        (folder / "script.json").write_text(json.dumps({"then": "exit", "says": says}))
        bench = Bench(settings, Slot("w1", device), threading.Event())
        assert bench.run_next()
        bench.close()
        job = row(engine, job_id)
        assert (job.status, job.message) == (Status.SUCCEEDED, None)
        found = told_environment(folder)
        assert found["CUDA_VISIBLE_DEVICES"] == visible
        assert (found["FLATLORA_JOB_ID"], found["FLATLORA_FENCE"]) == (job_id, "1")
