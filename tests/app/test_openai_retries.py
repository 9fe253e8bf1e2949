"""OpenAI's client asks again when an answer is lost: that makes no second job (decision 0015)."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from openai import BadRequestError, OpenAI
from sqlalchemy import update
from sqlalchemy.orm import Session

from app.db import now
from app.settings import Settings
from app.tables import IdempotencyRow
from tests.app.conftest import make_settings, serve
from tests.app.openai_client import client_of
from tests.app.service import Service, ok
from tests.system.service import until


def create(openai: OpenAI, retry: int = 0, key: str = "", **values: Any) -> str:
    """The id of the job that a request is answered with. ``retry``: the number of the try."""
    headers = {"x-stainless-retry-count": str(retry)} | ({"Idempotency-Key": key} if key else {})
    given = {"model": "file:tiny", "training_file": "file:train.jsonl"} | values
    return openai.fine_tuning.jobs.create(**given, extra_headers=headers).id


def count(openai: OpenAI) -> int:
    return len(list(openai.fine_tuning.jobs.list(limit=1000)))


class TestWithoutAKey:
    def test_a_retry_is_answered_with_the_job_and_the_same_request_again_makes_another(
        self, any_service: Service
    ) -> None:
        openai = client_of(any_service)
        first = create(openai)
        assert [create(openai, retry) for retry in (1, 2)] == [first, first]
        second = create(openai)
        assert second != first
        assert create(openai, 1) == second
        assert count(openai) == 2

    def test_requests_at_once_whose_answers_are_lost_get_a_job_each(
        self, any_service: Service
    ) -> None:
        openai = client_of(any_service)
        made = {create(openai) for _ in range(3)}
        again = [create(openai, 1) for _ in range(3)]
        assert set(again) == made
        assert {create(openai, 2) for _ in range(3)} == made
        assert count(openai) == 3

    def test_a_retry_whose_first_try_never_came_makes_the_job(self, service: Service) -> None:
        openai = client_of(service)
        job = create(openai, 1)
        assert create(openai, 2) == job
        assert create(openai, 1) != job  # it has had a first retry: this is another request's
        assert count(openai) == 2

    def test_another_body_is_another_request(self, service: Service) -> None:
        openai = client_of(service)
        job = create(openai)
        assert create(openai, 1, suffix="other") != job
        assert create(openai, 1) == job

    def test_a_retry_that_comes_too_late_is_a_new_request(self, service: Service) -> None:
        openai = client_of(service)
        job = create(openai)
        with Session(service.engine) as session, session.begin():
            session.execute(update(IdempotencyRow).values(created_at=now(-16 * 60)))
        assert create(openai, 1) != job

    def test_it_is_said_in_a_header(self, service: Service) -> None:
        openai = client_of(service).fine_tuning.jobs.with_raw_response
        answers = [
            openai.create(
                model="file:tiny",
                training_file="file:train.jsonl",
                extra_headers={"x-stainless-retry-count": str(retry)},
            )
            for retry in (0, 1)
        ]
        replayed = [answer.headers.get("idempotent-replayed") for answer in answers]
        assert replayed == [None, "true"]


class TestWithAKey:
    def test_the_key_says_what_is_the_same(self, service: Service) -> None:
        openai = client_of(service)
        job = create(openai, key="a")
        assert create(openai, key="a") == job
        assert create(openai, 1, key="b") != job
        native = {"base_model": "file:tiny", "dataset_uri": "file:train.jsonl"}
        assert ok(service.post(native, Idempotency_Key="a"), 202)["id"] == job

    def test_with_another_body_it_is_refused(self, service: Service) -> None:
        openai = client_of(service)
        create(openai, key="a")
        with pytest.raises(BadRequestError) as refused:
            create(openai, key="a", seed=1)
        assert refused.value.code == "idempotency_key_reused"


class TestOfOthers:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"auth": "key"})

    def test_a_retry_finds_no_job_of_another_key(self, service: Service) -> None:
        operator = {"Authorization": f"Bearer {service.settings.key_file.read_text().strip()}"}
        clients = []
        for name, project in (("a", "one"), ("b", "one"), ("c", "two")):
            key = {"name": name, "project": project, "role": "submitter"}
            made = ok(service.http.post("/keys", json=key, headers=operator), 201)
            clients.append(client_of(service, api_key=made["key"]))
        first = create(clients[0])
        assert len({first, *(create(openai, 1) for openai in clients)}) == 3
        assert [count(openai) for openai in clients] == [2, 2, 1]


def test_a_retry_waits_for_a_first_try_that_is_still_at_work(
    tmp_path: Path, migrated_postgres_url: str
) -> None:
    """Its client has given up on it; it has not committed yet."""
    plain = migrated_postgres_url.replace("postgresql+psycopg:", "postgresql:")
    settings = make_settings(tmp_path, migrated_postgres_url)
    with (
        contextmanager(serve)(settings) as service,
        ThreadPoolExecutor(2) as pool,
        psycopg.connect(plain) as stall,
    ):
        openai = client_of(service)
        stall.execute("LOCK TABLE job_events IN EXCLUSIVE MODE")  # the first try cannot end
        first = pool.submit(create, openai)
        until(lambda: _waits_for(plain, "relation"))
        retry = pool.submit(create, openai, 1)
        until(lambda: _waits_for(plain, "advisory"))
        stall.rollback()
        assert first.result(30) == retry.result(30)
        assert count(openai) == 1


def _waits_for(url: str, kind: str) -> bool:
    with psycopg.connect(url) as connection:
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = %s"
        return connection.execute(waiting, [kind]).fetchone() is not None
