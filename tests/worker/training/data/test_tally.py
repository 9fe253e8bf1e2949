"""Reading says how far it is, and ends within a second where somebody wants so."""

import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.worker.training.conftest import ROWS, Recorder, chat
from tests.worker.training.killing import describe
from worker.process import TrainerProcess
from worker.trainer import CANCELLED
from worker.training.config import Data, DataFile, TrainingJob
from worker.training.data import tally
from worker.training.data.parsing import parse
from worker.training.data.tally import Tally
from worker.training.errors import Stopped
from worker.training.reporter import Wish
from worker.training.run import run

Make = Callable[..., TrainingJob]

SOON = 10  # seconds on a machine that is busy; not to listen takes half a minute


class StopAt(Recorder):
    """Wants to stop once it has been told of so many rows."""

    def __init__(self, told: tuple[int, int | None], wish: Wish) -> None:
        super().__init__()
        self._told, self._wish = told, wish

    def wish(self) -> Wish | None:
        return self._wish if self._told in self.tallies else None


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "SECONDS", 0)


class TestReading:
    @pytest.mark.parametrize("wish", ["cancel", "drain"])
    def test_a_wish_ends_it_while_a_file_is_read(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        data_file: Callable[..., DataFile],
        wish: Wish,
    ) -> None:
        reader = tmp_path / "python"
        reader.write_text("#!/bin/sh\necho 3\necho 5\nexec sleep 60\n")
        reader.chmod(0o700)
        monkeypatch.setattr("sys.executable", str(reader))
        recorder = StopAt((5, None), wish)
        began = time.monotonic()
        with (
            pytest.raises(Stopped, match=wish),
            parse(data_file(ROWS), Data(), tmp_path, Tally(recorder, recorder)),
        ):
            pass
        assert time.monotonic() - began < tally.SECONDS + SOON
        assert recorder.tallies[-1] == (5, None)

    def test_something_is_said_while_nothing_comes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_file: Callable[..., DataFile]
    ) -> None:
        """So a supervisor that listens does not take the trainer for dead."""
        reader = tmp_path / "python"
        reader.write_text("#!/bin/sh\nexec sleep 60\n")
        reader.chmod(0o700)
        monkeypatch.setattr("sys.executable", str(reader))
        monkeypatch.setattr(tally, "SECONDS", 0.1)
        recorder = Recorder()
        calls = itertools.count()
        monkeypatch.setattr(recorder, "wish", lambda: "cancel" if next(calls) > 4 else None)
        with (
            pytest.raises(Stopped),
            parse(data_file(ROWS), Data(), tmp_path, Tally(recorder, recorder)),
        ):
            pass
        assert len(recorder.tallies) > 1
        assert set(recorder.tallies) == {(0, None)}

    def test_the_process_that_reads_says_how_far_it_is(
        self, talkative: None, data_file: Callable[..., DataFile]
    ) -> None:
        file = data_file([chat("a", "b")] * 30_000)
        recorder = Recorder()
        with parse(file, Data(), tally=Tally(recorder)) as found:
            assert found.rows_found == 30_000
        done = [done for done, _ in recorder.tallies]
        assert done == sorted(done)
        assert 0 < done[-1] <= 30_000


class TestRendering:
    @pytest.mark.parametrize("wish", ["cancel", "drain"])
    def test_a_wish_ends_it_at_the_next_row(
        self, talkative: None, make_job: Make, tmp_path: Path, wish: Wish
    ) -> None:
        recorder = StopAt((7, 40), wish)
        with pytest.raises(Stopped, match=wish):
            run(make_job(), tmp_path / "job", recorder, recorder)
        assert recorder.tallies[-1] == (7, 40)
        assert recorder.phases == ["validating"]
        assert not list((tmp_path / "job").iterdir())

    def test_every_row_is_counted_good_or_bad(
        self, talkative: None, make_job: Make, tmp_path: Path
    ) -> None:
        recorder = Recorder()
        rows = [*ROWS, {"messages": 1}]
        run(make_job(rows=rows, data={"max_bad_rows": 1}), tmp_path / "job", recorder, recorder)
        assert [told for told in recorder.tallies if told[1]] == [(n, 41) for n in range(42)]


@pytest.mark.torture
def test_a_trainer_tells_of_its_rows_and_is_cancelled_among_them(
    make_job: Make, tmp_path: Path
) -> None:
    """With so many rows that rendering them would take a quarter of a minute."""
    folder = tmp_path / "job"
    describe(make_job(rows=[chat("a", "b")] * 80_000), folder)
    with TrainerProcess("train", folder, environment={"FLATLORA_DEVICE": "cpu"}) as trainer:
        for said in trainer.messages():
            if said["kind"] == "rows" and said["total"]:
                break
        trainer.signal(signal.SIGUSR1)
        began = time.monotonic()
        assert trainer.wait() == CANCELLED
        assert time.monotonic() - began < SOON
    assert said["total"] == 80_000
    assert said["done"] < 80_000
