"""The doctor finds what is really broken, says what mends it, and hangs on nothing."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.doctor import machine
from app.doctor.examination import CHECKS
from app.doctor.finding import Check, Finding, ok
from app.doctor.gpu import GPU
from app.settings import Settings
from tests.app.doctor.patients import (
    FAKE_TORCH,
    Make,
    answering,
    empty,
    levels,
    look,
    silent,
)
from tests.faults.servers import RedisServer
from tests.s3 import S3Server


class TestExamination:
    def test_what_hangs_or_raises_late_hides_nothing_that_came_before(self, make: Make) -> None:
        released = threading.Event()

        def hangs(_: Settings) -> Iterator[Finding]:
            yield ok("first", "seen")
            released.wait()

        def breaks(_: Settings) -> Iterator[Finding]:
            yield ok("first", "seen")
            raise RuntimeError("of its own")

        for run, said in ((hangs, "no answer within 1 s"), (breaks, "RuntimeError: of its own")):
            found = look(Check("check", run, "expected", "mend", seconds=1), make())
            assert levels(found) == {"first": "ok", "check": "fail"}
            assert found["check"].found == said
        released.set()

    def test_none_takes_long_but_torch(self) -> None:
        assert all(check.seconds <= 6 for check in CHECKS if check is not GPU)
        assert all(check.mend for check in CHECKS)


def doctor(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command, with no setting but these."""
    theirs = {name: value for name, value in os.environ.items() if "FLATLORA" not in name}
    return subprocess.run(
        [sys.executable, "-m", "app.cli.main", "doctor", *arguments],
        env={**theirs, "FLATLORA_DATA_DIR": str(folder / "data"), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


class TestCommand:
    @pytest.fixture
    def quick(self, tmp_path: Path) -> dict[str, str]:
        """Without the seconds that torch takes, and without a hub."""
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "torch.py").write_text(f"GPUS, BROKEN = 0, None\n{FAKE_TORCH}")
        root = str(Path(__file__).parents[3])
        return {"PYTHONPATH": f"{tmp_path / 'fake'}:{root}", "HF_HUB_OFFLINE": "1"}

    def test_before_the_first_start_all_is_well_and_nothing_is_made(
        self, tmp_path: Path, quick: dict[str, str]
    ) -> None:
        done = doctor(tmp_path, **quick)
        assert done.returncode == 0, done.stdout
        assert "0 fail" in done.stdout
        assert done.stderr == ""
        assert not (tmp_path / "data").exists()

    def test_a_cluster_in_order(
        self,
        tmp_path: Path,
        quick: dict[str, str],
        migrated_postgres_url: str,
        redis: RedisServer,
        s3_server: S3Server,
        s3_url: str,
    ) -> None:
        with answering(empty) as hub:
            environment = {
                **quick,
                **s3_server.environment,
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": hub,
                "FLATLORA_DATABASE_URL": migrated_postgres_url,
                "FLATLORA_BROKER_URL": redis.url(),
                "FLATLORA_STORE_URL": s3_url,
                "FLATLORA_DOWNLOADS": "redirect",
                "FLATLORA_MAX_DATASET_BYTES": "1000",
            }
            done = doctor(tmp_path, "--json", **environment)
            if "no answer within" in done.stdout:  # of a machine that did something else
                done = doctor(tmp_path, "--json", **environment)
        assert done.returncode == 0, done.stdout
        answer = json.loads(done.stdout)
        assert answer["ok"]
        told = {check["name"]: check["level"] for check in answer["checks"]}
        assert told.pop("workers") == "warn"  # none was started
        told.pop("open files")  # this machine's
        assert told.pop("database") in {"ok", "warn"}  # it may be slow for a moment
        assert told == dict.fromkeys((
            "program", "data folder", "disk", "port", "clock", "schema", "queue",
            "outbox", "broker", "redis persistence", "redis eviction", "redis writes", "store",
            "store creation", "store URLs", "hub", "torch", "gpu",
        ), "ok")  # fmt: skip

    def test_whatever_is_broken_is_told_for_itself_without_a_secret_or_a_traceback(
        self, tmp_path: Path, quick: dict[str, str]
    ) -> None:
        (tmp_path / "fake" / "torch.py").write_text("raise OSError('no libcudart')")
        (tmp_path / "file").touch()
        with answering(empty) as taken, silent() as port:
            environment = {
                **quick,
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": "http://127.0.0.1:1",
                "FLATLORA_DATA_DIR": str(tmp_path / "file"),
                "FLATLORA_PORT": taken.rpartition(":")[2],
                "FLATLORA_API_KEY": "c4n4ry-key",
                "FLATLORA_DATABASE_URL": f"postgresql://me:c4n4ry-pw@127.0.0.1:{port}/x",
                "FLATLORA_BROKER_URL": f"redis://:c4n4ry-pw@127.0.0.1:{port}/0",
                "FLATLORA_STORE_URL": "s3://bucket",
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "AKIAC4N4RYC4N4RYC4N4",
                "AWS_SECRET_ACCESS_KEY": "c4n4ry-secret",
            }
            started = time.monotonic()
            as_json = doctor(tmp_path, "--json", **environment)
            waited = time.monotonic() - started
            for_people = doctor(tmp_path, **environment)
        assert as_json.returncode == for_people.returncode == 1
        told = {check["name"]: check for check in json.loads(as_json.stdout)["checks"]}
        failed = {name for name, check in told.items() if check["level"] == "fail"}
        assert failed == {"data folder", "port", "database", "broker", "store", "torch"}
        assert told["hub"]["level"] == "warn"
        assert waited < 25
        for done in (as_json, for_people):
            written = (done.stdout + done.stderr).lower()
            assert "c4n4ry" not in written
            assert "traceback" not in written
        for check in told.values():
            if check["level"] != "ok":
                assert check["mend"] in for_people.stdout

    def test_the_disk_that_is_left_is_that_of_the_data_folder(self, tmp_path: Path) -> None:
        """And not that of the folder it is run in."""
        (finding,) = machine.disk(Settings(data_dir=tmp_path / "not" / "there"))
        assert finding.found.endswith(str(tmp_path))
        free = shutil.disk_usage(tmp_path).free / 2**30
        assert float(finding.found.split()[0]) == pytest.approx(free, abs=2)
