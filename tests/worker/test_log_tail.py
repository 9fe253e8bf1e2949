"""The trainer's log comes into the database once, whole, and without secrets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.jobs.states import Status
from app.tables import LogRow
from tests.worker.jobs import add_job, claimed, row
from worker import log_tail
from worker.claims import Claims
from worker.lease import Lease
from worker.log_tail import LINE_CHARACTERS, LogTail
from worker.progress import Progress


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer.log"


@pytest.fixture
def job_id(engine: Engine) -> str:
    return add_job(engine)


def write(path: Path, text: str | bytes) -> None:
    with path.open("ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def lines(engine: Engine, job_id: str) -> dict[int, str]:
    with Session(engine) as session:
        statement = select(LogRow.seq, LogRow.text).where(LogRow.job_id == job_id)
        return {row.seq: row.text for row in session.execute(statement.order_by(LogRow.seq))}


def waits(progress: Progress) -> bool:
    return progress.is_waiting


Ship = Callable[..., Progress]


@pytest.fixture
def ship(claims: Claims, job_id: str) -> Ship:
    """An attempt, which has shipped what is there."""

    def ship(path: Path, *, finish: bool = True, lease: Lease | None = None) -> Progress:
        lease = lease or claimed(claims)
        progress = Progress(claims, lease, LogTail(path, job_id, lease.logged))
        progress.finish() if finish else progress.flush()
        return progress

    return ship


class TestShipping:
    def test_lines_come_numbered_and_only_when_they_are_whole(
        self, engine: Engine, job_id: str, path: Path, ship: Ship
    ) -> None:
        write(path, "first\n\nthi")
        progress = ship(path, finish=False)
        assert lines(engine, job_id) == {1: "first", 2: ""}
        assert waits(progress) is False
        write(path, "rd\nla")
        assert waits(progress) is True
        progress.flush()
        assert lines(engine, job_id) == {1: "first", 2: "", 3: "third"}
        write(path, "st")
        progress.finish()
        assert lines(engine, job_id)[4] == "last"
        assert not progress.is_waiting

    def test_before_there_is_a_log_nothing_waits(
        self, engine: Engine, job_id: str, path: Path, ship: Ship
    ) -> None:
        assert not ship(path).is_waiting
        assert row(engine, job_id).logged is None

    @pytest.mark.parametrize(
        ("written", "shown"),
        [
            ("ü€😀", "ü€😀"),
            (b"broken \xff\xc3 here", "broken \ufffd\ufffd here"),
            ("a\0b", "a\\0b"),
            ("10%\r50%\r100%\r", "100%"),
            ("windows\r", "windows"),
            ("\ud800".encode(errors="surrogatepass"), "\ufffd" * 3),
            ("token=hf_abcdefgh12345678", "token=[secret]"),
            ("postgresql://me:opensesame@db/x", "postgresql://[secret]db/x"),
        ],
    )
    def test_whatever_is_printed_can_be_kept_and_shown(
        self, engine: Engine, job_id: str, path: Path, ship: Ship, written: Any, shown: str
    ) -> None:
        write(path, written)
        write(path, "\n")
        ship(path)
        assert lines(engine, job_id) == {1: shown}

    def test_a_long_line_goes_on_in_the_next_and_loses_nothing(
        self, engine: Engine, job_id: str, path: Path, ship: Ship
    ) -> None:
        text = "a" + "ü" * 100_000
        write(path, text + "\nnext\n")
        ship(path)
        found = list(lines(engine, job_id).values())
        assert max(map(len, found)) <= LINE_CHARACTERS
        assert "".join(found) == text + "next"

    def test_one_flush_ships_no_more_than_it_may_and_the_end_ships_all(
        self, engine: Engine, job_id: str, path: Path, ship: Ship
    ) -> None:
        write(path, "\n".join(map(str, range(1200))) + "\n")
        progress = ship(path, finish=False)
        assert len(lines(engine, job_id)) == log_tail.AT_ONCE_LINES
        assert progress.is_waiting
        progress.finish()
        assert lines(engine, job_id) == {n + 1: str(n) for n in range(1200)}


class TestAttempts:
    def requeue(self, claims: Claims, lease: Lease) -> Lease:
        claims.release(lease, "drained")
        return claimed(claims)

    def test_the_next_one_goes_on_where_the_last_one_stopped(
        self, engine: Engine, claims: Claims, job_id: str, path: Path, ship: Ship
    ) -> None:
        lease = claimed(claims)
        write(path, "1\n2\n")
        ship(path, lease=lease)
        write(path, "3, which nobody lived to ship\n")
        again = self.requeue(claims, lease)
        write(path, "4\n")
        ship(path, lease=again)
        assert [text[0] for text in lines(engine, job_id).values()] == ["1", "2", "3", "4"]

    def test_also_on_another_machine_and_back_again(
        self, engine: Engine, claims: Claims, job_id: str, tmp_path: Path, ship: Ship
    ) -> None:
        lease, expected = claimed(claims), []
        for number, machine in enumerate(["a", "b", "a", "c", "b"]):
            (tmp_path / machine).mkdir(exist_ok=True)
            write(tmp_path / machine / "trainer.log", f"{number} on {machine}\n")
            expected.append(f"{number} on {machine}")
            ship(tmp_path / machine / "trainer.log", lease=lease)
            lease = self.requeue(claims, lease)
        assert list(lines(engine, job_id).values()) == expected

    def test_a_file_that_has_begun_anew_is_read_anew(
        self, engine: Engine, claims: Claims, job_id: str, path: Path, ship: Ship
    ) -> None:
        lease = claimed(claims)
        write(path, "of the first file\n")
        ship(path, lease=lease)
        path.write_text("second\n")
        ship(path, lease=self.requeue(claims, lease))
        assert list(lines(engine, job_id).values()) == ["of the first file", "second"]

    @pytest.mark.parametrize("is_committed", [True, False])
    def test_an_outage_loses_no_line_and_repeats_none(
        self, engine: Engine, job_id: str, path: Path, is_committed: bool
    ) -> None:
        class Away(Claims):
            is_away = True

            def beat(self, lease: Lease, statements: Any, **values: Any) -> Status:
                if not self.is_away:
                    return super().beat(lease, statements, **values)
                if is_committed:
                    super().beat(lease, statements, **values)
                raise OperationalError("beat", {}, Exception("the answer is lost"))

        claims = Away(engine, worker="w1", lease_seconds=60, max_attempts=3)
        lease = claimed(claims)
        progress = Progress(claims, lease, LogTail(path, job_id, lease.logged))
        write(path, "1\n2\n")
        with pytest.raises(OperationalError):
            progress.flush()
        write(path, "3\n")
        claims.is_away = False
        progress.finish()
        assert lines(engine, job_id) == {1: "1", 2: "2", 3: "3"}


class TestBounds:
    def test_of_a_long_log_the_newest_lines_are_kept_and_one_says_so(
        self,
        engine: Engine,
        job_id: str,
        path: Path,
        ship: Ship,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(log_tail, "KEPT_LINES", 50)
        monkeypatch.setattr(log_tail, "AT_ONCE_LINES", 20)
        write(path, "".join(f"{n}\n" for n in range(70)))
        progress = ship(path)
        found = lines(engine, job_id)
        assert list(found) == list(range(22, 72))
        assert [text for text in found.values() if not text.isdigit()] == [log_tail.BOUND_REACHED]
        assert found[71] == "69"
        write(path, "and on\n")
        progress.finish()
        assert len(lines(engine, job_id)) == 50
        assert lines(engine, job_id)[72] == "and on"

    def test_what_comes_faster_than_it_can_be_shipped_is_left_out_and_told(
        self,
        engine: Engine,
        job_id: str,
        path: Path,
        ship: Ship,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(log_tail, "BEHIND_BYTES", 1000)
        write(path, "x" * 99 + "\n")
        write(path, b"y" * 9_899 + b"\n" + b"".join(b"%09d\n" % n for n in range(100)))
        ship(path)
        found = list(lines(engine, job_id).values())
        assert found[0].startswith("[flatlora] 100")
        assert "bytes of the log are left out" in found[0]
        assert found[-1] == "000000099"
        assert len(found) <= 101

    def test_a_disk_that_fails_costs_the_log_and_not_the_heartbeat(
        self, engine: Engine, job_id: str, path: Path, ship: Ship
    ) -> None:
        path.mkdir()
        ship(path)
        assert lines(engine, job_id) == {}
