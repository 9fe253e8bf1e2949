"""A run that is stopped, killed or robbed of a checkpoint makes the adapter of an unbroken one."""

import json
import random
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from app.failpoints import Point
from tests.worker.training.canary import pickled
from tests.worker.training.conftest import MARKED, Recorder, folder_bytes, make_tokenizer
from tests.worker.training.killing import describe, kill_at_random
from worker.training import checkpoints
from worker.training.checkpoints import MANIFEST
from worker.training.config import TrainingJob
from worker.training.errors import Stopped
from worker.training.files import sha256_of
from worker.training.run import run

Make = Callable[..., TrainingJob]


@pytest.fixture
def job(make_job: Make) -> TrainingJob:
    return make_job()


@pytest.fixture
def unbroken(job: TrainingJob, tmp_path: Path) -> dict[str, bytes]:
    run(job, tmp_path / "unbroken", Recorder(), Recorder())
    return folder_bytes(tmp_path / "unbroken" / "adapter")


def stop_after(job: TrainingJob, folder: Path, step: int) -> None:
    recorder = Recorder(stop=(step, "drain"))
    with pytest.raises(Stopped, match="drain"):
        run(job, folder, recorder, recorder)


def finish(job: TrainingJob, folder: Path) -> Recorder:
    recorder = Recorder()
    run(job, folder, recorder, recorder)
    return recorder


