"""``flatlora gc``, as a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

from app.jobs.states import Status
from tests.app.house import House, environment


class TestCommand:
    def run(self, env: dict[str, str], *words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "app.cli.main", "gc", *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def test_it_says_what_it_has_removed(self, used: House) -> None:
        used.put(b"unneeded")
        used.job(Status.CANCELLED, days=31)
        env = environment(used)
        for words, is_dry in ((("--json", "--dry-run"), True), (("--json",), False)):
            done = self.run(env, *words)
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)
            assert (found["dry_run"], found["busy"], found["jobs"]) == (is_dry, False, 1)
            assert found["blobs"] == {"files": 1, "bytes": 8}
            assert found["bytes"] == 8
        told = self.run(env)
        assert told.returncode == 0
        assert "unreferenced files" in told.stdout
        assert used.ids() == set()

    def test_it_makes_no_database(self, tmp_path: Path) -> None:
        env = {**os.environ, "FLATLORA_DATA_DIR": str(tmp_path / "data")}
        done = self.run(env)
        assert done.returncode == 1
        assert "there is no database at" in done.stderr
        assert not (tmp_path / "data" / "flatlora.db").exists()

    def test_it_touches_no_database_of_another_version(self, tmp_path: Path) -> None:
        (tmp_path / "flatlora.db").touch()
        env = {**os.environ, "FLATLORA_DATA_DIR": str(tmp_path)}
        done = self.run(env)
        assert done.returncode == 1
        assert "is at migration none" in done.stderr
