"""Ranks start together, hear the launcher's signals, and none outlives the others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.procs import is_alive
from tests.system.service import until
from tests.worker.training import scripted_rank
from worker.training import launch
from worker.training.launch import Ended, RankProcesses, code_of, death_of, failure_of

OOM = {"reason": "gpu_out_of_memory", "message": "m", "hint": "h"}
UNFORESEEN = {"reason": "internal", "message": "m", "hint": None}

LAUNCHER = """
import sys, time
from worker.training.launch import RankProcesses
with RankProcesses(sys.argv[1:], [{}, {}]) as ranks:
    ranks.wait()
"""


def command(folder: Path, *script: str) -> list[str]:
    return [sys.executable, "-S", scripted_rank.__file__, str(folder), *script]


def start(folder: Path, *script: str) -> RankProcesses:
    return RankProcesses(command(folder, *script), [{"OWN": str(n)} for n in range(len(script))])


def told(folder: Path, rank: int) -> dict[str, Any]:
    """The rank's environment, once it listens to signals."""
    path = folder / f"rank-{rank}.json"
    until(path.exists, seconds=20)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def ended(folder: Path, *script: str) -> list[Ended]:
    with start(folder, *script) as ranks:
        return ranks.wait()


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 2)


TRAINER = """
import sys
from worker.pipe import PipeReporter
from worker.trainer import Signals, end_as
from worker.training.launch import RankProcesses
control = Signals()
with RankProcesses(sys.argv[1:], [{}, {}]) as ranks:
    control.pass_on(ranks.signal_all)
    end_as(ranks.wait(), PipeReporter(1))
"""


class TestStart:
    def test_each_is_told_its_place_and_all_meet_on_the_loopback(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "7")
        monkeypatch.setenv("MASTER_ADDR", "elsewhere")
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with start(tmp_path, "hang", "hang") as ranks:
            first, second = told(tmp_path, 0), told(tmp_path, 1)
            assert [first["pid"], second["pid"]] == ranks.pids
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("127.0.0.1", int(first["MASTER_PORT"])), backlog=1)
        for rank, found in enumerate((first, second)):
            assert (found["RANK"], found["LOCAL_RANK"], found["OWN"]) == (str(rank),) * 3
            assert (found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("2", "127.0.0.1")
            assert found["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
        assert first["MASTER_PORT"] == second["MASTER_PORT"]
        assert [launch.STORE_DESCRIPTOR in found for found in (first, second)] == [True, False]

    def test_one_that_cannot_be_started_leaves_nothing_behind(self, tmp_path: Path) -> None:
        before = descriptors()
        with pytest.raises(FileNotFoundError):
            RankProcesses([str(tmp_path / "none")], [{}, {}])
        assert descriptors() == before


class TestEnd:
    def test_all_may_take_their_time_to_a_peaceful_one(self, tmp_path: Path) -> None:
        """The first writes a checkpoint when the others are done."""
        found = ended(tmp_path, "wait 1, sleep 1, exit 75", "exit 75")
        assert [(one.rank, one.code, one.was_killed) for one in found] == [
            (1, 75, False), (0, 75, False)
        ]  # fmt: skip

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 76)])
    def test_a_signal_reaches_each(self, tmp_path: Path, number: signal.Signals, code: int) -> None:
        with start(tmp_path, "hang", "hang") as ranks:
            told(tmp_path, 0)
            told(tmp_path, 1)
            ranks.signal_all(number)
            assert [(one.code, one.was_killed) for one in ranks.wait()] == [(code, False)] * 2

    def test_one_that_is_killed_takes_all_with_it(self, tmp_path: Path) -> None:
        script = ("hang", "wait 0, wait 2, die", "wait 0, fail internal, hang")
        started = time.monotonic()
        found = ended(tmp_path, *script)
        assert time.monotonic() - started < 30
        assert {one.rank: one.was_killed for one in found} == {1: False, 0: True, 2: True}
        assert death_of(found) == signal.SIGKILL
        assert failure_of(found) is None  # that of rank 2 was of rank 1's death

    def test_what_one_says_of_its_failure_is_heard_once_and_ends_all(self, tmp_path: Path) -> None:
        script = ("fail internal, exit 1", "wait 0, fail gpu_out_of_memory, hang", "hang")
        found = ended(tmp_path, *script)
        failure = failure_of(found)
        assert failure is not None
        assert (failure["reason"], failure["message"]) == ("gpu_out_of_memory", "said by 1")
        assert code_of(found) == 1

    def test_a_failure_may_be_longer_than_a_pipe(self, tmp_path: Path) -> None:
        (found,) = ended(tmp_path, "fail dataset_invalid 200000, exit 1")
        assert len(found.failures[0]["hint"]) == 200_000

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_they_end_with_their_launcher(self, tmp_path: Path, number: signal.Signals) -> None:
        inner = [sys.executable, "-m", "tests.worker.training.following_rank", str(tmp_path)]
        root = Path(__file__).resolve().parents[3]
        with subprocess.Popen([sys.executable, "-c", LAUNCHER, *inner], cwd=root) as launcher:
            pids = [told(tmp_path, rank)["pid"] for rank in range(2)]
            assert all(map(is_alive, pids))
            launcher.send_signal(number)
        until(lambda: not any(map(is_alive, pids)), seconds=10)


