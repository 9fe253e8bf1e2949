"""A wake-up is left exactly where a job moves into the queue, and none is lost on its way."""

import asyncio
import base64
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from app import failpoints
from app.broker import QUEUE, WAKE, make_celery, queue_of
from app.db import Database, make_engine, now
from app.failpoints import Injected
from app.ids import new_id
from app.jobs.repository import JobRepository
from app.jobs.states import Reason, Status
from app.outbox import BATCH, Relay, send_wake_up, wake
from app.tables import JobRow, OutboxRow
from tests.app.conftest import make_settings, serve
from tests.faults.servers import RedisServer
from tests.system.service import until
from tests.worker.jobs import (
    add_job,
    add_jobs,
    change,
    claimed,
    count,
    event_types,
    expire,
    make_spec,
    outbox,
    row,
    seconds_from_now,
)
from worker.claims import Claims
from worker.lease import Lease
from worker.registry import Registry
from worker.slot import Slot

SEND = """
import sys
from app.broker import make_celery
from app.db import make_engine
from app.outbox import Relay
Relay(make_engine(sys.argv[1]), make_celery(sys.argv[2])).send_due()
"""


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def broker(redis: RedisServer) -> Iterator[Celery]:
    """An empty one."""
    redis.start()
    with redis.client() as client:
        client.flushall()
    with closing(make_celery(redis.url())) as celery:
        yield celery


def sent(redis: RedisServer, queue: str = QUEUE) -> list[Any]:
    """What each message says, the oldest first."""
    with redis.client() as client:
        messages: Any = client.lrange(queue, 0, -1)
    found = []
    for message in reversed([json.loads(text) for text in messages]):
        assert message["headers"]["task"] == WAKE
        arguments, named, _ = json.loads(base64.b64decode(message["body"]))
        assert named == {}
        found.append(arguments)
    return found


def leave(engine: Engine, *jobs: str, after_seconds: float = 0) -> None:
    with Session(engine.execution_options(writes=True)) as session, session.begin():
        for job_id in jobs:
            session.execute(wake(job_id, after_seconds))


@pytest.fixture
def waking(engine: Engine) -> Claims:
    return Claims(
        engine, worker="w1", lease_seconds=60, max_attempts=3, retry_seconds=100, wakes=True
    )


def put_back(engine: Engine, claims: Claims, lease: Lease, how: str) -> None:
    match how:
        case "release":
            claims.release(lease, "drained")
        case "lose":
            claims.lose(lease, Reason.WORKER_LOST, "died")
        case "recover":
            claims.recover()
        case "reap":
            expire(engine, lease.job_id)
            claims.reap()


WAYS_BACK = ["release", "lose", "recover", "reap"]


