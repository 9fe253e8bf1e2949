"""A job that is over is done again, or deleted with all that belongs to it."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session
from structlog.testing import capture_logs

from app.db import now
from app.ids import new_id
from app.jobs.states import Status
from app.retention import Retention
from app.storage import ArtifactStore, Outage
from app.tables import (
    EventRow,
    IdempotencyRow,
    JobRow,
    LogRow,
    MetricRow,
    OutboxRow,
    Table,
)
from tests.app.service import Json, Service, ok
from tests.app.test_jobs import ODD_IDS

OVER = [Status.SUCCEEDED, Status.FAILED, Status.CANCELLED]
NOT_OVER = [status for status in Status if status not in OVER]


def post(service: Service, job_id: str, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return service.http.post(f"/jobs/{job_id}/retry", headers=named)


def retry(service: Service, job_id: str, **headers: str) -> Json:
    return ok(post(service, job_id, **headers), 202)


def ended(service: Service, status: Status = Status.FAILED, **values: Any) -> str:
    job_id: str = service.submit(**values)["id"]
    service.set(job_id, status=status)
    return job_id


class TestRetry:
    def test_it_is_a_new_job_with_the_same_spec(self, any_service: Service) -> None:
        asked = {"rank": 7, "labels": {"a": "b"}, "priority": 2, "name": "n"}
        old = any_service.get(f"/jobs/{ended(any_service, OVER[0], **asked)}")
        response = post(any_service, old["id"])
        new = ok(response, 202)
        assert new["id"] != old["id"]
        assert new["retried_from"] == old["id"]
        assert (new["spec"], new["labels"], new["name"]) == (
            old["spec"], old["labels"], old["name"],
        )  # fmt: skip
        assert (new["status"], new["attempt"], new["step"]) == ("queued", 0, 0)
        assert response.headers["location"] == f"/jobs/{new['id']}"
        assert response.headers["retry-after"] == "2"
        assert "idempotent-replayed" not in response.headers
        assert any_service.get(f"/jobs/{old['id']}") == old
        (event,) = any_service.get(f"/jobs/{new['id']}/events")["items"]
        assert (event["type"], event["data"]) == ("job.queued", {"retried_from": old["id"]})

    def test_whatever_its_end_was(self, service: Service) -> None:
        for status in OVER:
            assert retry(service, ended(service, status))["status"] == "queued"

    def test_while_one_is_not_over_it_is_the_answer(self, any_service: Service) -> None:
        job_id = ended(any_service)
        first = retry(any_service, job_id)
        for status in NOT_OVER:
            any_service.set(first["id"], status=status)
            response = post(any_service, job_id)
            assert response.json()["id"] == first["id"]
            assert response.headers["idempotent-replayed"] == "true"
        any_service.set(first["id"], status=Status.FAILED)
        assert retry(any_service, job_id)["id"] != first["id"]

    def test_twenty_at_once_make_one(self, any_service: Service) -> None:
        job_id = ended(any_service)
        with ThreadPoolExecutor(20) as pool:
            jobs = list(pool.map(lambda _: retry(any_service, job_id), range(20)))
        assert len({job["id"] for job in jobs}) == 1
        assert len(any_service.get("/jobs")["items"]) == 2
        (line,) = any_service.get("/audit", action="retry_job")["items"]
        assert line["object"] == jobs[0]["id"]

    def test_one_key_makes_one_also_after_its_end(self, any_service: Service) -> None:
        job_id = ended(any_service)
        first = retry(any_service, job_id, Idempotency_Key="k")
        any_service.set(first["id"], status=Status.FAILED)
        again = post(any_service, job_id, Idempotency_Key="k")
        assert again.json()["id"] == first["id"]
        assert again.headers["idempotent-replayed"] == "true"
        assert retry(any_service, job_id, Idempotency_Key="other")["id"] != first["id"]

    def test_a_key_that_finds_the_running_one_finds_it_later_too(
        self, any_service: Service
    ) -> None:
        job_id = ended(any_service)
        first = retry(any_service, job_id)
        assert retry(any_service, job_id, Idempotency_Key="k")["id"] == first["id"]
        any_service.set(first["id"], status=Status.CANCELLED)
        assert retry(any_service, job_id, Idempotency_Key="k")["id"] == first["id"]

    def test_twenty_at_once_with_one_key_make_one(self, any_service: Service) -> None:
        job_id = ended(any_service)
        with ThreadPoolExecutor(20) as pool:
            answers = pool.map(lambda _: retry(any_service, job_id, Idempotency_Key="k"), range(20))
            assert len({job["id"] for job in answers}) == 1

    def test_a_key_of_another_request_is_422(self, any_service: Service) -> None:
        any_service.post(any_service.body, Idempotency_Key="k")
        job_id, other = ended(any_service), ended(any_service)
        retry(any_service, other, Idempotency_Key="l")
        retry(any_service, job_id)
        for key in ("k", "l"):
            problem = ok(post(any_service, job_id, Idempotency_Key=key), 422)
            assert problem["code"] == "idempotency_key_reused"

    def test_what_is_not_over_is_409(self, any_service: Service) -> None:
        job_id = ended(any_service)
        for status in NOT_OVER:
            any_service.set(job_id, status=status)
            problem = ok(post(any_service, job_id), 409)
            assert problem["code"] == "illegal_transition"
            assert f"is {status} " in problem["detail"]

    def test_what_could_not_be_submitted_now_is_422(self, any_service: Service) -> None:
        job_id = ended(any_service)
        (any_service.rows / "train.jsonl").unlink()
        assert "/dataset_uri" in {
            fault["pointer"] for fault in ok(post(any_service, job_id), 422)["errors"]
        }

    def test_an_unknown_id_is_404(self, any_service: Service) -> None:
        for job_id in ODD_IDS:
            ok(post(any_service, job_id), 404)


def rows(service: Service) -> dict[str, int]:
    """Of the tables that hold any."""
    with Session(service.engine) as session:
        counted = {
            name: session.scalar(select(func.count()).select_from(table)) or 0
            for name, table in Table.metadata.tables.items()
        }
    return {name: number for name, number in counted.items() if number}


def delete(service: Service, job_id: str) -> httpx2.Response:
    return service.http.delete(f"/jobs/{job_id}")


class TestDelete:
    def test_its_rows_and_files_are_gone_and_nobody_elses(self, any_service: Service) -> None:
        kept = any_service.finished()["id"]
        before = rows(any_service)
        job_id = any_service.finished()["id"]
        any_service.store.put_manifest(job_id, {"adapter": {"files": []}})
        values = {"job_id": job_id, "at": now()}
        with Session(any_service.engine) as session, session.begin():
            session.execute(insert(EventRow).values(seq=9, type="t", message="m", **values))
            session.execute(insert(LogRow).values(seq=1, text="x", **values))
            session.execute(
                insert(MetricRow).values(job_id=job_id, series="train", step=1, data={})
            )
            session.execute(insert(OutboxRow).values(job_id=job_id, due_at=now(), created_at=now()))
            session.execute(
                insert(IdempotencyRow).values(
                    key="k", body_sha256="0", job_id=job_id, created_at=now()
                )
            )
        response = delete(any_service, job_id)
        assert (response.status_code, response.content) == (204, b"")
        after = rows(any_service)
        assert after.pop("usage") == 1, "its project is still charged for it"
        assert after.pop("audit_events") > before.pop("audit_events")
        assert after == before
        assert any_service.store.manifest(job_id) is None
        ok(any_service.http.get(f"/jobs/{job_id}"), 404)
        ok(any_service.http.get(f"/jobs/{job_id}/adapter"), 404)
        ok(delete(any_service, job_id), 404)
        name = "adapter_model.safetensors"
        assert any_service.http.get(f"/jobs/{kept}/adapter/{name}").is_success, "the same bytes"

    def test_bytes_that_nobody_else_has_go_with_the_next_cleaning(self, service: Service) -> None:
        job_id = service.finished({"only.bin": b"only here"})["id"]
        service.finished({"shared.bin": b"shared"})
        other = service.finished({"shared.bin": b"shared"})["id"]
        delete(service, job_id)
        delete(service, other)
        settings = service.settings.model_copy(update={"keep_unreferenced_hours": 0})
        cleaned = Retention(service.engine, service.store, settings).clean()
        assert cleaned.blobs.files == 1

    def test_what_is_not_over_is_409_and_stays(self, any_service: Service) -> None:
        job_id = ended(any_service)
        for status in NOT_OVER:
            any_service.set(job_id, status=status)
            problem = ok(delete(any_service, job_id), 409)
            assert problem["code"] == "illegal_transition"
            assert "cancel it first" in problem["hint"]
            assert any_service.get(f"/jobs/{job_id}")["status"] == status

    def test_an_unknown_id_is_404(self, any_service: Service) -> None:
        for job_id in [*ODD_IDS, new_id("job")]:
            ok(delete(any_service, job_id), 404)

    def test_a_store_that_is_away_keeps_its_files_for_the_cleaner(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = ended(service)

        def forget_job(_store: ArtifactStore, _job_id: str) -> None:
            raise Outage("away")

        monkeypatch.setattr(ArtifactStore, "forget_job", forget_job)
        with capture_logs() as logged:
            assert delete(service, job_id).status_code == 204
        assert "files of a deleted job stay for the cleaner" in [line["event"] for line in logged]

    def test_what_was_retried_from_it_still_says_so(self, any_service: Service) -> None:
        job_id = ended(any_service)
        again = retry(any_service, job_id)
        delete(any_service, job_id)
        assert any_service.get(f"/jobs/{again['id']}")["retried_from"] == job_id


def test_the_row_of_a_retry_is_found_by_an_index(any_service: Service) -> None:
    statement = select(JobRow.id).where(
        JobRow.retried_from == "x", JobRow.status.not_in([Status.FAILED])
    )
    dialect = any_service.engine.dialect
    text = str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    explain = "EXPLAIN " if dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    with any_service.engine.begin() as connection:
        if dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        plan = str(connection.exec_driver_sql(explain + text).all())
    assert "ix_jobs_retried_from" in plan
