"""A lease is kept alive, wishes reach the trainer, and it is dead before others may take over."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError
from structlog.typing import EventDict

from app.db import make_engine, now
from app.jobs.states import Status
from app.settings import Settings
from app.tables import JobRow
from tests.faults.procs import is_alive
from tests.system.service import until
from tests.worker.jobs import add_job, change, claimed, count, make_spec, row, seconds_from_now
from worker.claims import Claims
from worker.lease import Lease
from worker.process import TrainerProcess
from worker.progress import Progress
from worker.watch import Stop, Watch

MODULE = "tests.worker.scripted_trainer"
GRACE = 2
FOREVER = 600.0


class Unreachable(Claims):
    """A way to a database that can be taken away."""

    is_away = False

    def beat(self, lease: Lease, statements: Any, **values: Any) -> Status:
        if self.is_away:
            raise OperationalError("beat", {}, Exception("away"))
        return super().beat(lease, statements, **values)


@dataclass
class Attempt:
    """A trainer under a watch."""

    settings: Settings
    claims: Claims
    lease: Lease
    progress: Progress
    watch: Watch
    trainer: TrainerProcess
    draining: threading.Event
    folder: Path

    @property
    def signals(self) -> dict[str, float]:
        """What the trainer was sent first, with the time."""
        file = self.folder / "signals"
        lines = file.read_text().split() if file.exists() else []
        return dict(zip(lines[::2], map(float, lines[1::2]), strict=True))

    def is_sent(self, name: str) -> None:
        until(lambda: name in self.signals, seconds=20, every=0.01)

    def is_killed(self) -> None:
        assert self.trainer.wait() == -signal.SIGKILL


Begin = Callable[..., Any]


@pytest.fixture
def sqlite(migrated_sqlite_url: str) -> Iterator[Engine]:
    """Where it does not matter which database it is."""
    engine = make_engine(migrated_sqlite_url)
    yield engine
    engine.dispose()


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    @contextmanager
    def begin(
        engine: Engine,
        *,
        then: str = "deaf",
        makes: type[Claims] = Claims,
        spec: Mapping[str, Any] | None = None,
        runtime: float = 0,
        **seconds: float,
    ) -> Iterator[Attempt]:
        given = {"lease_seconds": 60.0, "drain_grace_seconds": GRACE, "cancel_grace_seconds": GRACE}
        lease_seconds = seconds.get("lease_seconds", 60.0)
        settings = Settings.model_validate(
            given | {"heartbeat_seconds": lease_seconds / 6, "stall_seconds": FOREVER} | seconds
        )
        claims = makes(engine, worker="w1", lease_seconds=settings.lease_seconds, max_attempts=3)
        add_job(engine, spec=spec, runtime=runtime)
        lease, draining = claimed(claims), threading.Event()
        folder = tmp_path / lease.job_id
        folder.mkdir()
        (folder / "script.json").write_text(json.dumps({"then": then, "follows": True}))
        progress = Progress(claims, lease)
        with (
            Watch(settings, claims, lease, progress, draining) as watch,
            TrainerProcess("train", folder, module=MODULE) as trainer,
            watch.over(trainer),
        ):
            progress.take(next(trainer.messages()))
            yield Attempt(settings, claims, lease, progress, watch, trainer, draining, folder)

    return begin


class TestHeartbeat:
    def test_a_lease_does_not_run_out_while_its_supervisor_lives(
        self, engine: Engine, begin: Begin
    ) -> None:
        with begin(engine, lease_seconds=6, heartbeat_seconds=0.2) as attempt:
            deadline = time.monotonic() + 7
            while time.monotonic() < deadline:
                assert count(engine, JobRow.lease_until > now()) == 1
                time.sleep(0.1)
            assert attempt.watch.stop is None
            assert is_alive(attempt.trainer.pid)

    def test_what_the_trainer_says_is_written_soon(self, engine: Engine, begin: Begin) -> None:
        with begin(engine) as attempt:
            attempt.progress.take({"kind": "step", "step": 7, "total": 9, "metrics": {"loss": 1.0}})
            until(lambda: row(engine, attempt.lease.job_id).step == 7, seconds=20)

    def test_one_that_fails_is_tried_again_in_time(
        self, sqlite: Engine, begin: Begin, logged: list[EventDict]
    ) -> None:
        options = {"lease_seconds": 30, "heartbeat_seconds": 0.2}
        with begin(sqlite, makes=Unreachable, **options) as attempt:
            attempt.claims.is_away = True
            until(lambda: any(entry["event"] == "heartbeat failed" for entry in logged), seconds=20)
            attempt.claims.is_away = False
            change(sqlite, attempt.lease.job_id, lease_until=now())
            until(lambda: count(sqlite, JobRow.lease_until > now(20)), seconds=20)
            assert attempt.watch.stop is None
            assert attempt.signals == {}


class TestCutOff:
    def test_a_heartbeat_that_hangs_ends_the_trainer_before_its_lease_is_over(
        self, migrated_postgres_url: str, begin: Begin
    ) -> None:
        engine, lease_seconds = make_engine(migrated_postgres_url), 12
        with (
            begin(engine, lease_seconds=lease_seconds, drain_grace_seconds=FOREVER) as attempt,
            engine.begin() as hanging,
        ):
            mine = JobRow.id == attempt.lease.job_id
            hanging.execute(select(JobRow.id).where(mine).with_for_update())
            ends_at = time.monotonic() + seconds_from_now(engine, JobRow.lease_until, mine)
            attempt.is_killed()
            died_at = time.monotonic()
            told_at = attempt.signals["SIGTERM"]
            assert attempt.watch.stop is Stop.CUT_OFF
        assert 0.1 * lease_seconds < ends_at - told_at < 0.3 * lease_seconds
        assert 0 < ends_at - died_at < 0.1 * lease_seconds
        engine.dispose()

    def test_a_trainer_that_stops_in_time_writes_its_checkpoint(
        self, sqlite: Engine, begin: Begin
    ) -> None:
        with begin(sqlite, then="hang", makes=Unreachable, lease_seconds=6) as attempt:
            attempt.claims.is_away = True
            assert attempt.trainer.wait() == 75
            assert attempt.watch.stop is Stop.CUT_OFF

    def test_one_that_does_not_is_killed_also_if_the_database_is_back(
        self, sqlite: Engine, begin: Begin
    ) -> None:
        with begin(sqlite, makes=Unreachable, lease_seconds=6) as attempt:
            attempt.claims.is_away = True
            attempt.is_sent("SIGTERM")
            attempt.claims.is_away = False
            attempt.is_killed()
            assert attempt.watch.stop is Stop.CUT_OFF

    def test_a_claim_whose_answer_took_long_leaves_less_time(
        self, sqlite: Engine, tmp_path: Path
    ) -> None:
        claims = Unreachable(sqlite, worker="w1", lease_seconds=60, max_attempts=3)
        add_job(sqlite)
        lease = claimed(claims)
        claims.is_away = True
        late = replace(lease, asked_at=lease.asked_at - 0.75 * 60)
        with watching(claims, late, tmp_path) as watch:
            until(lambda: watch.stop is Stop.CUT_OFF, seconds=20)


@contextmanager
def watching(claims: Claims, lease: Lease, folder: Path) -> Iterator[Watch]:
    """While no trainer runs."""
    settings, progress = Settings(data_dir=folder), Progress(claims, lease)
    with Watch(settings, claims, lease, progress, threading.Event()) as watch:
        yield watch


class TestEnds:
    def test_a_trainer_that_says_nothing_is_killed(self, sqlite: Engine, begin: Begin) -> None:
        with begin(sqlite, stall_seconds=5) as attempt:
            started = time.monotonic()
            attempt.is_killed()
            assert time.monotonic() - started > 2.5
            assert attempt.watch.stop is Stop.STALLED
            assert attempt.signals == {}

    def test_one_that_goes_on_speaking_is_not(self, sqlite: Engine, begin: Begin) -> None:
        with begin(sqlite, stall_seconds=4) as attempt:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                attempt.progress.take({"kind": "phase", "name": "training"})
                time.sleep(0.05)
            assert attempt.watch.stop is None

    def test_a_job_runs_no_longer_than_it_may_over_all_its_attempts(
        self, sqlite: Engine, begin: Begin
    ) -> None:
        spec = make_spec(resources={"max_runtime": 3600})
        with begin(sqlite, spec=spec, runtime=3597) as attempt:
            attempt.is_sent("SIGUSR1")
            attempt.is_killed()
            assert time.monotonic() - attempt.signals["SIGUSR1"] > 0.5 * GRACE
            assert attempt.watch.stop is Stop.MAX_RUNTIME

    def test_a_wish_to_cancel_reaches_the_trainer(self, engine: Engine, begin: Begin) -> None:
        with begin(engine, then="hang") as attempt:
            change(engine, attempt.lease.job_id, status=Status.CANCELLING)
            assert attempt.trainer.wait() == 76
            assert attempt.watch.stop is Stop.CANCEL

    def test_a_drain_asks_first_and_then_kills(self, sqlite: Engine, begin: Begin) -> None:
        with begin(sqlite) as attempt:
            attempt.draining.set()
            attempt.is_sent("SIGTERM")
            attempt.is_killed()
            assert time.monotonic() - attempt.signals["SIGTERM"] > 0.5 * GRACE
            assert attempt.watch.stop is Stop.DRAIN

    def test_a_lost_lease_kills_at_once(self, engine: Engine, begin: Begin) -> None:
        with begin(engine) as attempt:
            change(engine, attempt.lease.job_id, fence=attempt.lease.fence + 1)
            attempt.is_killed()
            assert attempt.watch.stop is Stop.LEASE_LOST
            assert attempt.signals == {}


class TestSeveral:
    def test_a_later_wish_wins_over_an_earlier(self, sqlite: Engine, begin: Begin) -> None:
        with begin(sqlite, drain_grace_seconds=FOREVER) as attempt:
            attempt.draining.set()
            attempt.is_sent("SIGTERM")
            change(sqlite, attempt.lease.job_id, status=Status.CANCELLING)
            attempt.is_sent("SIGUSR1")
            attempt.is_killed()
            assert attempt.watch.stop is Stop.CANCEL

    def test_and_not_the_other_way_round(self, sqlite: Engine, begin: Begin) -> None:
        with begin(sqlite) as attempt:
            change(sqlite, attempt.lease.job_id, status=Status.CANCELLING)
            attempt.is_sent("SIGUSR1")
            attempt.draining.set()
            attempt.is_killed()
            assert attempt.watch.stop is Stop.CANCEL
            assert list(attempt.signals) == ["SIGUSR1"]

    def test_one_that_came_before_the_trainer_reaches_it_when_it_starts(
        self, sqlite: Engine, tmp_path: Path
    ) -> None:
        claims = Claims(sqlite, worker="w1", lease_seconds=60, max_attempts=3)
        job_id = add_job(sqlite)
        (tmp_path / "script.json").write_text('{"then": "deaf", "follows": true}')
        with watching(claims, claimed(claims), tmp_path) as watch:
            change(sqlite, job_id, fence=2)
            until(lambda: watch.stop, seconds=20)
            trainer = TrainerProcess("train", tmp_path, module=MODULE)
            with trainer, watch.over(trainer):
                assert trainer.wait() == -signal.SIGKILL
