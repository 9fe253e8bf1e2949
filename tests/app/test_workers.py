"""Who works is shown as it is, and a worker says at its start what it lacks."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import insert
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.jobs.states import Status
from app.migrate import head
from app.settings import Settings
from app.tables import WorkerRow
from tests.app.service import Service, running

POSTGRES = "postgresql://host/db"


def add_worker(service: Service, name: str, *, silent: float = 0, **values: Any) -> None:
    row = {
        "name": name, "host": "h", "pid": 7, "version": "0.2.0", "state": "active",
        "slots": [{"name": f"{name}-{device}", "device": device} for device in ("0", "1")],
        "started_at": now(-1000), "heartbeat_at": now(-silent),
    }  # fmt: skip
    with Session(service.engine) as session, session.begin():
        session.execute(insert(WorkerRow).values(row | values))


class TestList:
    def test_none_in_embedded_mode(self, any_service: Service) -> None:
        assert any_service.get("/workers") == {"items": []}

    def test_each_with_its_slots_and_what_they_run(self, any_service: Service) -> None:
        service = any_service
        add_worker(service, "b")
        add_worker(service, "a", state="draining")
        job_id, ended = (service.submit()["id"] for _ in range(2))
        service.set(job_id, status=Status.CANCELLING, worker="b-1")
        service.set(ended, status=Status.SUCCEEDED, worker="b-0")
        first, second = service.get("/workers")["items"]
        assert (first["name"], first["state"]) == ("a", "draining")
        assert [slot["job_id"] for slot in first["slots"]] == [None, None]
        assert (second["name"], second["state"], second["version"]) == ("b", "active", "0.2.0")
        assert second["slots"] == [
            {"name": "b-0", "device": "0", "job_id": None},
            {"name": "b-1", "device": "1", "job_id": job_id},
        ]

    def test_one_that_was_not_heard_for_longer_than_a_lease_is_lost(
        self, any_service: Service
    ) -> None:
        lease = any_service.settings.lease_seconds
        add_worker(any_service, "heard", silent=lease - 10)
        add_worker(any_service, "lost", silent=lease + 1)
        add_worker(any_service, "lost-draining", silent=lease + 1, state="draining")
        states = {item["name"]: item["state"] for item in any_service.get("/workers")["items"]}
        assert states == {"heard": "active", "lost": "lost", "lost-draining": "lost"}


def run(tmp_path: Path, *arguments: str, **values: str) -> "subprocess.CompletedProcess[str]":
    own = {name: value for name, value in os.environ.items() if "FLATLORA" not in name}
    given = {"FLATLORA_DATA_DIR": str(tmp_path / "data")} | values
    return subprocess.run(
        [sys.executable, "-m", "app.cli.main", *arguments],
        env=own | given,
        capture_output=True,
        text=True,
        check=False,
    )


class TestCommand:
    def test_without_a_broker_it_says_what_to_set(self, tmp_path: Path) -> None:
        done = run(tmp_path, "worker")
        assert done.returncode == 2
        told = " ".join(done.stderr.split())
        assert "a worker needs a broker, and FLATLORA_BROKER_URL is not set" in told
        assert "FLATLORA_DATABASE_URL=postgresql://" in told
        assert "flatlora up" in told
        assert not (tmp_path / "data").exists()

    def test_a_broker_with_sqlite_is_refused(self, tmp_path: Path) -> None:
        done = run(tmp_path, "worker", FLATLORA_BROKER_URL="redis://127.0.0.1")
        assert done.returncode == 2
        assert "FLATLORA_BROKER_URL: " in done.stderr
        assert "workers of a cluster share a Postgres database" in done.stderr

    def test_check_says_by_its_code_whether_one_works_here(self, tmp_path: Path) -> None:
        alive = Settings(data_dir=tmp_path / "data").alive_file
        absent = run(tmp_path, "worker", "--check")
        assert (absent.returncode, "no worker works in" in absent.stderr) == (1, True)
        alive.parent.mkdir()
        alive.touch()
        assert run(tmp_path, "worker", "--check").returncode == 0
        os.utime(alive, (time.time() - 100, time.time() - 100))
        silent = run(tmp_path, "worker", "--check")
        assert (silent.returncode, "was last seen 10" in silent.stderr) == (1, True)

    def test_migrate_brings_a_database_to_this_version(
        self, tmp_path: Path, database_url: str
    ) -> None:
        done = run(tmp_path, "migrate", FLATLORA_DATABASE_URL=database_url)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"the database is at migration {head()}\n"
        engine = make_engine(database_url)
        with engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        assert found == head()
        engine.dispose()

    def test_migrate_says_which_setting_leads_nowhere(self, tmp_path: Path) -> None:
        nowhere = "postgresql://u@127.0.0.1:1/db"
        done = run(tmp_path, "migrate", FLATLORA_DATABASE_URL=nowhere)
        assert done.returncode == 1
        assert "Check FLATLORA_DATABASE_URL." in done.stderr
        assert "Traceback" not in done.stderr


class TestListCommand:
    def test_it_shows_each_slot(self, service: Service, tmp_path: Path) -> None:
        add_worker(service, "a", silent=1000)
        with running(service.settings) as url:
            shown = run(tmp_path, "workers", "list", FLATLORA_URL=url)
        assert shown.returncode == 0, shown.stderr
        assert [line.split()[1:4] for line in shown.stdout.splitlines()[1:]] == [
            ["lost", "a-0", "0"],
            ["lost", "a-1", "1"],
        ]


class TestSettings:
    @pytest.mark.parametrize("database", ["", "sqlite:///f.db", "sqlite+aiosqlite:///f.db"])
    def test_a_broker_needs_postgres(self, database: str) -> None:
        with pytest.raises(ValidationError, match="share a Postgres database"):
            Settings(broker_url="redis://host", database_url=database)

    @pytest.mark.parametrize(
        "url", [POSTGRES, "postgres://host/db", "postgresql+psycopg://host/db"]
    )
    def test_postgres_may_be_written_as_it_usually_is(self, url: str) -> None:
        settings = Settings(broker_url="redis://host", database_url=url)
        assert settings.is_cluster
        assert settings.database == "postgresql+psycopg://host/db"

    def test_without_a_broker_it_is_embedded(self) -> None:
        assert not Settings(database_url=POSTGRES).is_cluster
