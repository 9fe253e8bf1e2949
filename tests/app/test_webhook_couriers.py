"""Who sends webhooks may be many, and may die: each event is told, under one id."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, insert, text
from sqlalchemy.orm import Session

from app.db import make_engine, now
from app.failpoints import Point
from app.ids import new_id
from app.settings import Settings
from app.tables import EventRow, JobRow, WebhookDeliveryRow
from app.webhooks.courier import Courier, ready
from app.webhooks.notices import EVENTS_AT_ONCE, TOLD, Notices, jobs_with_news
from tests.app.hooked import Hooked, hook_settings, hooked
from tests.app.receiver import Receiver, receiving
from tests.system.service import until

QUIET = 10_000  # seconds: no courier but those of the test


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def hook(tmp_path: Path, migrated_url: str, receiver: Receiver) -> Iterator[Hooked]:
    """Nobody sends, unless the test does. Once on each database."""
    settings = hook_settings(tmp_path, migrated_url, receiver, webhook_seconds=QUIET)
    with hooked(settings, receiver) as hook:
        yield hook


@contextmanager
def courier(settings: Settings) -> Iterator[Courier]:
    engine = make_engine(settings.database)
    courier = Courier(engine, settings, lambda _: None)
    try:
        yield courier
    finally:
        courier.close()
        engine.dispose()


class TestMany:
    def test_couriers_at_once_send_each_event_once(self, hook: Hooked) -> None:
        jobs = [hook.submit() for _ in range(10)]
        for job_id in jobs:
            hook.happen(job_id, "job.running", "job.checkpoint", "job.succeeded")
        wanted = 3 * len(jobs)
        with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
            couriers = [stack.enter_context(courier(hook.service.settings)) for _ in range(4)]

            def all_is_told() -> bool:
                list(pool.map(Courier.turn, couriers))
                return hook.count(state="delivered") == wanted

            until(all_is_told, every=0.01)
        assert len(hook.receiver.messages) == wanted
        assert set(Counter(hook.receiver.ids).values()) == {1}
        for job_id in jobs:
            told = [m.type for m in hook.receiver.messages if m.told["data"]["id"] == job_id]
            assert told == ["job.running", "job.checkpoint", "job.succeeded"]

    def test_one_that_comes_back_late_writes_nothing(self, hook: Hooked) -> None:
        released = threading.Event()
        hook.receiver.answer = lambda _: ((released.wait(30) and 500) or 500, b"late", {})
        job_id = hook.submit()
        hook.happen(job_id, "job.running")
        with courier(hook.service.settings) as late, courier(hook.service.settings) as quick:
            late.turn()
            until(lambda: hook.receiver.messages)
            quick.turn()
            assert len(hook.receiver.messages) == 1  # it is under the lease of the other
            hook.change(leased_until=now(-1))
            hook.receiver.answers(200)
            _turn_until(quick, lambda: hook.count(state="delivered") == 1)
            released.set()
            _turn_until(late, lambda: not late._under_way)
        (delivery,) = hook.log(job_id)
        assert delivery["state"] == "delivered"
        assert [attempt["status"] for attempt in delivery["attempts"]] == [200]
        assert len(set(hook.receiver.ids)) == 1


class TestKilled:
    @pytest.mark.parametrize(
        ("database", "point", "sent_before"),
        [
            ("sqlite", Point.WEBHOOK_BEFORE_NOTICED, 0),
            ("sqlite", Point.WEBHOOK_BEFORE_SEND, 0),
            ("postgres", Point.WEBHOOK_AFTER_SEND, 1),
        ],
    )
    def test_what_a_killed_courier_leaves_another_sends_under_the_same_id(
        self, request: pytest.FixtureRequest, tmp_path: Path, receiver: Receiver,
        database: str, point: Point, sent_before: int,
    ) -> None:  # fmt: skip
        url = request.getfixturevalue(f"migrated_{database}_url")
        settings = hook_settings(tmp_path, url, receiver, webhook_seconds=QUIET)
        with hooked(settings, receiver) as hook:
            job_id = hook.submit()
            hook.happen(job_id, "job.running")
            assert _turn_in_a_process(settings, f"{point}=kill") == -9
            assert len(receiver.messages) == sent_before
            hook.change(leased_until=now(-1))  # as after a minute
            with courier(settings) as another:
                _turn_until(another, lambda: hook.count(state="delivered") == 1)
            (delivery,) = hook.settled(job_id)
            assert len(receiver.messages) == sent_before + 1
            assert set(receiver.ids) == {delivery["id"]}
            for message in receiver.messages:
                message.verify(hook.secret)


def _turn_until(courier: Courier, is_so: Callable[[], bool]) -> None:
    def turn() -> bool:
        courier.turn()
        return is_so()

    until(turn, every=0.01)


TURN = """
import time
from app.db import make_engine
from app.settings import Settings
from app.webhooks.courier import Courier

