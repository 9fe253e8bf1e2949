"""The short form of ``make torture``, and what its schedule promises."""

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.chaos import KINDS, schedule
from tests.faults.torture import torture


@pytest.mark.timeout(400)
def test_whatever_breaks_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    report = torture(tmp_path, seed=20261125, seconds=15)
    assert report.violations == []
    assert sum(report.faults.values()) >= 5
    assert report.jobs["succeeded"] >= 5


def test_a_seed_gives_the_same_faults_again_and_another_gives_others() -> None:
    assert schedule(1, 600) == schedule(1, 600)
    assert schedule(1, 600) != schedule(2, 600)


def test_a_long_run_has_every_kind_of_fault_many_times() -> None:
    kinds = Counter(fault.kind for fault in schedule(1, 3600))
    assert kinds.keys() == KINDS.keys()
    assert min(kinds.values()) >= 5
