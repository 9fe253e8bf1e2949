"""The schema's history, on SQLite and on Postgres."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError

from app.db import make_engine, now
from app.ids import new_id
from app.jobs.states import Status
from app.migrate import FOLDER, downgrade, head, migrating, upgrade
from app.tables import JobRow, Table
from migrations import limit_waiting


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


class TestMigrations:
    def test_up_down_up(self, engine: Engine, database_url: str) -> None:
        upgrade(database_url)
        made = tables(engine)
        assert made == set(Table.metadata.tables) | {"alembic_version"}
        downgrade(database_url, "base")
        assert tables(engine) == {"alembic_version"}
        upgrade(database_url)
        assert tables(engine) == made

    def test_each_step_can_be_taken_back(self, database_url: str) -> None:
        script = ScriptDirectory(str(FOLDER))
        for revision in reversed(list(script.walk_revisions())):
            upgrade(database_url, revision.revision)
            downgrade(database_url, "-1")
            upgrade(database_url, revision.revision)

    def test_it_ends_at_the_tables(self, engine: Engine, database_url: str) -> None:
        upgrade(database_url)
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "compare_server_default": True}
            )
            assert compare_metadata(context, Table.metadata) == []

    def test_there_is_one_head_and_it_is_recorded(self, engine: Engine, database_url: str) -> None:
        assert ScriptDirectory(str(FOLDER)).get_heads() == [head()]
        upgrade(database_url)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT version_num FROM alembic_version")) == head()

    def test_doing_it_again_changes_nothing(self, database_url: str) -> None:
        upgrade(database_url)
        upgrade(database_url)

    def test_processes_that_start_at_once_do_not_disturb_each_other(
        self, engine: Engine, database_url: str
    ) -> None:
        code = "import sys; from app.migrate import upgrade; upgrade(sys.argv[1])"
        command = [sys.executable, "-c", code, database_url]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
        for process in running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors.decode()
        assert "jobs" in tables(engine)

    def test_a_migration_that_fails_leaves_nothing(self, engine: Engine, database_url: str) -> None:
        def migrate_and_fail() -> None:
            with migrating(database_url) as connection:
                connection.execute(text("CREATE TABLE half (id integer)"))
                connection.execute(text("SELECT * FROM nowhere"))

        with pytest.raises(Exception, match="nowhere"):
            migrate_and_fail()
        assert tables(engine) == set()

    def test_a_folder_with_a_percent_sign(self, tmp_path: Path) -> None:
        folder = tmp_path / "100% new"
        upgrade(f"sqlite:///{folder / 'flatlora.db'}")
        assert (folder / "flatlora.db").exists()


class TestPopulated:
    """What a service has gathered outlives every migration, there and back."""

    @pytest.fixture
    def filled(self, engine: Engine, database_url: str) -> Engine:
        upgrade(database_url, "0001")
        fill(engine)
        return engine

    def test_jobs_and_all_that_belongs_to_them_stay_as_they_are(
        self, filled: Engine, database_url: str
    ) -> None:
        before = contents(filled)
        assert {name: len(rows) for name, rows in before.items()} == {
            "jobs": len(Status), "job_events": 2 * len(Status), "job_metrics": 2 * len(Status),
            "datasets": 1, "idempotency_keys": len(Status),
        }  # fmt: skip
        for revision in ("0002", "0003", "0002", "0001", "0003"):
            (upgrade if revision > current(filled) else downgrade)(database_url, revision)
            assert contents(filled, like=before) == before

    def test_old_jobs_get_the_defaults(self, filled: Engine, database_url: str) -> None:
        upgrade(database_url)
        with filled.connect() as connection:
            new = "project, priority, gpus, available_at, inputs, checkpoint"
            query = f"SELECT DISTINCT {new} FROM jobs"  # noqa: S608 - columns of our own
            assert [tuple(found) for found in connection.execute(text(query))] == [
                ("default", 5, 1, None, None, None)
            ]

    def test_the_way_back_keeps_what_0001_promises(self, filled: Engine, database_url: str) -> None:
        constraints = described(filled)
        upgrade(database_url)
        downgrade(database_url, "0001")
        assert described(filled) == constraints
        with (
            filled.execution_options(writes=True).begin() as connection,
            pytest.raises(IntegrityError, match="ck_jobs_status"),
        ):
            connection.execute(text("UPDATE jobs SET status = 'done'"))

    def test_a_job_that_goes_takes_what_belongs_to_it_along(
        self, filled: Engine, database_url: str
    ) -> None:
        for revision in ("0003", "0001"):
            (downgrade if revision == "0001" else upgrade)(database_url, revision)
        with filled.execution_options(writes=True).begin() as connection:
            connection.execute(text("DELETE FROM jobs"))
        assert {name for name, rows in contents(filled).items() if rows} == {"datasets"}


def fill(engine: Engine) -> None:
    """Rows in all tables of 0001."""
    tables, moment = reflected(engine), datetime(2026, 11, 24, 12, tzinfo=UTC)
    zone = moment if engine.dialect.name == "postgresql" else moment.replace(tzinfo=None)
    with engine.execution_options(writes=True).begin() as connection:
        for number, status in enumerate(Status):
            job_id = f"job_{number:032x}"
            connection.execute(tables["jobs"].insert().values(
                id=job_id, name=f"ü {number}", labels={"a": "b"}, base_model="a/b",
                dataset_uri="file:a", spec={"rank": 8, "none": None}, status=status.value,
                phase="training", attempt=1, fence=number, worker="w", lease_until=zone,
                runtime=1.5, recoveries=0, step=number, progress={"loss": 0.1}, result=None,
                created_at=zone, updated_at=zone,
            ))  # fmt: skip
            for seq in (1, 2):
                connection.execute(tables["job_events"].insert().values(
                    job_id=job_id, seq=seq, at=zone, type="job.x", message="m", data={"n": seq}
                ))  # fmt: skip
                connection.execute(tables["job_metrics"].insert().values(
                    job_id=job_id, series="train", step=seq, data={"loss": 1 / 3}
                ))  # fmt: skip
            connection.execute(tables["idempotency_keys"].insert().values(
                key=f"k{number}", body_sha256="0" * 64, job_id=job_id, created_at=zone
            ))  # fmt: skip
        connection.execute(tables["datasets"].insert().values(
            id=f"ds_{0:032x}", sha256="0" * 64, filename="a", size=5 << 30, created_at=zone
        ))  # fmt: skip


def current(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def reflected(engine: Engine) -> dict[str, sa.Table]:
    metadata = sa.MetaData()
    metadata.reflect(engine)
    return {name: table for name, table in metadata.tables.items() if name != "alembic_version"}


def contents(
    engine: Engine, like: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables; with ``like``, of the tables and columns there."""
    found: dict[str, list[dict[str, Any]]] = {}
    with engine.connect() as connection:
        for name, table in reflected(engine).items():
            if like is not None and name not in like:
                continue
            names = like[name][0].keys() if like else table.columns.keys()
            columns = [table.columns[column] for column in names]
            query = sa.select(*columns).order_by(*table.primary_key.columns)
            found[name] = [dict(row) for row in connection.execute(query).mappings()]
    return found