class TestRequeued:
    @pytest.mark.parametrize("how", WAYS_BACK)
    def test_a_job_that_is_put_back_leaves_one_wake_up(
        self, engine: Engine, waking: Claims, how: str
    ) -> None:
        job_id = add_job(engine)
        put_back(engine, waking, claimed(waking), how)
        assert row(engine, job_id).status == Status.QUEUED
        assert outbox(engine) == [job_id]

    @pytest.mark.parametrize("how", WAYS_BACK)
    def test_without_a_broker_it_leaves_none(
        self, engine: Engine, claims: Claims, how: str
    ) -> None:
        job_id = add_job(engine)
        put_back(engine, claims, claimed(claims), how)
        assert row(engine, job_id).status == Status.QUEUED
        assert outbox(engine) == []

    @pytest.mark.parametrize("how", WAYS_BACK)
    def test_one_that_was_to_be_cancelled_leaves_none(
        self, engine: Engine, waking: Claims, how: str
    ) -> None:
        job_id = add_job(engine)
        lease = claimed(waking)
        change(engine, job_id, status=Status.CANCELLING)
        put_back(engine, waking, lease, how)
        assert row(engine, job_id).status == Status.CANCELLED
        assert outbox(engine) == []

    def test_what_ends_leaves_none(self, engine: Engine, waking: Claims) -> None:
        for _ in range(3):
            add_job(engine)
        waking.succeed(claimed(waking), result={}, adapter=None)
        waking.fail(claimed(waking), Reason.INTERNAL, "broken", None)
        last = claimed(waking)
        change(engine, last.job_id, attempt=3)
        waking.recover()
        again = claimed(waking)
        assert again.attempt == 3
        waking.lose(again, Reason.WORKER_LOST, "died")
        assert outbox(engine) == [last.job_id]  # of its recovery alone

    @pytest.mark.parametrize("how", WAYS_BACK)
    def test_what_is_rolled_back_leaves_none(
        self, engine: Engine, waking: Claims, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = add_job(engine)
        lease = claimed(waking)
        monkeypatch.setenv(failpoints.VARIABLE, "requeue.before_commit=raise")
        with pytest.raises(Injected):
            put_back(engine, waking, lease, how)
        assert (row(engine, job_id).status, outbox(engine)) == (Status.RUNNING, [])

    def test_it_comes_when_the_job_may_be_taken_and_not_before(
        self, engine: Engine, waking: Claims
    ) -> None:
        add_job(engine)
        waking.lose(claimed(waking), Reason.WORKER_LOST, "died")
        with Session(engine) as session:
            due = session.scalars(select(OutboxRow.due_at)).one()
            available = session.scalars(select(JobRow.available_at)).one()
        assert available is not None
        assert 0 <= (due - available).total_seconds() < 2
        assert 70 < seconds_from_now(engine, OutboxRow.due_at) < 121


class TestSubmitted:
    def test_a_new_job_wakes_the_workers_at_once_and_a_repeated_request_does_not(
        self, tmp_path: Path, migrated_postgres_url: str, redis: RedisServer, broker: Celery
    ) -> None:
        settings = make_settings(
            tmp_path, migrated_postgres_url, broker_url=redis.url(), relay_seconds=600
        )
        with contextmanager(serve)(settings) as service:
            first = service.submit()["id"]
            until(lambda: sent(redis) == [[first]])
            key = {"Idempotency_Key": "k"}
            (second,) = {service.post(service.body, **key).json()["id"] for _ in range(3)}
            until(lambda: sent(redis) == [[first], [second]])
            until(lambda: outbox(service.engine) == [])

    def test_one_of_several_gpus_wakes_slots_that_have_them_and_says_if_none_has(
        self, tmp_path: Path, migrated_postgres_url: str, redis: RedisServer, broker: Celery
    ) -> None:
        settings = make_settings(
            tmp_path, migrated_postgres_url, broker_url=redis.url(), relay_seconds=600
        )
        with contextmanager(serve)(settings) as service:
            service.body["resources"] = {"gpus": 2}
            slots = [[], [Slot("a", "0"), Slot("b", "1")], [Slot("a", "0+1")]]
            told = []
            for found in slots:
                Registry(service.engine, "machine", found).beat()
                job_id = service.submit()["id"]
                until(lambda: sent(redis, queue_of(2))[-1:] == [[job_id]])  # noqa: B023 - at once
                told.append(event_types(service.engine, job_id))
            dry = service.submit(dry_run=True)["id"]  # needs none
            until(lambda: sent(redis) == [[dry]])
        assert told == [["job.queued", "job.waiting"]] * 2 + [["job.queued"]]

    @pytest.mark.parametrize("wakes", [True, False])
    def test_it_is_there_if_and_only_if_the_job_is(
        self, engine: Engine, migrated_url: str, wakes: bool
    ) -> None:
        async def add(*, fails: bool) -> str:
            database = Database(migrated_url)
            try:
                async with database.scoped("default", writes=True) as session:
                    spec = make_spec()
                    job, _ = await JobRepository(session, wakes=wakes).add(
                        id=new_id("job"),
                        base_model=spec["base_model"],
                        dataset_uri=spec["dataset_uri"],
                        spec=spec,
                        status=Status.QUEUED,
                        priority=5,
                    )
                    if fails:
                        raise Injected
            finally:
                await database.engine.dispose()
            return job.id

        with pytest.raises(Injected):
            asyncio.run(add(fails=True))
        assert (count(engine), outbox(engine)) == (0, [])
        job_id = asyncio.run(add(fails=False))
        assert (count(engine), outbox(engine)) == (1, [job_id] if wakes else [])


class TestRelay:
    def test_what_is_due_is_sent_in_order_and_is_gone(
        self, engine: Engine, redis: RedisServer, broker: Celery
    ) -> None:
        jobs = [add_job(engine) for _ in range(3)]
        leave(engine, *jobs)
        assert Relay(engine, broker).send_due() == 3
        assert sent(redis) == [[job_id] for job_id in jobs]
        assert outbox(engine) == []
        assert Relay(engine, broker).send_due() == 0

    def test_more_than_a_batch_go_at_once(
        self, engine: Engine, redis: RedisServer, broker: Celery
    ) -> None:
        leave(engine, *add_jobs(engine, 2 * BATCH + 1))
        assert Relay(engine, broker).send_due() == 2 * BATCH + 1
        assert (len(sent(redis)), outbox(engine)) == (2 * BATCH + 1, [])

    def test_what_is_not_due_stays(
        self, engine: Engine, redis: RedisServer, broker: Celery
    ) -> None:
        later, due = add_job(engine), add_job(engine)
        leave(engine, later, after_seconds=60)
        leave(engine, due)
        relay = Relay(engine, broker)
        assert relay.send_due() == 1
        assert (sent(redis), outbox(engine)) == ([[due]], [later])
        with Session(engine.execution_options(writes=True)) as session, session.begin():
            session.execute(update(OutboxRow).values(due_at=now()))
        assert relay.send_due() == 1
        assert sent(redis) == [[due], [later]]

    def test_without_redis_all_stay_and_go_when_it_is_back(
        self, engine: Engine, redis: RedisServer, broker: Celery
    ) -> None:
        jobs = [add_job(engine) for _ in range(3)]
        relay = Relay(engine, broker)
        leave(engine, jobs[0])
        relay.send_due()  # so that it has a connection, which breaks
        leave(engine, *jobs[1:])
        redis.kill()
        for _ in range(2):
            with pytest.raises(OperationalError):
                relay.send_due()
            assert outbox(engine) == jobs[1:]
        redis.start()
        assert relay.send_due() == 2
        assert (sent(redis), outbox(engine)) == ([[job_id] for job_id in jobs[1:]], [])

    @pytest.mark.parametrize(
        ("point", "times"), [("relay.before_send", 1), ("relay.after_send", 2)]
    )
    def test_one_that_is_killed_loses_nothing(
        self,
        engine: Engine,
        migrated_url: str,
        redis: RedisServer,
        broker: Celery,
        point: str,
        times: int,
    ) -> None:
        job_id = add_job(engine)
        leave(engine, job_id)
        command = [sys.executable, "-c", SEND, migrated_url, redis.url()]
        environment = {**os.environ, failpoints.VARIABLE: f"{point}=kill"}
        assert subprocess.run(command, env=environment, check=False).returncode == -9
        assert outbox(engine) == [job_id]
        assert Relay(engine, broker).send_due() == 1
        assert (sent(redis), outbox(engine)) == ([[job_id]] * times, [])

    def test_several_at_once_send_each_once(
        self, migrated_postgres_url: str, redis: RedisServer, broker: Celery
    ) -> None:
        engine = make_engine(migrated_postgres_url)
        jobs = add_jobs(engine, 5 * BATCH)
        leave(engine, *jobs)
        start = threading.Barrier(4)

        def send() -> None:
            start.wait()
            Relay(engine, broker).send_due()

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Counter(job_id for (job_id,) in sent(redis)) == Counter(jobs)
        assert outbox(engine) == []
        engine.dispose()

    def test_one_that_hangs_holds_up_only_what_it_is_sending(
        self, migrated_postgres_url: str, redis: RedisServer, broker: Celery
    ) -> None:
        engine = make_engine(migrated_postgres_url)
        first, second = add_job(engine), add_job(engine)
        leave(engine, first, second)
        with engine.begin() as hanging:
            hanging.execute(select(OutboxRow.id).where(OutboxRow.job_id == first).with_for_update())
            assert Relay(engine, broker).send_due() == 1
        assert (sent(redis), outbox(engine)) == ([[second]], [first])
        engine.dispose()


def test_a_wake_up_need_not_name_a_job(redis: RedisServer, broker: Celery) -> None:
    send_wake_up(broker)
    assert sent(redis) == [[]]
