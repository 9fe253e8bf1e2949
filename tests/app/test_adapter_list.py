"""``GET /adapters``: which jobs it shows, in which order, and at what cost."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Dialect, Engine, Select, null, text
from sqlalchemy.dialects import postgresql, sqlite

from app.adapters.repository import newest
from app.jobs.repository import JobFilter
from app.jobs.states import Status
from app.tables import JobRow
from tests.app.service import FILES, Json, Service, faults, ok

RESULT = {
    "held_out": {
        "rows": 7,
        "before": {"loss": 2.5, "accuracy": 0.25},
        "after": {"loss": 1.25, "accuracy": 0.5},
    },
    "steps": 12, "kept_step": 10, "epochs": 2.0, "train_tokens": 3000, "trainable_parameters": 64,
}  # fmt: skip
MOMENT = datetime(2026, 11, 27, 12, tzinfo=UTC)


def finished(service: Service, **values: Any) -> Json:
    job = service.finished()
    service.set(job["id"], **values)
    return job


def stored_spec(service: Service) -> Json:
    """As a job's row has it."""
    spec: Json = service.submit()["spec"]
    return spec


def ids(page: Json) -> list[str]:
    return [item["job_id"] for item in page["items"]]


class TestList:
    def test_it_says_all_that_a_client_needs(self, any_service: Service) -> None:
        job = finished(
            any_service, name="n", labels={"team": "a"}, result=RESULT, finished_at=MOMENT,
            spec=stored_spec(any_service) | {"rank": 8, "sigma": 0.1},
        )  # fmt: skip
        [found] = any_service.get("/adapters")["items"]
        url = f"/jobs/{job['id']}/adapter"
        assert found == {
            "job_id": job["id"], "name": "n", "labels": {"team": "a"}, "base_model": "file:tiny",
            "base_model_revision": None, "rank": 8, "sigma": 0.1, "url": url,
            "size": sum(map(len, FILES.values())), "created_at": "2026-11-27T12:00:00Z",
            "files": [
                file | {"url": f"{url}/{file['name']}"} for file in job["adapter"]["files"]
            ],
            "metrics": {
                "loss_before": 2.5, "loss_after": 1.25, "accuracy_before": 0.25,
                "accuracy_after": 0.5, "held_out_rows": 7, "steps": 12, "kept_step": 10,
                "epochs": 2.0, "train_tokens": 3000, "trainable_parameters": 64,
            },
        }  # fmt: skip
        assert any_service.get(f"/adapters/{job['id']}") == found
        for file in found["files"]:
            assert any_service.http.get(file["url"]).content == FILES[file["name"]]
        assert any_service.http.get(found["url"]).status_code == 200

    def test_a_job_without_an_adapter_is_none_and_a_dry_run_is_none_either(
        self, any_service: Service
    ) -> None:
        """The worker ends a dry run with a JSON null, which is not NULL."""
        queued, dry, failed = (any_service.submit()["id"] for _ in range(3))
        any_service.set(dry, status=Status.SUCCEEDED, adapter=None, finished_at=MOMENT)
        any_service.set(failed, status=Status.FAILED, adapter=null(), finished_at=MOMENT)
        with any_service.engine.connect() as connection:
            query = text("SELECT count(*) FROM jobs WHERE adapter IS NOT NULL")
            assert connection.scalar(query) == 1
        assert any_service.get("/adapters") == {"items": [], "next": None}
        for job_id in (queued, dry, failed, "x", "%00", "job_" + "0" * 32):
            answer = any_service.http.get(f"/adapters/{job_id}")
            assert ok(answer, 404)["code"] == "adapter_not_found"

    def test_pages_hold_every_adapter_once_the_newest_first(self, any_service: Service) -> None:
        made = [any_service.finished()["id"] for _ in range(7)]
        for number, job_id in enumerate(made):  # some at the same moment
            any_service.set(job_id, finished_at=MOMENT + timedelta(minutes=number // 3))
        seen: list[str] = []
        query: Json = {"limit": 2}
        while True:
            page = any_service.get("/adapters", **query)
            seen += ids(page)
            if page["next"] is None:
                break
            query["after"] = page["next"]
        assert seen == made[::-1]

    def test_filters_by_base_model_and_label(self, any_service: Service) -> None:
        one = finished(any_service, base_model="org/a", labels={"team": "x", "run": "1"})["id"]
        other = finished(any_service, base_model="org/b", labels={"team": "x"})["id"]
        get = any_service.get
        assert ids(get("/adapters", base_model="org/a")) == [one]
        assert ids(get("/adapters", **{"label.team": "x"})) == [other, one]
        assert ids(get("/adapters", **{"label.team": "x", "label.run": "1"})) == [one]
        assert ids(get("/adapters", **{"label.team": "y"})) == []

    @pytest.mark.parametrize("query", ["after=x", "limit=0", "status=queued", "base_model=%00"])
    def test_what_cannot_be_asked_is_422(self, service: Service, query: str) -> None:
        name: Any = query.partition("=")[0]
        assert set(faults(ok(service.http.get(f"/adapters?{query}"), 422))) == {name}

    @pytest.mark.parametrize("known_by", ["trainer", "cluster", "asked"])
    def test_the_commit_of_the_base_where_it_is_known(
        self, service: Service, known_by: str
    ) -> None:
        spec = stored_spec(service) | {"base_model_revision": "main"}
        values: Json = {"spec": spec, "result": {}}
        if known_by != "asked":
            values["inputs"] = {"base_model": {"name": "org/a", "revision": "c0ffee"}}
        if known_by == "trainer":
            values["result"] = {"base_model_revision": "beef"}
        finished(service, **values)
        [found] = service.get("/adapters")["items"]
        expected = {"trainer": "beef", "cluster": "c0ffee", "asked": "main"}
        assert found["base_model_revision"] == expected[known_by]


class TestCost:
    @pytest.mark.parametrize("after", [None, (MOMENT, "job_" + "0" * 32)])
    def test_a_page_is_read_from_an_index_of_adapters_alone(
        self, any_service: Service, after: Any
    ) -> None:
        statement = newest(JobFilter(), limit=21, after=after).where(JobRow.project == "default")
        plan = explained(any_service.engine, statement)
        assert "ix_jobs_adapters" in plan
        assert "sort" not in plan.lower()
        assert "temp b-tree" not in plan.lower()


def explained(engine: Engine, statement: Select[Any]) -> str:
    """How the database would run it, in a table that has many rows."""
    is_postgres = engine.dialect.name == "postgresql"
    dialect: Dialect = postgresql.dialect() if is_postgres else sqlite.dialect()  # type: ignore[no-untyped-call]
    sql = str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    with engine.connect() as connection:
        if is_postgres:
            connection.exec_driver_sql("SET enable_seqscan = off")
        verb = "EXPLAIN" if is_postgres else "EXPLAIN QUERY PLAN"
        rows = connection.exec_driver_sql(f"{verb} {sql}".replace("%", "%%"))
        return "\n".join(str(tuple(row)) for row in rows)