def described(engine: Engine) -> dict[str, Any]:
    """Columns, keys, checks and indexes of every table."""
    looked = inspect(engine)
    return {
        name: {
            "columns": [
                (c["name"], str(c["type"]), c["nullable"]) for c in looked.get_columns(name)
            ],
            "key": looked.get_pk_constraint(name),
            "foreign keys": looked.get_foreign_keys(name),
            "checks": looked.get_check_constraints(name),
            "indexes": sorted(index["name"] or "" for index in looked.get_indexes(name)),
        }
        for name in sorted(tables(engine))
    }


def test_sqlite_keeps_rows_that_refer_to_a_table_which_is_copied(sqlite_url: str) -> None:
    with migrating(sqlite_url) as connection:
        assert connection.scalar(text("PRAGMA foreign_keys")) == 0


def test_sqlite_refuses_a_migration_that_breaks_references(sqlite_url: str) -> None:
    upgrade(sqlite_url)

    def orphan() -> None:
        with migrating(sqlite_url) as connection:
            connection.execute(text("INSERT INTO job_metrics VALUES ('job_no', 'train', 1, '{}')"))

    with pytest.raises(ValueError, match="refer to nothing"):
        orphan()
    with migrating(sqlite_url) as connection:
        assert connection.scalar(text("SELECT count(*) FROM job_metrics")) == 0


def test_postgres_does_not_wait_long_for_a_lock(postgres_url: str) -> None:
    def alter() -> None:
        with migrating(postgres_url) as connection:
            with Operations.context(MigrationContext.configure(connection)):
                limit_waiting(lock="50ms", statement="60s")
            connection.execute(text("DROP TABLE jobs CASCADE"))

    upgrade(postgres_url)
    blocker = make_engine(postgres_url)
    with blocker.begin() as connection:
        connection.execute(text("LOCK TABLE jobs"))
        with pytest.raises(OperationalError, match="lock timeout"):
            alter()
    blocker.dispose()


class TestConstraints:
    @pytest.fixture(autouse=True)
    def migrated(self, database_url: str) -> None:
        upgrade(database_url)

    def add(self, engine: Engine, status: str) -> None:
        values = {
            "id": new_id("job"), "labels": {}, "base_model": "a/b", "dataset_uri": "file:a",
            "spec": {}, "status": status, "created_at": now(), "updated_at": now(),
        }  # fmt: skip
        with engine.execution_options(writes=True).begin() as connection:
            connection.execute(JobRow.__table__.insert().values(values))  # type: ignore[attr-defined] # a Table

    def test_every_status_is_taken_and_no_other(self, engine: Engine) -> None:
        for status in Status:
            self.add(engine, status.value)
        for wrong in ("done", "", "QUEUED"):
            with pytest.raises(IntegrityError, match="ck_jobs_status"):
                self.add(engine, wrong)

    def test_an_event_needs_its_job(self, engine: Engine) -> None:
        insert = "INSERT INTO job_events VALUES ('job_no', 1, '2026-11-24', 'x', 'x', '{}')"
        with engine.connect() as connection, pytest.raises(IntegrityError):
            connection.execute(text(insert))


def test_a_new_migration_from_the_template_runs(database_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "migrations"
    shutil.copytree(FOLDER, folder)
    upgrade(database_url)
    with migrating(database_url) as connection:
        config = Config()
        config.set_main_option("script_location", str(folder))
        config.attributes["connection"] = connection
        command.revision(config, "nothing new", autogenerate=True)
        command.upgrade(config, "head")
    (made,) = folder.glob("versions/*nothing_new.py")
    assert 'limit_waiting(lock="5s", statement="60s")' in made.read_text()
