"""A slot has one name for ever and one process at a time, which finds what its predecessor held."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from app.jobs.states import Reason, Status
from app.settings import Settings
from tests.app.conftest import make_settings
from tests.worker.jobs import add_job, claimed, event_types, make_spec, row
from worker.claims import Claims
from worker.slot import Bench, Slot, SlotTaken, name_of, occupied

HOLD = """
import sys, time
from pathlib import Path
from worker.slot import occupied
with occupied(Path(sys.argv[1]), "cpu") as slot:
    print(slot.name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slots" / "0.lock"


@contextmanager
def held(path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """By another process; its slot's name."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process, process.stdout.readline().strip()
        process.kill()


class TestLock:
    def test_a_second_process_is_refused_and_told_where(self, path: Path) -> None:
        with held(path), pytest.raises(SlotTaken, match=f"works in {path.parent}"):
            self.enter(path)

    def test_one_that_is_killed_frees_it_at_once(self, path: Path) -> None:
        with held(path) as (process, name):
            process.send_signal(signal.SIGKILL)
            process.wait()
            with occupied(path, "cpu") as slot:
                assert slot == Slot(name, "cpu")

    def test_a_successor_may_wait_for_it(self, path: Path) -> None:
        with held(path) as (process, name):
            killer = threading.Timer(0.3, process.kill)
            killer.start()
            with occupied(path, "cpu", wait_seconds=30) as slot:
                assert slot.name == name
            killer.join()

    def test_and_gives_up_in_time(self, path: Path) -> None:
        started = time.monotonic()
        with held(path), pytest.raises(SlotTaken):
            self.enter(path, wait_seconds=0.3)
        assert time.monotonic() - started >= 0.3

    def test_who_leaves_frees_it(self, path: Path) -> None:
        self.enter(path)
        self.enter(path)

    @staticmethod
    def enter(path: Path, *, wait_seconds: float = 0) -> None:
        with occupied(path, None, wait_seconds=wait_seconds):
            pass


class TestName:
    def test_it_is_kept_and_none_has_anothers(self, path: Path) -> None:
        first = name_of(path)
        with occupied(path, "cpu") as slot:
            assert slot.name == first == name_of(path)
        assert path.read_text() == first + "\n"
        assert name_of(path.with_name("1.lock")) != first

    def test_it_can_be_asked_for_while_somebody_works_there(self, path: Path) -> None:
        with held(path) as (_, name):
            assert name_of(path) == name

    def test_nobody_else_may_enter_the_folder(self, path: Path) -> None:
        name_of(path)
        assert path.parent.stat().st_mode & 0o077 == 0


class TestBench:
    @pytest.fixture
    def settings(self, tmp_path: Path, migrated_url: str) -> Settings:
        return make_settings(tmp_path, migrated_url)

    @pytest.fixture
    def bench(self, settings: Settings) -> Iterator[Bench]:
        bench = Bench(settings, Slot("slot-a", "cpu"), threading.Event())
        yield bench
        bench.close()

    @pytest.fixture
    def jobs(self, engine: Engine) -> list[str]:
        """One that a dead process in this slot held, one of another slot, one that waits."""
        jobs = [add_job(engine, age=age) for age in (30, 20, 10)]
        for name in ("slot-a", "slot-b"):
            claimed(Claims(engine, worker=name, lease_seconds=60, max_attempts=3))
        return jobs

    def test_it_puts_back_what_its_slot_held_and_nothing_else(
        self, engine: Engine, bench: Bench, jobs: list[str]
    ) -> None:
        bench.recover()
        assert [row(engine, job_id).status for job_id in jobs] == ["queued", "running", "queued"]
        assert row(engine, jobs[0]).attempt == 0
        assert event_types(engine, jobs[0]) == ["job.running", "job.requeued"]

    def test_it_does_so_before_it_takes_the_first(
        self, engine: Engine, bench: Bench, jobs: list[str]
    ) -> None:
        assert bench.run_next()
        assert event_types(engine, jobs[0])[:3] == ["job.running", "job.requeued", "job.running"]

    def test_an_embedded_one_fails_a_job_that_is_too_large_for_it(
        self, engine: Engine, bench: Bench
    ) -> None:
        """Nobody else would ever come for it."""
        spec = make_spec(resources={"gpus": 2})
        job_id = add_job(engine, spec=spec, gpus=2)
        assert bench.run_next()
        job = row(engine, job_id)
        assert (job.status, job.reason) == (Status.FAILED, Reason.CONFIG_INVALID)
        assert job.message == "The job asks for 2 GPUs, and this service trains on 1."

    def test_a_claim_whose_answer_was_lost_is_found_again(
        self, engine: Engine, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = add_job(engine)
        bench.recover()

        def lose_the_answer() -> None:
            claimed(Claims(engine, worker="slot-a", lease_seconds=60, max_attempts=3))
            raise OperationalError("claim", {}, Exception("the connection was cut"))

        with monkeypatch.context() as patch:
            patch.setattr(bench.claims, "claim_next", lose_the_answer)
            with pytest.raises(OperationalError):
                bench.run_next()
        assert row(engine, job_id).status == Status.RUNNING
        assert bench.run_next()
        job = row(engine, job_id)
        assert (job.fence, job.attempt) == (2, 1)
        assert job.status == Status.FAILED  # its rows are nowhere
        assert not bench.run_next()
