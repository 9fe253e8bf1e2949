"""GET /jobs/{id}/logs."""

import pytest
from sqlalchemy import insert
from sqlalchemy.orm import Session

from app.db import now
from app.tables import LogRow
from tests.app.service import Service, faults, ok
from tests.app.test_jobs import ODD_IDS


@pytest.fixture
def job_id(any_service: Service) -> str:
    found: str = any_service.submit()["id"]
    with Session(any_service.engine) as session, session.begin():
        for seq in range(1, 8):
            row = insert(LogRow).values(job_id=found, seq=seq, at=now(), text=f"line {seq} \x1b[0m")
            session.execute(row)
    return found


def test_pages_hold_every_line_once(any_service: Service, job_id: str) -> None:
    seen, after = [], 0
    while True:
        page = any_service.get(f"/jobs/{job_id}/logs", after=after, limit=3)
        if not page["items"]:
            break
        seen += page["items"]
        after = page["next"]
    assert page == {"items": [], "next": 7}
    assert [line["seq"] for line in seen] == list(range(1, 8))
    assert {tuple(line) for line in seen} == {("seq", "at", "text")}
    assert seen[0]["text"] == "line 1 \x1b[0m"


def test_an_unknown_id_is_404(any_service: Service) -> None:
    for unknown in ODD_IDS:
        ok(any_service.http.get(f"/jobs/{unknown}/logs"), 404)


@pytest.mark.parametrize("query", ["after=-1", "limit=0", "limit=10001", "tail=1"])
def test_what_cannot_be_asked_is_422(service: Service, query: str) -> None:
    job = service.submit()["id"]
    name = query.partition("=")[0]
    assert set(faults(ok(service.http.get(f"/jobs/{job}/logs?{query}"), 422))) == {name}
