"""One slot for each device or some together, and each trainer sees its own alone."""

import json
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine

from app.devices import CPU
from app.jobs.states import Status
from app.settings import Settings
from tests.app.conftest import make_settings
from tests.app.service import make_model
from tests.worker.jobs import add_job, make_spec, row
from tests.worker.scripted_trainer import told_environment
from worker.devices import first_of, gpus, one_slot, slots, visible
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

    def test_a_slot_may_have_several(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLATLORA_DEVICES", "0+1, 2, cpu+cpu")
        found = slots(Settings().devices)
        assert [Slot("s", device).size for device in found] == [2, 1, 2]
        assert [visible(device) for device in found] == ["0,1", "2", ""]
        assert (first_of("0+1", 1), first_of("0+1", 2)) == ("0", "0+1")
        assert Slot("s", None).size == 1

    @pytest.mark.parametrize(
        ("devices", "problem"),
        [
            ("0+", "joined by +"), ("0,+1", "joined by +"), ("0+cpu", "not both"),
            ("GPU-1+GPU-1", "once"),
        ],
    )  # fmt: skip
    def test_one_that_no_job_could_use_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, devices: str, problem: str
    ) -> None:
        monkeypatch.setenv("FLATLORA_DEVICES", devices)
        with pytest.raises(ValidationError, match=problem):
            Settings()

    @pytest.mark.parametrize(
        ("configured", "seen", "device"),
        [
            ([], "", None), ([], "3", None), ([], "0,1", "0+1"), (["1"], "0,1", "1"),
            (["0", "1+2"], "", "0+1+2"), (["cpu", "0"], "", "0"), (["cpu", "cpu"], "", "cpu+cpu"),
        ],
    )  # fmt: skip
    def test_an_embedded_worker_has_one_of_all(
        self,
        monkeypatch: pytest.MonkeyPatch,
        configured: list[str],
        seen: str,
        device: str | None,
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        assert one_slot(configured) == device

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
        ("device", "visible"),
        [
            ("1", "1"), ("GPU-1f", "GPU-1f"), ("cpu", ""), (None, "0,1,2"),
            ("0+2", "0"),  # a dry run needs one at most, whatever the job asks for
        ],
    )  # fmt: skip
    def test_it_sees_the_device_of_its_slot_alone(
        self,
        engine: Engine,
        migrated_url: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        device: str | None,
        visible: str,
    ) -> None:
        found = self.environment(
            engine, migrated_url, tmp_path, monkeypatch, device, dry_run=True, gpus=2
        )
        assert found["CUDA_VISIBLE_DEVICES"] == visible
        assert found["FLATLORA_DEVICE"] == (device or "").partition("+")[0]
        assert found["FLATLORA_FENCE"] == "1"

    @pytest.mark.parametrize(
        ("device", "seen"), [("0+1", "0,1"), ("0+1+2", "0,1"), ("cpu+cpu", "")]
    )
    def test_that_of_a_job_of_several_sees_as_many(
        self,
        engine: Engine,
        migrated_url: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        device: str,
        seen: str,
    ) -> None:
        found = self.environment(
            engine, migrated_url, tmp_path, monkeypatch, device, dry_run=False, gpus=2
        )
        assert found["CUDA_VISIBLE_DEVICES"] == seen
        assert found["FLATLORA_DEVICE"] == first_of(device, 2)
        assert found["FLATLORA_STALL_SECONDS"] == "1800"

    def environment(
        self,
        engine: Engine,
        migrated_url: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        device: str | None,
        *,
        dry_run: bool,
        gpus: int,
    ) -> dict[str, str]:
        """Of the trainer of a job that an embedded worker with such a slot has run."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
        settings = make_settings(
            tmp_path, migrated_url, trainer_module="tests.worker.scripted_trainer", retry_seconds=0
        )
        make_model(tmp_path / "models" / "tiny")
        (tmp_path / "rows" / "rows.jsonl").write_text("{}\n")
        resources = {"gpus": gpus}
        spec = make_spec(base_model="file:tiny", dry_run=dry_run, resources=resources)
        job_id = add_job(engine, spec=spec)
        folder = settings.work_dir / job_id
        folder.mkdir(parents=True)
        says = [{"kind": "result", "result": {"steps": 0}}]
        (folder / "script.json").write_text(json.dumps({"then": "exit", "says": says}))
        bench = Bench(settings, Slot("w1", device), threading.Event())
        assert bench.run_next()
        bench.close()
        if dry_run:
            job = row(engine, job_id)
            assert (job.status, job.message) == (Status.SUCCEEDED, None)
        found = told_environment(folder)
        assert found["FLATLORA_JOB_ID"] == job_id
        return found
