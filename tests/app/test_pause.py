"""Pausing a job and letting it go on: legal moves only, each of them once."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db import Database, now
from app.jobs.repository import JobRepository
from app.jobs.states import Status
from app.tables import JobRow, OutboxRow
from tests.app.service import Json, Service, ok
from tests.app.test_jobs import ODD_IDS

ENDING = [Status.CANCELLING, Status.CANCELLED, Status.SUCCEEDED, Status.FAILED]


def ask(service: Service, what: str, job_id: str, status: int = 202) -> Json:
    return ok(service.http.post(f"/jobs/{job_id}/{what}"), status)


def events(service: Service, job_id: str) -> list[str]:
    return [event["type"] for event in service.get(f"/jobs/{job_id}/events")["items"]]


def column(service: Service, job_id: str, name: str) -> Any:
    with Session(service.engine) as session:
        return session.scalar(select(getattr(JobRow, name)).where(JobRow.id == job_id))


class TestPause:
    def test_a_waiting_job_is_paused_at_once(self, any_service: Service) -> None:
        first, second = (any_service.submit()["id"] for _ in range(2))
        job = ask(any_service, "pause", first)
        assert (job["status"], job["queue_position"], job["finished_at"]) == ("paused", None, None)
        assert any_service.get(f"/jobs/{second}")["queue_position"] == 0
        assert events(any_service, first) == ["job.queued", "job.paused"]

    def test_a_running_one_is_asked_to_stop(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, status=Status.RUNNING)
        assert ask(any_service, "pause", job_id)["status"] == "pausing"
        assert events(any_service, job_id) == ["job.queued", "job.pausing"]

    def test_asking_twice_changes_nothing(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        for status in (Status.PAUSING, Status.PAUSED):
            any_service.set(job_id, status=status)
            before = any_service.get(f"/jobs/{job_id}")
            assert ask(any_service, "pause", job_id) == before
        assert events(any_service, job_id) == ["job.queued"]

    def test_what_ends_or_has_ended_is_409(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        for status in ENDING:
            any_service.set(job_id, status=status)
            problem = ask(any_service, "pause", job_id, 409)
            assert problem["code"] == "illegal_transition"
            assert f"is {status} " in problem["detail"]

    def test_an_unknown_id_is_404(self, any_service: Service) -> None:
        for job_id in ODD_IDS:
            for what in ("pause", "resume"):
                ask(any_service, what, job_id, 404)

    def test_twenty_at_once_are_one(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        with ThreadPoolExecutor(10) as pool:
            answers = pool.map(lambda _: ask(any_service, "pause", job_id), range(20))
        assert {answer["status"] for answer in answers} == {"paused"}
        assert events(any_service, job_id) == ["job.queued", "job.paused"]


class TestResume:
    def test_a_paused_job_takes_its_old_place_in_the_queue(self, any_service: Service) -> None:
        first, second = (any_service.submit()["id"] for _ in range(2))
        ask(any_service, "pause", first)
        job = ask(any_service, "resume", first)
        assert (job["status"], job["queue_position"]) == ("queued", 0)
        assert any_service.get(f"/jobs/{second}")["queue_position"] == 1
        assert events(any_service, first) == ["job.queued", "job.paused", "job.resumed"]

    def test_what_goes_on_already_is_as_wished(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        for status in (Status.QUEUED, Status.RUNNING):
            any_service.set(job_id, status=status)
            before = any_service.get(f"/jobs/{job_id}")
            assert ask(any_service, "resume", job_id) == before
        assert events(any_service, job_id) == ["job.queued"]

    def test_one_whose_trainer_has_not_stopped_is_409_and_says_what_to_do(
        self, any_service: Service
    ) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, status=Status.PAUSING)
        problem = ask(any_service, "resume", job_id, 409)
        assert "is pausing " in problem["detail"]
        assert "wait until the job is paused" in problem["hint"]

    def test_what_ends_or_has_ended_is_409(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        for status in ENDING:
            any_service.set(job_id, status=status)
            assert f"is {status} " in ask(any_service, "resume", job_id, 409)["detail"]

    def test_its_time_in_the_queue_stands_still_meanwhile(self, any_service: Service) -> None:
        job_id = any_service.submit(resources={"max_queue_time": 100})["id"]
        ask(any_service, "pause", job_id)
        # It was paused an hour ago, when it had 40 seconds left.
        any_service.set(job_id, paused_at=now(-3600), queue_deadline=now(-3560))
        ask(any_service, "resume", job_id)
        with Session(any_service.engine) as session:
            deadline, moment = session.execute(
                select(JobRow.queue_deadline, now()).where(JobRow.id == job_id)
            ).one()
        assert deadline is not None
        assert (deadline - moment).total_seconds() == pytest.approx(40, abs=2)

    def test_a_job_without_a_deadline_gets_none(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        ask(any_service, "pause", job_id)
        assert isinstance(column(any_service, job_id, "paused_at"), datetime)
        ask(any_service, "resume", job_id)
        assert column(any_service, job_id, "queue_deadline") is None

    def test_it_wakes_the_workers_of_a_cluster_once(self, any_service: Service) -> None:
        job_id = any_service.submit()["id"]
        any_service.set(job_id, status=Status.PAUSED, available_at=now(3600))

        async def resume_twice() -> None:
            database = Database(any_service.settings.database)
            for _ in range(2):
                async with database.scoped("default", writes=True) as session:
                    await JobRepository(session, wakes=True).resume(job_id)
            await database.engine.dispose()

        asyncio.run(resume_twice())
        with Session(any_service.engine) as session:
            assert session.scalars(select(OutboxRow.job_id)).all() == [job_id]
        assert column(any_service, job_id, "available_at") is None