settings = Settings()
courier = Courier(make_engine(settings.database), settings, lambda _: None)
courier.turn()
time.sleep(60)  # it is to die
"""


def _turn_in_a_process(settings: Settings, failpoints: str = "") -> int:
    environment = {
        **os.environ,
        "FLATLORA_DATA_DIR": str(settings.data_dir),
        "FLATLORA_DATABASE_URL": settings.database_url,
        "FLATLORA_ALLOWED_NETWORKS": ",".join(map(str, settings.allowed_networks)),
        "FLATLORA_ALLOWED_PORTS": ",".join(map(str, settings.allowed_ports)),
        "FLATLORA_ALLOW_HTTP": "1",
        "FLATLORA_FAILPOINTS": failpoints,
    }
    command = [sys.executable, "-c", TURN]
    return subprocess.run(command, env=environment, timeout=50, check=False).returncode


class TestScan:
    """What it costs to find what is to be told."""

    @pytest.fixture
    def engine(self, migrated_url: str) -> Iterator[Engine]:
        engine = make_engine(migrated_url).execution_options(writes=True)
        yield engine
        engine.dispose()

    @staticmethod
    def fill(engine: Engine, jobs: int, **values: Any) -> list[str]:
        ids = [new_id("job") for _ in range(jobs)]
        row = {
            "base_model": "file:m", "dataset_uri": "file:d", "status": "succeeded", "labels": {},
            "attempt": 1, "fence": 1, "runtime": 0.0, "recoveries": 0, "step": 0,
            "spec": {
                "base_model": "file:m", "dataset_uri": "file:d",
                "webhook_url": "http://127.0.0.1:1/",
            },
        } | values  # fmt: skip
        with Session(engine) as session, session.begin():
            moments = {"created_at": now(), "updated_at": now()}
            first = {"id": "x"} | row
            session.execute(
                insert(JobRow).values(**moments), [first | {"id": job_id} for job_id in ids]
            )
        return ids

    @staticmethod
    def add_events(engine: Engine, job_id: str, types: list[str]) -> None:
        with Session(engine) as session, session.begin():
            session.execute(
                insert(EventRow).values(at=now()),
                [
                    {"job_id": job_id, "seq": seq, "type": type_, "message": "", "data": {}}
                    for seq, type_ in enumerate(types, 1)
                ],
            )

    def test_a_job_of_ten_thousand_events_costs_no_more_than_one_of_ten(
        self, engine: Engine
    ) -> None:
        (job_id,) = self.fill(engine, 1, status="running", webhook_seq=0)
        (small,) = self.fill(engine, 1, status="running", webhook_seq=0)
        self.add_events(engine, job_id, ["job.evaluated"] * 10_000)
        self.add_events(engine, small, ["job.evaluated"] * 10)
        notices = Notices(engine)
        assert notices.make() == 2
        assert notices.make() == 0
        with engine.connect() as connection:
            _analyse(connection)
            plan = _plan(connection, jobs_with_news(is_thorough=False))
        wanted = {
            "sqlite": "SEARCH job_events USING COVERING INDEX",
            "postgresql": "Index Only Scan Backward using pk_job_events on job_events",
        }
        assert wanted[engine.dialect.name] in plan, plan

    def test_all_events_of_a_long_job_are_told_in_several_turns(self, engine: Engine) -> None:
        (job_id,) = self.fill(engine, 1, status="succeeded", webhook_seq=0)
        types = ["job.evaluated", "job.checkpoint"] * EVENTS_AT_ONCE + ["job.succeeded"]
        self.add_events(engine, job_id, types)
        notices = Notices(engine)
        turns = 0
        while notices.make():
            turns += 1
        with Session(engine) as session:
            seqs = session.scalars(text("SELECT seq FROM webhook_deliveries ORDER BY seq")).all()
            assert session.get_one(JobRow, job_id).webhook_seq is None
        assert seqs == [seq for seq, type_ in enumerate(types, 1) if type_ in TOLD]
        assert turns == 2

    def test_it_reads_nothing_of_jobs_without_webhooks_nor_of_what_has_arrived(
        self, engine: Engine
    ) -> None:
        jobs = self.fill(engine, 2000)
        row = {
            "seq": 1, "type": "job.succeeded", "url": "", "host": "h", "body": "{}" * 1000,
            "state": "delivered", "attempts": [],
        }  # fmt: skip
        moments = {"created_at": now(), "give_up_at": now()}
        with Session(engine) as session, session.begin():
            session.execute(
                insert(WebhookDeliveryRow).values(**moments),
                [{"job_id": job_id, "id": new_id("msg")} | row for job_id in jobs],
            )
        with engine.connect() as connection:
            _analyse(connection)
            for is_thorough in (False, True):
                plan = _plan(connection, jobs_with_news(is_thorough=is_thorough))
                assert "ix_jobs_webhooks" in plan, plan
                assert "Seq Scan on jobs" not in plan, plan
            plan = _plan(connection, ready())
            assert "ix_webhook_deliveries_due_at" in plan, plan
            assert "Seq Scan on webhook_deliveries" not in plan, plan

    def test_thousands_that_wait_in_the_queue_are_passed_over(self, engine: Engine) -> None:
        waiting = self.fill(engine, 2000, status="queued", fence=0, attempt=0, webhook_seq=0)
        with Session(engine) as session, session.begin():
            session.execute(
                insert(EventRow).values(at=now(), type="job.queued", message="", data={}, seq=1),
                [{"job_id": job_id} for job_id in waiting],
            )
        (running,) = self.fill(engine, 1, status="running", webhook_seq=0)
        self.add_events(engine, running, ["job.queued", "job.running"])
        with engine.connect() as connection:
            _analyse(connection)
        with Session(engine) as session:
            assert session.scalars(jobs_with_news(is_thorough=False)).all() == [running]
            took = min(_seconds(session, jobs_with_news(is_thorough=False)) for _ in range(5))
            thorough = min(_seconds(session, jobs_with_news().limit(None)) for _ in range(5))
        assert took < thorough


def _analyse(connection: Connection) -> None:
    connection.execute(text("ANALYZE"))
    connection.commit()


def _plan(connection: Connection, statement: Any) -> str:
    compiled = statement.compile(connection, compile_kwargs={"literal_binds": True})
    explain = "EXPLAIN " if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    rows = connection.exec_driver_sql(explain + str(compiled).replace("%", "%%"))
    return "\n".join(str(row[-1]) for row in rows)


def _seconds(session: Session, statement: Any) -> float:
    began = time.perf_counter()
    session.scalars(statement).all()
    return time.perf_counter() - began