class TestTrainer:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 76)])
    def test_it_gives_a_signal_to_its_ranks_and_ends_as_they_do(
        self, tmp_path: Path, number: signal.Signals, code: int
    ) -> None:
        ranks = command(tmp_path, "hang", f"wait 0, sleep 0.5, exit {code}")
        with subprocess.Popen([sys.executable, "-c", TRAINER, *ranks]) as trainer:
            told(tmp_path, 0)
            told(tmp_path, 1)
            trainer.send_signal(number)
            assert trainer.wait(20) == code

    @pytest.mark.parametrize(
        ("ended", "code"),
        [
            ([Ended(0, 0), Ended(1, 0)], 0),
            ([Ended(0, 75), Ended(1, 75)], 75),
            ([Ended(0, 78), Ended(1, -9)], -signal.SIGKILL),
            ([Ended(0, -15), Ended(1, -9, was_killed=True)], -signal.SIGTERM),
            ([Ended(0, 1, failures=[OOM]), Ended(1, -9, was_killed=True)], 1),
        ],
    )
    def test_it_ends_as_its_ranks_did(self, ended: list[Ended], code: int) -> None:
        """The supervisor knows a signal from a failure, and one that was killed for memory."""
        source = (
            "from worker.pipe import PipeReporter; from worker.trainer import Signals, end_as;"
            f"from worker.training.launch import Ended; Signals(); end_as({ended}, PipeReporter(1))"
        )
        command = [sys.executable, "-c", source]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == code
        said = [json.loads(line) for line in done.stdout.splitlines()]
        assert said == ([{"kind": "failed", **OOM}] if code == 1 else [])


class TestVerdict:
    @pytest.mark.parametrize(
        ("ended", "failure", "death", "code"),
        [
            ([Ended(1, 0), Ended(0, 0)], None, None, 0),
            ([Ended(1, 75), Ended(0, 75)], None, None, 75),
            ([Ended(1, 76), Ended(0, 76)], None, None, 76),
            ([Ended(1, 77), Ended(0, -9, was_killed=True)], None, None, 77),
            ([Ended(0, 78), Ended(1, -9)], None, signal.SIGKILL, 78),
            ([Ended(0, 1, failures=[UNFORESEEN]), Ended(1, -11)], None, signal.SIGSEGV, 1),
            ([Ended(0, 1, failures=[UNFORESEEN]), Ended(1, 78)], UNFORESEEN, None, 1),
            ([Ended(0, 1, failures=[UNFORESEEN]), Ended(1, 1, failures=[OOM])], OOM, None, 1),
            ([Ended(0, -9, was_killed=True, failures=[OOM]), Ended(1, 78)], OOM, None, 78),
        ],
    )
    def test_of_all_together(
        self, ended: list[Ended], failure: Any, death: signal.Signals | None, code: int
    ) -> None:
        assert (failure_of(ended), death_of(ended), code_of(ended)) == (failure, death, code)
