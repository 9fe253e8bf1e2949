"""Failpoints do what they are told, once where that is asked for, and nothing else."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.failpoints import VARIABLE, Injected, Point, failpoint

POINT = Point.CLAIM_BEFORE_COMMIT


def switch_on(monkeypatch: pytest.MonkeyPatch, *entries: str) -> None:
    monkeypatch.setenv(VARIABLE, "; ".join(entries))


def test_nothing_happens_unless_it_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for point in Point:
        failpoint(point)
    switch_on(monkeypatch, "")
    failpoint(POINT)


def test_one_that_is_switched_on_concerns_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    switch_on(monkeypatch, f"{POINT}=raise", f"{Point.CLAIM_AFTER_COMMIT}=full")
    for point in Point:
        if point not in {POINT, Point.CLAIM_AFTER_COMMIT}:
            failpoint(point)
    with pytest.raises(Injected, match=POINT):
        failpoint(POINT)
    with pytest.raises(OSError, match="No space left") as caught:
        failpoint(Point.CLAIM_AFTER_COMMIT)
    assert caught.value.errno == errno.ENOSPC


def test_one_can_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    switch_on(monkeypatch, f"{POINT}=sleep:0.2")
    started = time.monotonic()
    failpoint(POINT)
    assert time.monotonic() - started >= 0.2


def test_with_a_file_it_happens_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    switch_on(monkeypatch, f"{POINT}=raise@{tmp_path / 'once'}")
    with pytest.raises(Injected):
        failpoint(POINT)
    failpoint(POINT)
    (tmp_path / "once").unlink()
    with pytest.raises(Injected):
        failpoint(POINT)


def test_of_many_processes_one_is_killed(tmp_path: Path) -> None:
    code = f"from app.failpoints import *; failpoint(Point({POINT.value!r})); print('lives')"
    environment = {**os.environ, VARIABLE: f"{POINT}=kill@{tmp_path / 'once'}"}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    said = [process.communicate()[0] for process in running]
    codes = [process.returncode for process in running]
    assert sorted(codes) == [-signal.SIGKILL, 0, 0, 0]
    assert sorted(said) == [b"", *[b"lives\n"] * 3]


@pytest.mark.parametrize("action", ["explode", "", "Kill"])
def test_an_action_that_is_none_is_told_of(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    switch_on(monkeypatch, f"{POINT}={action}")
    with pytest.raises(ValueError, match="none of kill, raise, full, sleep"):
        failpoint(POINT)
