"""The short form of ``make torture``."""

from pathlib import Path

import pytest

from tests.faults.torture import torture


@pytest.mark.timeout(400)
def test_whatever_breaks_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    result = torture(tmp_path, seed=20261125, seconds=20)
    assert result["violations"] == []
    assert result["faults injected"] > 5
    assert result["jobs"]["succeeded"] > 10
