"""GET /jobs/{id}/checkpoints: what the trainer has written, and what is still there."""

from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.orm import Session

from app.jobs.events import event
from app.jobs.states import Status
from app.tables import MetricRow
from tests.app.service import Json, Service, faults, ok
from tests.app.test_jobs import ODD_IDS


def say(service: Service, job_id: str, type_: str, **data: Any) -> None:
    with Session(service.engine) as session, session.begin():
        session.execute(event(job_id, type_, "m", **data))


def write(service: Service, job_id: str, step: int, *kept: int, **data: Any) -> None:
    told = {"step": step, "size": 100 + step, "verified": True, "kept": [step, *kept]} | data
    say(service, job_id, "job.checkpoint", **told)


def listed(service: Service, job_id: str, **params: Any) -> dict[int, Json]:
    items = service.get(f"/jobs/{job_id}/checkpoints", **params)["items"]
    assert [item["step"] for item in items] == sorted(item["step"] for item in items)
    return {item["step"]: item for item in items}


def kept(service: Service, job_id: str) -> list[int]:
    return [step for step, item in listed(service, job_id).items() if item["kept"]]


@pytest.fixture
def job_id(any_service: Service) -> str:
    found: str = any_service.submit()["id"]
    any_service.set(found, status=Status.RUNNING)
    for step, before in ((10, ()), (20, (10,)), (30, (20,))):
        write(any_service, found, step, *before)
    rows = [("train", 10, 2.5), ("train", 20, 2.0), ("held_out", 20, 2.2), ("train", 21, 9.0)]
    with Session(any_service.engine) as session, session.begin():
        for series, step, loss in rows:
            data = {"loss": loss}
            session.execute(
                insert(MetricRow).values(job_id=found, series=series, step=step, data=data)
            )
    return found


def test_each_comes_with_what_is_known_of_it(any_service: Service, job_id: str) -> None:
    found = listed(any_service, job_id)
    for item in found.values():
        assert item.pop("created_at").endswith("Z")
    assert found == {
        10: {"step": 10, "loss": 2.5, "held_out_loss": None, "size": 110, "verified": True,
             "kept": False},
        20: {"step": 20, "loss": 2.0, "held_out_loss": 2.2, "size": 120, "verified": True,
             "kept": True},
        30: {"step": 30, "loss": None, "held_out_loss": None, "size": 130, "verified": True,
             "kept": True},
    }  # fmt: skip


def test_one_that_is_in_the_store_is_kept_too(any_service: Service, job_id: str) -> None:
    pointer = {"fence": 1, "step": 10, "files": []}
    any_service.set(job_id, status=Status.PAUSED, checkpoint=pointer)
    assert kept(any_service, job_id) == [10, 20, 30]


def test_a_job_that_is_over_keeps_none(any_service: Service, job_id: str) -> None:
    for status in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED):
        any_service.set(job_id, status=status)
        assert kept(any_service, job_id) == []
        assert len(listed(any_service, job_id)) == 3


def test_one_that_was_found_damaged_is_not_used_until_it_is_written_again(
    any_service: Service, job_id: str
) -> None:
    say(any_service, job_id, "job.checkpoint_refused", checkpoint="ckpt-000000030")
    assert kept(any_service, job_id) == [20]
    assert listed(any_service, job_id)[30]["verified"] is False
    write(any_service, job_id, 30, 20)
    assert kept(any_service, job_id) == [20, 30]
    assert listed(any_service, job_id)[30]["verified"] is True
    assert len(listed(any_service, job_id)) == 3


def test_what_an_older_worker_has_not_said_is_unknown(any_service: Service) -> None:
    found = any_service.submit()["id"]
    say(any_service, found, "job.checkpoint", step=5)
    item = listed(any_service, found)[5]
    assert (item["size"], item["verified"], item["kept"]) == (None, None, False)


def test_pages_hold_every_one_once(any_service: Service, job_id: str) -> None:
    for limit in (1, 2, 3):
        seen: list[int] = []
        after: int | None = 0
        while after is not None:
            page = any_service.get(f"/jobs/{job_id}/checkpoints", after=after, limit=limit)
            seen += [item["step"] for item in page["items"]]
            after = page["next"]
        assert seen == [10, 20, 30]


def test_an_unknown_id_is_404(any_service: Service) -> None:
    for unknown in ODD_IDS:
        ok(any_service.http.get(f"/jobs/{unknown}/checkpoints"), 404)


@pytest.mark.parametrize("query", ["after=-1", "limit=0", "limit=1001", "step=1"])
def test_what_cannot_be_asked_is_422(service: Service, query: str) -> None:
    job = service.submit()["id"]
    name = query.partition("=")[0]
    answer = ok(service.http.get(f"/jobs/{job}/checkpoints?{query}"), 422)
    assert set(faults(answer)) == {name}
