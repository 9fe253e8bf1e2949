"""Reading jobs, cancelling them, and following what they do."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.event import listen
from sqlalchemy.orm import Session

from app.db import Database
from app.jobs.events import event
from app.jobs.places import places
from app.jobs.repository import JobFilter, JobRepository
from app.jobs.states import Reason, Status
from tests.app.service import Json, Service, faults, ok

NO_JOB = "job_" + "0" * 32
ODD_IDS = [NO_JOB, "job_1", "x", "%00", "job_%ff", "..%2fx", NO_JOB.upper()]


class TestGet:
    def test_the_queue_position_counts_the_jobs_before_it(self, any_service: Service) -> None:
        ids = [any_service.submit()["id"] for _ in range(3)]
        any_service.set(ids[0], status=Status.RUNNING)
        positions = [any_service.get(f"/jobs/{job_id}")["queue_position"] for job_id in ids]
        assert positions == [None, 0, 1]

    def test_the_places_of_a_whole_page_are_asked_for_by_two_statements(
        self, any_service: Service
    ) -> None:
        ids = [any_service.submit()["id"] for _ in range(6)]
        any_service.set(ids[1], status=Status.RUNNING)
        any_service.set(ids[3], status=Status.CANCELLED)

        async def ask() -> tuple[dict[str, int], list[str]]:
            database, statements = Database(any_service.settings.database), []
            async with database.scoped("default") as session:
                jobs = JobRepository(session)
                rows = await jobs.page(JobFilter(), limit=4, after=None)
                listen(
                    database.engine.sync_engine,
                    "before_cursor_execute",
                    lambda *given: statements.append(given[2]),
                )
                found = await places(session, rows)
            await database.engine.dispose()
            return found, statements

        found, statements = asyncio.run(ask())
        assert found == {ids[2]: 1, ids[4]: 2, ids[5]: 3}
        assert len(statements) == 2

    def test_it_is_304_until_something_has_changed(self, any_service: Service) -> None:
        path = f"/jobs/{any_service.submit()['id']}"
        first = any_service.http.get(path)
        etag = first.headers["etag"]
        for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            again = any_service.http.get(path, headers={"If-None-Match": given})
            assert (again.status_code, again.content) == (304, b"")
            assert (again.headers["etag"], again.headers["retry-after"]) == (etag, "2")
        assert any_service.http.get(path, headers={"If-None-Match": '"other"'}).is_success
        any_service.set(first.json()["id"], step=1)
        changed = any_service.http.get(path, headers={"If-None-Match": etag})
        assert changed.status_code == 200
        assert changed.headers["etag"] != etag

    def test_a_failed_job_says_why_and_who_can_fix_it(self, service: Service) -> None:
        job_id = service.submit()["id"]
        service.set(
            job_id, status=Status.FAILED, reason=Reason.DATASET_INVALID, message="m", hint="h"
        )
        assert service.get(f"/jobs/{job_id}")["failure"] == {
            "reason": "dataset_invalid", "message": "m", "hint": "h", "yours_to_fix": True,
        }  # fmt: skip

    @pytest.mark.parametrize(
        "progress",
        [
            {"loss": 1.5, "tokens": 12, "sigma": None},
            {"rows": 5, "of": None},
            {"loss": 0.5, "of_a_newer_trainer": {"a": [1]}},
            {"loss": 0.5, "tokens": 1.5, "rows": 0},
            {},
        ],
    )
    def test_its_progress_is_passed_on_as_it_was_written(
        self, service: Service, progress: Json
    ) -> None:
        job_id = service.submit()["id"]
        service.set(job_id, progress=progress, result=progress)
        found = service.get(f"/jobs/{job_id}")
        assert (found["progress"], found["result"]) == (progress, progress)

    @pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
    def test_nor_is_it_lost_where_it_is_of_another_kind(self, service: Service) -> None:
        job_id = service.submit()["id"]
        service.set(job_id, progress={"loss": "low"}, result={"steps": 1.5, "held_out": 3})
        found = service.get(f"/jobs/{job_id}")
        assert found["progress"] == {"loss": "low"}
        assert found["result"] == {"steps": 1.5, "held_out": 3}

    def test_it_says_when_to_ask_again_until_it_is_over(self, service: Service) -> None:
        job_id = service.submit()["id"]
        for status, said in [("queued", True), ("running", True), ("cancelled", False)]:
            service.set(job_id, status=status)
            headers = service.http.get(f"/jobs/{job_id}").headers
            assert ("retry-after" in headers) is said

    @pytest.mark.parametrize("path", ["", "/events", "/metrics", "/adapter", "/adapter/x"])
    def test_an_unknown_id_is_404(self, any_service: Service, path: str) -> None:
        for job_id in ODD_IDS:
            problem = ok(any_service.http.get(f"/jobs/{job_id}{path}"), 404)
            assert problem["code"] in {"job_not_found", "not_found"}


class TestList:
    def ids(self, service: Service, **params: Any) -> list[str]:
        return [job["id"] for job in service.get("/jobs", **params)["items"]]

    def test_pages_hold_every_job_once_newest_first(self, any_service: Service) -> None:
        made = [any_service.submit()["id"] for _ in range(7)]
        seen, after = [], None
        while True:
            page = any_service.get("/jobs", limit=3, **({"after": after} if after else {}))
            seen += [job["id"] for job in page["items"]]
            after = page["next"]
            if after is None:
                break
        assert seen == made[::-1]

    def test_it_shows_all_of_a_job_but_its_report(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, report={"first_example": "a whole row"})
        job = any_service.get(f"/jobs/{job_id}")
        assert job.pop("report") == {"first_example": "a whole row"}
        assert any_service.get("/jobs")["items"] == [job]

    def test_a_job_that_comes_meanwhile_moves_no_page(self, service: Service) -> None:
        made = [service.submit()["id"] for _ in range(4)]
        page = service.get("/jobs", limit=2)
        service.submit()
        assert self.ids(service, after=page["next"]) == made[1::-1]

    def test_filters(self, any_service: Service) -> None:
        nlp = any_service.submit(labels={"team": "nlp", "a.b/c": "1"})["id"]
        hub = any_service.submit(base_model="org/name", labels={"team": "vision"})["id"]
        any_service.set(nlp, status=Status.RUNNING)
        assert self.ids(any_service, status="running") == [nlp]
        assert self.ids(any_service, status=["running", "queued"]) == [hub, nlp]
        assert self.ids(any_service, base_model="org/name") == [hub]
        assert self.ids(any_service, **{"label.team": "nlp"}) == [nlp]
        assert self.ids(any_service, **{"label.a.b/c": "1", "label.team": "nlp"}) == [nlp]
        assert self.ids(any_service, **{"label.team": "vision", "status": "running"}) == []
        assert self.ids(any_service, **{"label.nobody": "x"}) == []

    def test_created_after(self, any_service: Service) -> None:
        first = any_service.submit()
        second = any_service.submit()
        any_service.set(first["id"], created_at=datetime.now(UTC) - timedelta(hours=2))
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        assert self.ids(any_service, created_after=hour_ago.isoformat()) == [second["id"]]
        west = hour_ago.astimezone(tz=None).isoformat()
        assert self.ids(any_service, created_after=west) == [second["id"]]

    def test_what_cannot_be_asked_is_422(self, any_service: Service) -> None:
        for query, name, word in [
            ("foo=1", "foo", "Known are status, base_model"),
            ("status=done", "status", "'queued'"),
            ("limit=0", "limit", "greater than or equal to 1"),
            ("limit=101", "limit", "less than or equal to 100"),
            ("limit=x", "limit", "integer"),
            ("after=nonsense", "after", "cursor"),
            ("after=%C3%A9", "after", "cursor"),
            ("after=MjAyNi0wMS0wMVQwMDowMDowMCB4", "after", "cursor"),
            ("created_after=yesterday", "created_after", "RFC 3339"),
            ("created_after=0.5", "created_after", "RFC 3339"),
            ("created_after=2026-01-01T00:00:00", "created_after", "timezone"),
            ("created_after=0001-01-01T00:00:00%2B10:00", "created_after", "UTC"),
            ("base_model=%00", "base_model", "pattern"),
            ("label.a%20b=1", "label.a b", "label"),
            ("label.=1", "label.", "label"),
            ("label.a=%00", "label.a", "label"),
        ]:
            problem = ok(any_service.http.get(f"/jobs?{query}"), 422)
            assert word in faults(problem)[name]


class TestCancel:
    def cancel(self, service: Service, job_id: str, status: int = 202) -> Json:
        return ok(service.http.post(f"/jobs/{job_id}/cancel"), status)

    def events(self, service: Service, job_id: str) -> list[str]:
        return [event["type"] for event in service.get(f"/jobs/{job_id}/events")["items"]]

    @pytest.mark.parametrize("status", [Status.QUEUED, Status.PAUSED])
    def test_a_waiting_job_is_cancelled_at_once(self, any_service: Service, status: Status) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, status=status)
        job = self.cancel(any_service, job_id)
        assert job["status"] == "cancelled"
        assert job["finished_at"] >= job["created_at"]
        assert self.events(any_service, job_id) == ["job.queued", "job.cancelled"]

    @pytest.mark.parametrize("status", [Status.RUNNING, Status.PAUSING])
    def test_a_held_job_is_asked_to_stop(self, any_service: Service, status: Status) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, status=status)
        job = self.cancel(any_service, job_id)
        assert (job["status"], job["finished_at"]) == ("cancelling", None)
        assert self.events(any_service, job_id) == ["job.queued", "job.cancelling"]

    @pytest.mark.parametrize("status", [Status.CANCELLING, Status.CANCELLED])
    def test_asking_twice_changes_nothing(self, any_service: Service, status: Status) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, status=status)
        before = any_service.get(f"/jobs/{job_id}")
        assert self.cancel(any_service, job_id) == before
        assert self.events(any_service, job_id) == ["job.queued"]

    @pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED])
    def test_a_job_that_is_over_is_409(self, any_service: Service, status: Status) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, status=status)
        problem = self.cancel(any_service, job_id, 409)
        assert problem["code"] == "illegal_transition"
        assert status in problem["detail"]

    def test_an_unknown_id_is_404(self, any_service: Service) -> None:
        for job_id in ODD_IDS:
            self.cancel(any_service, job_id, 404)


class TestEvents:
    def test_pages_follow_on(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        with Session(any_service.engine) as session, session.begin():
            for number in range(4):
                session.execute(event(job_id, "job.evaluated", f"{number}", step=number))
        first = any_service.get(f"/jobs/{job_id}/events", limit=2)
        assert [item["seq"] for item in first["items"]] == [1, 2]
        assert first["items"][1]["data"] == {"step": 0}
        rest = any_service.get(f"/jobs/{job_id}/events", after=first["next"])
        assert [item["seq"] for item in rest["items"]] == [3, 4, 5]

    def test_an_empty_page_says_where_to_go_on(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        for after in (1, 5):
            page = any_service.get(f"/jobs/{job_id}/events", after=after)
            assert page == {"items": [], "next": after}

    @pytest.mark.parametrize(
        "query", ["after=-1", f"after={2**64}", "limit=0", "limit=1001", "seq=1"]
    )
    def test_what_cannot_be_asked_is_422(self, service: Service, query: str) -> None:
        job_id = service.submit()["id"]
        name = query.partition("=")[0]
        assert set(faults(ok(service.http.get(f"/jobs/{job_id}/events?{query}"), 422))) == {name}


class TestMetrics:
    def test_both_series_by_step(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        any_service.add_metrics(job_id, "train", range(1, 6))
        any_service.add_metrics(job_id, "held_out", range(2, 3))
        items = any_service.get(f"/jobs/{job_id}/metrics")["items"]
        places = [(item["step"], item["series"]) for item in items]
        assert places == [(1, "train"), (2, "held_out"), (2, "train"), (3, "train"), (4, "train"),
                          (5, "train")]  # fmt: skip
        assert items[0]["data"] == {"loss": 1.0}

    def test_one_series_from_a_step(self, service: Service) -> None:
        job_id = service.submit()["id"]
        service.add_metrics(job_id, "train", range(1, 6))
        found = service.get(f"/jobs/{job_id}/metrics", series="train", since_step=4)
        assert [item["step"] for item in found["items"]] == [4, 5]
        assert found["next"] is None

    @pytest.mark.parametrize("limit", range(2, 9))
    def test_pages_hold_every_point_once(self, service: Service, limit: int) -> None:
        job_id = service.submit()["id"]
        service.add_metrics(job_id, "train", range(1, 8))
        service.add_metrics(job_id, "held_out", range(2, 8, 2))
        whole = service.get(f"/jobs/{job_id}/metrics")["items"]
        seen: list[Json] = []
        step: int | None = 0
        while step is not None:
            page = service.get(f"/jobs/{job_id}/metrics", since_step=step, limit=limit)
            seen += page["items"]
            step = page["next"]
        assert seen == whole

    @pytest.mark.parametrize("query", ["since_step=-1", "series=loss", "limit=1", "x=1"])
    def test_what_cannot_be_asked_is_422(self, service: Service, query: str) -> None:
        job_id = service.submit()["id"]
        name = query.partition("=")[0]
        assert set(faults(ok(service.http.get(f"/jobs/{job_id}/metrics?{query}"), 422))) == {name}