class Telling(Recorder):
    """Keeps what is said of checkpoints."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.checkpoints: list[dict[str, Any]] = []

    def event(self, type_: str, message: str, **data: Any) -> None:
        super().event(type_, message, **data)
        if type_ == "job.checkpoint":
            self.checkpoints.append(data)


class TestDrained:
    @pytest.mark.parametrize("step", [0, 3, 4, 7])
    def test_at_any_step_it_goes_on_bit_for_bit(
        self, job: TrainingJob, unbroken: dict[str, bytes], tmp_path: Path, step: int
    ) -> None:
        folder = tmp_path / "drained"
        stop_after(job, folder, step)
        resumed = finish(job, folder)
        assert folder_bytes(folder / "adapter") == unbroken
        assert [done["step"] for done in resumed.steps] == list(range(step + 1, 9))

    def test_several_times(
        self, job: TrainingJob, unbroken: dict[str, bytes], tmp_path: Path
    ) -> None:
        for step in (1, 3, 6):
            stop_after(job, tmp_path / "drained", step)
        finish(job, tmp_path / "drained")
        assert folder_bytes(tmp_path / "drained" / "adapter") == unbroken


class TestKilled:
    @pytest.mark.slow
    @pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.torture)])
    def test_at_random_moments_it_goes_on_bit_for_bit(
        self, job: TrainingJob, unbroken: dict[str, bytes], tmp_path: Path, times: int
    ) -> None:
        folder = tmp_path / "killed"
        describe(job, folder)
        seed = secrets.randbelow(10**6)
        kill_at_random(folder, random.Random(seed), times=times)
        finish(job, folder)
        assert folder_bytes(folder / "adapter") == unbroken, f"seed {seed}"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda folder: damage(folder / "adapter.safetensors"),
    "an empty file": lambda folder: (folder / "optimizer.safetensors").write_bytes(b""),
    "a missing file": lambda folder: (folder / "state.json").unlink(),
    "a missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a torn manifest": lambda folder: (folder / "manifest.json").write_text('{"adap'),
}


class TestCheckpoints:
    @pytest.mark.parametrize("name", DAMAGES)
    def test_a_damaged_one_is_refused_and_the_one_before_is_used(
        self, job: TrainingJob, unbroken: dict[str, bytes], tmp_path: Path, name: str
    ) -> None:
        folder = tmp_path / "damaged"
        stop_after(job, folder, 5)
        DAMAGES[name](folder / "checkpoints" / "ckpt-000000005")
        resumed = finish(job, folder)
        assert folder_bytes(folder / "adapter") == unbroken
        types = [type_ for type_, _ in resumed.events]
        assert types[:2] == ["job.checkpoint_refused", "job.resumed"]
        assert resumed.steps[0]["step"] == 5

    def test_refused_ones_do_not_crowd_out_what_comes_after_them(
        self, make_job: Make, job: TrainingJob, tmp_path: Path
    ) -> None:
        folder, other = tmp_path / "other", make_job(sigma=0.1)
        stop_after(job, folder, 7)
        stop_after(other, folder, 3)
        assert finish(other, folder).steps[0]["step"] == 4

    def test_with_all_damaged_it_starts_again(
        self, job: TrainingJob, unbroken: dict[str, bytes], tmp_path: Path
    ) -> None:
        folder = tmp_path / "damaged"
        stop_after(job, folder, 5)
        for checkpoint in (folder / "checkpoints").iterdir():
            damage(checkpoint / "adapter.safetensors")
        assert finish(job, folder).steps[0]["step"] == 1
        assert folder_bytes(folder / "adapter") == unbroken

    def test_one_of_other_settings_is_not_used(
        self, make_job: Make, job: TrainingJob, tmp_path: Path
    ) -> None:
        folder = tmp_path / "other"
        stop_after(job, folder, 5)
        resumed = finish(make_job(sigma=0.1), folder)
        assert resumed.steps[0]["step"] == 1
        assert "other settings" in resumed.events[0][1]

    def test_one_of_other_tokens_is_not_used(self, job: TrainingJob, tmp_path: Path) -> None:
        """Such as those of a chat template that prints the date, on another day."""
        folder, base = tmp_path / "run", tmp_path / "base"
        shutil.copytree(job.base_model.path, base)
        make_tokenizer("{{ strftime_now('%d %b %Y') }}\n" + MARKED).save_pretrained(base)
        first, later = (datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2))
        job = replace(job, base_model=replace(job.base_model, path=base), clock=first)
        stop_after(job, folder, 3)
        stop_after(job, folder, 5)
        assert finish(job, folder).steps[0]["step"] == 6
        resumed = finish(replace(job, clock=later), folder)
        assert resumed.steps[0]["step"] == 1
        assert "other settings" in resumed.events[0][1]

    def test_a_torn_write_is_not_seen(
        self, job: TrainingJob, unbroken: dict[str, bytes], tmp_path: Path
    ) -> None:
        folder = tmp_path / "torn"
        stop_after(job, folder, 5)
        checkpoints = folder / "checkpoints"
        shutil.copytree(checkpoints / "ckpt-000000005", checkpoints / "ckpt-000000006.tmp")
        assert finish(job, folder).steps[0]["step"] == 6
        assert folder_bytes(folder / "adapter") == unbroken

    def test_each_is_told_with_its_size_and_those_that_are_there(
        self, job: TrainingJob, tmp_path: Path
    ) -> None:
        told = Telling()
        run(job, tmp_path, told, told)
        assert [data["step"] for data in told.checkpoints] == [2, 4, 6, 8]
        assert [data["kept"] for data in told.checkpoints] == [[2], [4, 2], [6, 4], [8, 6]]
        assert all(data["verified"] for data in told.checkpoints)
        files = (tmp_path / "checkpoints" / "ckpt-000000008").iterdir()
        assert told.checkpoints[-1]["size"] == sum(path.stat().st_size for path in files)

    def test_one_that_reads_back_otherwise_is_told_and_those_before_it_stay(
        self, job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        damaged: list[Path] = []

        def damage_the_third(point: Point) -> None:
            path = tmp_path / "checkpoints" / "ckpt-000000006" / "optimizer.safetensors"
            if point is Point.CHECKPOINT_RENAMED and path.exists() and not damaged:
                damage(path)
                damaged.append(path)

        monkeypatch.setattr(checkpoints, "failpoint", damage_the_third)
        told = Telling(stop=(6, "drain"))
        with pytest.raises(Stopped):
            run(job, tmp_path, told, told)
        assert [data["verified"] for data in told.checkpoints] == [True, True, False, True]
        assert [data["kept"] for data in told.checkpoints[2:]] == [[6, 4, 2], [6, 4]]

    def test_the_newest_two_are_kept(self, job: TrainingJob, tmp_path: Path) -> None:
        finish(job, tmp_path)
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["ckpt-000000006", "ckpt-000000008"]

    def test_nothing_in_them_is_pickled(self, job: TrainingJob, tmp_path: Path) -> None:
        finish(job, tmp_path)
        suffixes = {path.suffix for path in (tmp_path / "checkpoints").rglob("*.*")}
        assert suffixes == {".safetensors", ".json"}

    @pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors"])
    def test_nor_is_a_pickle_opened_that_somebody_has_put_there(
        self, job: TrainingJob, tmp_path: Path, name: str
    ) -> None:
        stop_after(job, tmp_path, 5)
        canary = tmp_path / "canary"
        (folder,) = (tmp_path / "checkpoints").glob("ckpt-*5")
        for beside in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
            (folder / beside).write_bytes(pickled(canary))
        (folder / name).write_bytes(pickled(canary))
        files = [path for path in folder.iterdir() if path.name != MANIFEST]
        (folder / MANIFEST).write_text(json.dumps({p.name: sha256_of(p) for p in files}))
        with pytest.raises(SafetensorError):
            finish(job, tmp_path)
        assert not canary.exists()
