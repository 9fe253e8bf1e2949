"""The short form of ``make torture``, and what its schedule promises."""

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.chaos import KINDS, schedule
from tests.faults.client import Wish, Wishes, broken_wishes
from tests.faults.torture import torture

TWIN = {"adapter_model.safetensors": "a"}


@pytest.mark.timeout(400)
def test_whatever_breaks_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    report = torture(tmp_path, seed=20261112, seconds=12)
    assert report.violations == []
    assert sum(report.faults.values()) >= 4
    assert report.jobs["succeeded"] >= 5


def test_a_seed_gives_the_same_faults_again_and_another_gives_others() -> None:
    assert schedule(1, 600) == schedule(1, 600)
    assert schedule(1, 600) != schedule(2, 600)


def test_a_long_run_has_every_kind_of_fault_many_times() -> None:
    kinds = Counter(fault.kind for fault in schedule(1, 3600))
    assert kinds.keys() == KINDS.keys()
    assert min(kinds.values()) >= 5


@pytest.mark.parametrize(
    ("labels", "is_cancelled", "status", "reason", "is_broken"),
    [
        ({}, False, "succeeded", None, False),
        ({}, True, "cancelled", None, False),
        ({}, True, "succeeded", None, False),
        ({}, False, "cancelled", None, True),
        ({}, False, "failed", "worker_lost", True),
        ({"crash_at": "3"}, False, "failed", "worker_lost", False),
        ({"crash_at": "3"}, False, "failed", "internal", True),
        ({"crash_at": "3"}, False, "succeeded", None, True),
        ({"crash_at": "3 first"}, False, "failed", "worker_lost", True),
        ({"full_at": "3"}, False, "failed", "disk_full", False),
    ],
)
def test_an_end_that_nobody_has_wished_for_is_found(
    labels: dict[str, str], is_cancelled: bool, status: str, reason: str | None, is_broken: bool
) -> None:
    wishes = Wishes([Wish("key", {"labels": labels}, "job", is_cancelled)])
    row = {"id": "job", "status": status, "reason": reason, "message": None, "adapter": None}
    assert bool(list(broken_wishes(wishes, [row], TWIN))) == is_broken


@pytest.mark.parametrize(("found", "is_broken"), [("a", False), ("b", True)])
def test_a_real_adapter_that_is_not_its_twin_is_found(found: str, is_broken: bool) -> None:
    wishes = Wishes([Wish("key", {"labels": {"real": "1"}}, "job")])
    files = [{"name": "adapter_model.safetensors", "sha256": found}]
    row = {"id": "job", "status": "succeeded", "reason": None, "adapter": {"files": files}}
    assert bool(list(broken_wishes(wishes, [row], TWIN))) == is_broken


def test_a_second_job_for_one_key_is_found() -> None:
    row = {"id": "other", "status": "succeeded", "reason": None, "adapter": None}
    assert list(broken_wishes(Wishes([Wish("key", {"labels": {}})]), [row], TWIN))
